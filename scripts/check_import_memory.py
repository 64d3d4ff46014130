"""Measure the memory of importing a real-size checkpoint: peak must stay under final size plus one shard.

    python scripts/check_import_memory.py FOLDER [--config sa2va_4b_full] [--shard_gb 2]

Writes a random checkpoint in the original's layout to FOLDER (sharded safetensors, the size of the model, 8.4 GiB at
4B), then imports it in a new process and compares the peak of resident memory. FOLDER is removed afterwards. Mapped
pages of the shard that is being read count as resident. Exit status 1 where the bound is exceeded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dual_loop.checkpoint.importer import load_weights
from dual_loop.checkpoint.key_rules import ORIGINAL, iterate_export
from dual_loop.config import load_config, resolve_config_path
from dual_loop.model.build import build_model
from dual_loop.preflight.dry_run import PlaceholderTokenizer

warnings.filterwarnings("ignore", category=FutureWarning)
GIB = 2**30
# Interpreter, libraries and their buffers, before a model is built, are taken off as measured; this is for the rest.
SLACK_GIB = 0.25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default="sa2va_4b_full")
    parser.add_argument("--shard_gb", type=float, default=2.0)
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        return read(args.folder, args.config)
    try:
        write(args.folder, args.config, args.shard_gb)
        command = [sys.executable, __file__, str(args.folder), "--config", args.config, "--read"]
        return subprocess.run(command, check=False).returncode
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


def meta_model(name: str) -> tuple[Any, Any]:
    config = load_config(resolve_config_path(name))
    return build_model(config, PlaceholderTokenizer(int(config.model.text["vocab_size"])), device="meta"), config


def write(folder: Path, config: str, shard_gb: float) -> None:
    """Write shards of random values, one shard in memory at a time."""
    folder.mkdir(parents=True)
    model, _ = meta_model(config)
    tensors = dict(iterate_export(model.state_dict().items(), ORIGINAL))
    shard: dict[str, torch.Tensor] = {}
    size, number, weight_map = 0, 0, {}
    for name, tensor in tensors.items():
        shard[name] = torch.full(tensor.shape, 0.01, dtype=tensor.dtype)
        size += shard[name].nbytes
        if size > shard_gb * 1e9 or name == list(tensors)[-1]:
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file)
            weight_map.update(dict.fromkeys(shard, file))
            shard, size, number = {}, 0, number + 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read(folder: Path, name: str) -> int:
    """Import into a model whose memory is reserved but not touched, so that every page counted is the import's."""
    start = peak()
    model, _ = meta_model(name)
    model.to_empty(device="cpu")
    begin = time.perf_counter()
    report = load_weights(model, folder)
    seconds = time.perf_counter() - begin
    final = sum(tensor.nbytes for tensor in model.state_dict().values()) / GIB
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors")) / GIB
    used, bound = peak() - start, final + shard + SLACK_GIB
    print(report)
    print(
        f"{seconds:.0f} s; peak {used:.2f} GiB above the interpreter's {start:.2f}; final size {final:.2f} GiB, ",
        end="",
    )
    print(f"largest shard {shard:.2f} GiB, bound {bound:.2f} GiB: {'passed' if used <= bound else 'FAILED'}")
    return 0 if used <= bound else 1


def peak() -> float:
    """Return the largest resident size of this program so far, in GiB.

    Not ``getrusage``: its figure also counts the parent process at the moment of the fork.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**20


if __name__ == "__main__":
    sys.exit(main())

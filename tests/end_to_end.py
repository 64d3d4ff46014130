"""Starts the trainer as a user does, on generated data, and reads what it left. Shared by the end-to-end tests."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from warm_python import warm_python

ROOT = Path(__file__).resolve().parent.parent

# Plain steps from the packaged checkpoint: nothing here depends on what it learned.
BASE = [
    *("--config", "tiny_cpu", "--device", "cpu", "--regions_per_image", "2", "--num_workers", "0"),
    *("--learning_rate", "1e-3", "--max_new_tokens", "6", "--log_interval", "1", "--panel_interval", "1000"),
]


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "DUAL_LOOP_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def data_flags(demo: Path) -> list[str]:
    return [
        *("--sav_dir", str(demo / "sav"), "--sa1b_dir", str(demo / "sa1b")),
        *("--openimage_dir", str(demo / "openimages"), "--refcoco_dir", str(demo / "ref_seg")),
    ]


def command(arguments: list[str], num_processes: int = 1, python: str = "") -> list[str]:
    """``python`` is the warm one (``warm_python.py``) unless given."""
    python = python or warm_python()
    if num_processes == 1:
        return [python, "-m", "dual_loop.train_dual_loop", *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    return [python, *launcher, "-m", "dual_loop.train_dual_loop", *arguments]


def train(
    arguments: list[str], tmp_path: Path, num_processes: int = 1, python: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the trainer to its end and return it; fails with its output where the exit status is not 0."""
    result = run(arguments, tmp_path, num_processes, python)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def run(
    arguments: list[str], tmp_path: Path, num_processes: int = 1, python: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(arguments, num_processes, python),
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def records(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def summary(run_folder: Path) -> dict[str, Any]:
    return dict(json.loads((run_folder / "summary.json").read_text()))


def parameters(run_folder: Path, step: int) -> dict[str, Tensor]:
    folder = run_folder / "checkpoints" / f"step_{step:08d}"
    return dict(load_file(next(folder.glob("model*.safetensors"))))

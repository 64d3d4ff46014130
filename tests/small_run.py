"""A run folder with one checkpoint of the tiny model, as training would have left it, without training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dual_loop.checkpoint.importer import weights_sources
from dual_loop.checkpoint.manifest import MANIFEST_NAME, hash_file
from dual_loop.checkpoint.store import save_run_checkpoint
from dual_loop.config import DEFAULT_CONFIG, load_config, resolve_config_path
from dual_loop.model.adapters import trainable_parameters
from dual_loop.serve.loading import rebuild
from dual_loop.training.run_folder import RunFolder


def write_small_run(path: Path) -> Path:
    """Write a run of the default configuration that has taken one step; return its checkpoint."""
    config = load_config(resolve_config_path(DEFAULT_CONFIG), {"train.output_dir": str(path)})
    model, _ = rebuild(config, weights_sources(config))
    tensors = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    RunFolder(path).create(config.to_dict(), {}, resuming=False)
    kept = {"ema_tensors": tensors, "optimizer_state": {"state": {0: {"exp_avg": torch.zeros(1)}}}}
    return save_run_checkpoint(path, 1, model_tensors=tensors, state={}, rng_states={}, **kept)


def put_nan(file: Path) -> str:
    """Put a NaN into a file of safetensors, and its hash into the manifest beside it; return the tensor's name."""
    tensors = load_file(file)
    name = sorted(name for name in tensors if tensors[name].is_floating_point())[0]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file)
    if (manifest := file.with_name(MANIFEST_NAME)).is_file():
        content = json.loads(manifest.read_text())
        content["files"][file.name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
        manifest.write_text(json.dumps(content))
    return name

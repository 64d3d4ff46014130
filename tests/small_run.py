"""A run folder with one checkpoint of the tiny model, as training would have left it, without training."""

from __future__ import annotations

from pathlib import Path

import torch

from dual_loop.checkpoint.importer import weights_sources
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

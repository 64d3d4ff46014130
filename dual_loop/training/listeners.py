"""Listeners that were trained apart: weights that hear a run's captions and had no part in them.

A captioner and a segmenter that train together may agree on a code, and the weights of the start share every mistake
with the captioner that grew from them. A model that was trained from the same start on other data shares neither. It
has the frozen towers of the run, so only what trains is kept of it and put into the model while it listens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dual_loop.checkpoint.importer import read_trained, weights_sources
from dual_loop.checkpoint.manifest import EMA_NAME, MODEL_NAME
from dual_loop.config import Config, load_config
from dual_loop.errors import CheckpointError, explain
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA
from dual_loop.training.run_folder import find_run, is_run

SHARED = (
    *("vision", "text", "downsample_ratio", "sam2", "text_hidden_dim"),
    *("template", "single_mask", "lora_r", "lora_alpha", "use_rslora", "use_dora"),
)
"""Settings of ``model`` that a run must have in common with one whose listener it is to be."""
Listeners = Mapping[str, Mapping[str, Tensor]]
"""By its path, what stands in for the trainable parameters while a listener listens."""


def read_listener(path: str | Path, model: Sa2VA, prompter: Prompter, config: Config) -> dict[str, Tensor]:
    """Return the values that the trainable parameters of ``model`` have in another run or file, on its device.

    Args:
        path: a run folder or a checkpoint inside one (its weight average, where it has one), or weights as
            ``--pretrained_pth`` takes them. What is frozen, tokenizer and sizes are the same there.
        model: with the weights of ``config`` loaded, neither sharded nor packed.

    Raises:
        CheckpointError: nothing usable is there, or it is not of the same start and settings.
    """
    path, sources = Path(path), [Path(path)]
    if is_run(path):
        folder, saved = find_run(path)
        theirs, started = load_config(folder / "config.json"), weights_sources(config)
        ours, other = (one.to_dict()["model"] for one in (config, theirs))
        unlike = [name for name in SHARED if ours[name] != other[name]]
        different = [f"model.{name}: {other[name]} there, {ours[name]} here" for name in unlike]
        average, sources = saved / EMA_NAME, weights_sources(theirs)
        if not sources and (started or theirs.train.seed != config.train.seed):
            different.append("random weights at its start")
        if different:
            what, fix = "a listener is of another kind than this run", "choose one that was trained from the same start"
            raise CheckpointError(explain(what, str(path), "; ".join(different), "the same settings", fix))
        sources = [*sources, average if average.is_file() else saved / MODEL_NAME]
    return read_trained(model, sources, prompter.tokenizer)

"""From a run folder, a checkpoint or a file of weights to a model that answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from dual_loop.checkpoint.importer import build_to_load, load_weights, weights_sources
from dual_loop.checkpoint.manifest import EMA_NAME, MODEL_NAME, hash_file, read_manifest
from dual_loop.checkpoint.store import load_tensors
from dual_loop.config import DEFAULT_CONFIG, Config, how_to_get, hub_name, in_cache, load_config, resolve_config_path
from dual_loop.errors import CheckpointError, explain
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.build import build_prompter
from dual_loop.model.hardware import autocast
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va_api import VideoLLaVASAMModel
from dual_loop.training.devices import choose_arithmetic
from dual_loop.training.run_folder import fill_parameters, is_run
from dual_loop.training.run_folder import find_run as find_run

TINY_NOTE = "the tiny model knows generated symbols only: what it says of a photograph means nothing"


@dataclass
class LoadedModel:
    """A model in eval mode on its device, with all that is needed to ask it.

    ``origin`` says what was loaded: path, step and kind of weights, and the SHA-256 of the file that holds them.
    """

    model: VideoLLaVASAMModel
    prompter: Prompter
    config: Config
    origin: dict[str, str]

    @property
    def is_tiny(self) -> bool:
        """Whether it is the tiny model, with the weights in the package or trained further."""
        return self.config.model.tokenizer == "tiny"

    def autocast(self) -> AbstractContextManager[object]:
        """Return the precision that the model computes in: that of its frozen weights."""
        return autocast(self.model.device.type, self.config.model.dtype)


@dataclass(frozen=True)
class Trained:
    """What a path means, before any weights are read."""

    config: Config  # of the run or the file, with what was given on top
    sources: list[Path]  # weights that the model starts from
    saved: Path | None  # the checkpoint of a run whose trained weights come on top
    weights: str  # ema (the weight average) or live, for runs
    origin: dict[str, str]  # path, step and kind of weights

    def load(self, device: torch.device) -> LoadedModel:
        """Read the weights, straight to ``device``.

        Raises:
            CheckpointError: they cannot be read, or do not fit.
            EnvironmentProblem: the device has no such attention kernel.
        """
        choose_arithmetic(self.config, device.type)
        model, prompter = rebuild(self.config, self.sources, device)
        origin = dict(self.origin)
        if self.config.model.quantize != "none":
            origin["frozen"] = f"whole (trained over {self.config.model.quantize})"
        if self.saved is not None:
            origin["sha256"] = fill(model, self.saved, self.weights)
        elif self.sources[-1].is_file():
            origin["sha256"] = hash_file(self.sources[-1])
        return LoadedModel(model.eval(), prompter, self.config, origin)


def find_trained(
    checkpoint: str | Path | None = None,
    *,
    weights: str = "ema",
    config: str | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Trained:
    """Find a model and its configuration, without reading any weights.

    Args:
        checkpoint: a run folder, one checkpoint folder inside it, or weights (a file or folder that
            ``--pretrained_pth`` takes); None is the tiny checkpoint in the package.
        weights: ``ema`` (the weight average) or ``live``, for runs.
        config: configuration of weights that are no run; None is the tiny one.
        overrides: dotted settings that win over the run's or the file's.

    Raises:
        CheckpointError: nothing usable is there.
        ConfigError: a setting is wrong.
    """
    path = None if checkpoint is None else Path(in_cache(str(checkpoint)))
    if path is not None and not path.exists():
        fix = f"{how_to_get(path)}; a run folder is what --output_dir named"
        raise CheckpointError(explain("no such run or weights", str(path), "nothing there", fix=fix))
    settings = dict(overrides or {})
    if path and is_run(path):
        folder, saved = find_run(path)
        own = load_config(folder / "config.json", settings)
        origin = {"path": str(folder), "checkpoint": saved.name, "weights": weights}
        return Trained(own, weights_sources(own), saved, weights, origin)
    if path is not None:
        settings["train.pretrained_pth"] = str(path)
    own = load_config(resolve_config_path(config or DEFAULT_CONFIG), settings)
    sources = weights_sources(own)
    if not sources:
        raise CheckpointError(explain("no weights are given", own.model.name, fix="give --checkpoint"))
    origin = {"path": str(sources[-1]) if path else "the tiny checkpoint in the package"}
    if name := hub_name(sources[-1]):
        origin["hub"] = name
    return Trained(own, sources, None, weights, origin)


def rebuild(
    config: Config, sources: Sequence[Path], device: torch.device | str = "cpu"
) -> tuple[VideoLLaVASAMModel, Prompter]:
    """Build the run's model, on ``device``, with the weights that it started from."""
    model, tokenizer = build_to_load(config, sources, device)
    if sources:
        load_weights(model, list(sources), tokenizer=tokenizer, allow_missing=config.train.allow_missing)
    return model.to(device), build_prompter(config, tokenizer)


def fill(model: VideoLLaVASAMModel, checkpoint: Path, weights: str) -> str:
    """Put the trained parameters of a run checkpoint (``live``), or their averages (``ema``), into ``model``.

    Args:
        checkpoint: as :func:`find_run` returns it; its hashes are not looked at again.

    Returns:
        The SHA-256 of the file that holds them.
    """
    name = EMA_NAME if weights == "ema" else MODEL_NAME
    entry = read_manifest(checkpoint).files.get(name)
    if entry is None:
        raise CheckpointError(explain("no averages were saved", str(checkpoint), fix="use --weights live"))
    fill_parameters(trainable_parameters(model), load_tensors(checkpoint / name))
    return entry.sha256

"""From a run folder, a checkpoint or a file of weights to a model that answers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from dual_loop.checkpoint.importer import brings_new_tokens, load_weights, tokenizer_folder, weights_sources
from dual_loop.checkpoint.manifest import EMA_NAME, MODEL_NAME, hash_file
from dual_loop.checkpoint.store import CHECKPOINT_DIR, load_run_checkpoint
from dual_loop.config import DEFAULT_CONFIG, Config, load_config, resolve_config_path
from dual_loop.errors import CheckpointError, EnvironmentProblem, explain
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.build import build_model, build_prompter, build_tokenizer
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va_api import VideoLLaVASAMModel
from dual_loop.training.run_folder import fill_parameters, find_checkpoint


@dataclass
class LoadedModel:
    """A model in eval mode on its device, with all that is needed to ask it.

    ``origin`` says what was loaded: path, step and kind of weights, and the SHA-256 of the file that holds them.
    """

    model: VideoLLaVASAMModel
    prompter: Prompter
    config: Config
    origin: dict[str, str]

    def autocast(self) -> AbstractContextManager[object]:
        """Return the precision that the model computes in: bfloat16 where its frozen weights are."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.model.dtype == "bfloat16")


def load_trained(
    checkpoint: str | Path | None = None,
    *,
    weights: str = "ema",
    config: str | None = None,
    overrides: Mapping[str, object] | None = None,
    device: str = "auto",
) -> LoadedModel:
    """Load a model for use.

    Args:
        checkpoint: a run folder, one checkpoint folder inside it, or weights (a file or folder that
            ``--pretrained_pth`` takes); None is the tiny checkpoint in the package.
        weights: ``ema`` (the weight average) or ``live``, for runs.
        config: configuration of weights that are no run; None is the tiny one.
        overrides: dotted settings that win over the run's or the file's.

    Raises:
        CheckpointError: nothing usable is there.
        ConfigError: a setting is wrong.
        EnvironmentProblem: ``cuda`` without a GPU.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise EnvironmentProblem(explain("no GPU is visible", "--device", "cuda", "a CUDA device", "use --device cpu"))
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.exists():
        fix = "check the path; a run folder is what --output_dir named"
        raise CheckpointError(explain("no such run or weights", str(path), "nothing there", fix=fix))
    settings = dict(overrides or {})
    # Released weights have a config.json of another kind, and no checkpoints beside it.
    around = () if path is None else (path, *path.absolute().parents[:2])
    if path and any((folder / "config.json").is_file() and (folder / CHECKPOINT_DIR).is_dir() for folder in around):
        folder, saved = find_run(path)
        own = load_config(folder / "config.json", settings)
        model, prompter = rebuild(own, weights_sources(own))
        fill(model, saved, weights)
        origin = {"path": str(folder), "checkpoint": saved.name, "weights": weights}
        file = saved / (EMA_NAME if weights == "ema" else MODEL_NAME)
    else:
        if path is not None:
            settings["train.pretrained_pth"] = str(path)
        own = load_config(resolve_config_path(config or DEFAULT_CONFIG), settings)
        sources = weights_sources(own)
        if not sources:
            raise CheckpointError(explain("no weights are given", own.model.name, fix="give --checkpoint"))
        model, prompter = rebuild(own, sources)
        file = sources[-1]
        origin = {"path": "the tiny checkpoint in the package" if path is None else str(file)}
    if file.is_file():
        origin["sha256"] = hash_file(file)
    model.to(torch.device("cuda" if has_cuda and device != "cpu" else "cpu")).eval()
    return LoadedModel(model, prompter, own, origin)


def find_run(path: Path) -> tuple[Path, Path]:
    """Return (run folder, checkpoint folder) for a run folder or one of its checkpoints.

    Raises:
        CheckpointError: there is no run or no whole checkpoint.
    """
    folder = next((parent for parent in (path, *path.parents[:2]) if (parent / "config.json").is_file()), None)
    if folder is None:
        expected = "a folder that training wrote"
        raise CheckpointError(explain("not a run folder", str(path), "no config.json", expected, "check the path"))
    return folder, cast(Path, find_checkpoint(str(path), folder))


def rebuild(config: Config, sources: Sequence[Path]) -> tuple[VideoLLaVASAMModel, Prompter]:
    """Build the run's model with the weights that it started from."""
    tokenizer = build_tokenizer(config.model, tokenizer_folder(config))
    embeddings = brings_new_tokens(list(sources), len(tokenizer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(config.train.seed)
        model = build_model(config, tokenizer, weights_imported=embeddings)
    if sources:
        load_weights(model, list(sources), tokenizer=tokenizer, allow_missing=config.train.allow_missing)
    return model, build_prompter(config, tokenizer)


def fill(model: VideoLLaVASAMModel, checkpoint: Path, weights: str) -> None:
    """Put the trained parameters of a run checkpoint, or their averages, into ``model``."""
    content = load_run_checkpoint(checkpoint)
    tensors = content.ema_tensors if weights == "ema" else content.model_tensors
    if tensors is None:
        raise CheckpointError(explain("no averages were saved", str(checkpoint), fix="use --weights live"))
    fill_parameters(trainable_parameters(model), tensors)

"""Which sources a configuration's model starts from, in the order they are loaded."""

from __future__ import annotations

from pathlib import Path

from dual_loop.checkpoint.importer import brings_new_tokens, describe_checkpoint
from dual_loop.checkpoint.sources import has_weights
from dual_loop.config import Config
from dual_loop.model.build import TINY_WEIGHTS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


def weights_sources(config: Config) -> list[Path]:
    """Return the sources of weights, base models first; empty for a random start.

    ``--pretrained_pth`` (else what the config names) comes last and wins. ``--sam2_path`` and the weights in
    ``--model_path`` are put before it, unless it brings all parts by itself, as a full Sa2VA checkpoint does.

    Raises:
        CheckpointError: a path cannot be read.
    """
    last = _last_source(config)
    if last is not None and _is_whole(last):
        return [last]
    train = config.train
    base = [Path(train.model_path)] if train.model_path and has_weights(train.model_path) else []
    if train.sam2_path:
        base.append(Path(train.sam2_path))
    return [*base, *([last] if last is not None else [])]


def tokenizer_folder(config: Config) -> str | None:
    """Return the folder to read the tokenizer from: ``--model_path``, else a pretrained folder that has one."""
    path = config.train.pretrained_pth
    if config.train.model_path is None and path and any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        return path
    return config.train.model_path


def brings_embeddings(sources: list[Path], vocab_size: int) -> bool:
    """Tell whether the sources hold trained rows of the new tokens; else these rows have to train."""
    return bool(sources) and brings_new_tokens(sources, vocab_size)


def _last_source(config: Config) -> Path | None:
    if config.train.pretrained_pth:
        return Path(config.train.pretrained_pth)
    initial = config.model.initial_weights
    if initial is None:
        return None
    return TINY_WEIGHTS if initial == "tiny" else Path(initial)


def _is_whole(path: Path) -> bool:
    targets = {target for _, found in describe_checkpoint(path) for target in found}
    vision = any(target.startswith("mllm.model.vision_tower.") for target in targets)
    return vision and any(target.startswith("grounding_encoder.vision_encoder.") for target in targets)

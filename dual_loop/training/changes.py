"""What a resumed run is given other than it had: applied, refused or harmless, and always said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dual_loop.config import SETTINGS, Config, load_config
from dual_loop.config.words import EVALUATION, RUN_FOLDER
from dual_loop.errors import ConfigError, explain, shorten

WEIGHT_PATHS = ("train.pretrained_pth", "train.model_path", "train.sam2_path", "model.initial_weights")
"""The files may move; what is in them is compared by a hash."""

REFUSED = (
    *("model.lora_r", "model.lora_alpha", "model.use_rslora", "model.use_dora"),
    *("model.trainable", "model.train_embeddings", "model.tokenizer", "train.optimizer"),
    *("model.vision", "model.text", "model.sam2", "model.downsample_ratio", "model.text_hidden_dim"),
)
"""What a checkpoint's tensors mean; with another value they would be another model, or other moments."""

HARMLESS = (
    *("data.num_workers", "data.index_dir", "model.name", "model.gradient_checkpointing", "train.device"),
    *("train.num_threads", "train.rank_timeout", "train.allow_emulated_bf16", *WEIGHT_PATHS),
)
"""With what is in ``speed`` and what belongs to the run folder and to evaluation: no trained weight depends on it."""


def compare_with_run(config: Config, checkpoint: Path, weights: Sequence[str]) -> str:
    """Return a line for each kind of settings that differ from those of the run that wrote ``checkpoint``, if any do.

    Args:
        weights: fingerprints of what this start's frozen weights come from; empty where they are drawn.

    Raises:
        ConfigError: something differs that cannot.
    """
    folder = next((path for path in checkpoint.absolute().parents[:2] if (path / "config.json").is_file()), None)
    if folder is None:
        return ""
    old, new = load_config(folder / "config.json").to_dict(), config.to_dict()
    kinds: dict[str, list[str]] = {"refused": [], "applied": [], "harmless": []}
    for key, about in SETTINGS.items():
        group, name = key.split(".")
        before, now = old[group][name], new[group][name]
        if before == now or key in ("train.resume", "train.output_dir"):
            continue
        is_harmless = key in HARMLESS or group == "speed" or about.title in (RUN_FOLDER, EVALUATION)
        is_refused = key in REFUSED or (key == "train.seed" and not weights)  # the seed draws what is frozen
        kind = "refused" if is_refused else "harmless" if is_harmless else "applied"
        kinds[kind].append(f"{key}: {shorten(before)} -> {shorten(now)}")
    versions = folder / "versions.json"
    kept = json.loads(versions.read_text(encoding="utf-8")).get("weights") if versions.is_file() else None
    if kept is not None and kept != list(weights):
        kinds["refused"].append(f"frozen weights: {'; '.join(kept) or 'drawn'} -> {'; '.join(weights) or 'drawn'}")
    if kinds["refused"]:
        fix = "give the run's own values, or start another run from its weights (dual-loop export)"
        seen = "".join(f"\n  {change}" for change in kinds["refused"])
        raise ConfigError(explain("a run cannot go on with these settings", str(folder), seen, "the run's own", fix))
    lines = [f"  {kind}: {', '.join(changes)}" for kind, changes in kinds.items() if changes]
    return "\n".join([f"Settings that differ from those of {folder}:", *lines]) if lines else ""

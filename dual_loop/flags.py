"""The flags of training: a table of one row a flag, turned into argparse groups and dotted config keys.

Values stay strings here and are converted by the typed configuration, so that a wrong flag and a wrong key in a config
file are reported together, in one message. The default that ``--help`` shows is the configuration's own; a config file
given with ``--config`` may set another.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dual_loop.config import Config
from dual_loop.errors import ConfigError, explain

DEFAULT_CONFIG = "tiny_cpu"


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: as on the command line, without the dashes.
        key: dotted key of the configuration.
        unit: shown in place of the value: a unit or the kind of value.
        help: one line.
    """

    name: str
    key: str
    unit: str
    help: str


FLAGS: Mapping[str, tuple[Flag, ...]] = {
    "weights": (
        Flag("pretrained_pth", "train.pretrained_pth", "PATH", "pretrained weights; none: those the config names"),
        Flag("model_path", "train.model_path", "DIR", "base model: its tokenizer, and its weights where needed"),
        Flag("sam2_path", "train.sam2_path", "PATH", "SAM 2 weights under a checkpoint that lacks them"),
        Flag("allow_missing", "train.allow_missing", "PATTERNS", "names that may stay initial, comma-separated"),
        Flag("train_embeddings", "model.train_embeddings", "auto|none|new_tokens|all", "token embeddings that train"),
        Flag("lora_r", "model.lora_r", "RANK", "rank of LoRA"),
        Flag("lora_alpha", "model.lora_alpha", "NUMBER", "LoRA is scaled by alpha / rank"),
    ),
    "data (a folder left out leaves the source out)": (
        Flag("sav_dir", "data.sav_dir", "DIR", "SA-V: frame pairs (.npz) or videos (.mp4 with .json)"),
        Flag("sav_max_samples", "data.sav_max_samples", "PAIRS", "use only so many frame pairs"),
        Flag("sav_format", "data.sav_format", "auto|pairs|videos", "npz frame pairs, or mp4 with masklets as released"),
        Flag("sav_repeats", "data.sav_repeats", "TIMES", "times an epoch, fractions allowed"),
        Flag("sa1b_dir", "data.sa1b_dir", "DIR", "SA-1B images with their JSON files"),
        Flag("sa1b_max_samples", "data.sa1b_max_samples", "IMAGES", "use only so many image files"),
        Flag("openimage_dir", "data.openimage_dir", "DIR", "Open Images, root of the four paths below"),
        Flag("openimage_max_samples", "data.openimage_max_samples", "IMAGES", "use only so many images"),
        Flag("openimage_csv", "data.openimage_csv", "FILE", "object segmentation table, if elsewhere"),
        Flag("openimage_classes", "data.openimage_classes", "FILE", "class descriptions, if elsewhere"),
        Flag("openimage_images", "data.openimage_images", "DIR", "images, if elsewhere"),
        Flag("openimage_masks", "data.openimage_masks", "DIR", "masks, if elsewhere"),
        Flag("refcoco_dir", "data.refcoco_dir", "DIR", "folder with refcoco, refcoco+, refcocog"),
        Flag("refcoco_repeats", "data.refcoco_repeats", "TIMES", "times an epoch, fractions allowed"),
        Flag("refcoco_max_samples", "data.refcoco_max_samples", "IMAGES", "use only so many images"),
        Flag("refcoco_split", "data.refcoco_split", "NAME", "split to train on"),
        Flag("refcoco_images", "data.refcoco_images", "DIR", "COCO images, if elsewhere"),
        Flag("masks_dir", "data.masks_dir", "PATH", "your own masks: a folder, a COCO .json or a .jsonl file"),
        Flag("masks_images", "data.masks_images", "DIR", "images of your own masks, if elsewhere"),
        Flag("masks_max_samples", "data.masks_max_samples", "IMAGES", "use only so many images"),
        Flag("masks_repeats", "data.masks_repeats", "TIMES", "times an epoch, fractions allowed"),
        Flag("leakage_guard", "data.leakage_guard", "warn|drop|error|off", "training images held out in RefCOCO"),
        Flag("regions_per_image", "data.regions_per_image", "REGIONS", "most regions of an image in a step"),
        Flag("num_workers", "data.num_workers", "PROCESSES", "loader processes a rank; 0 loads in the main one"),
    ),
    "evaluation": (
        Flag("eval_dir", "data.eval_dir", "DIR", "held-out set (RefCOCO layout), measured before and after"),
        Flag("eval_max_samples", "data.eval_max_samples", "IMAGES", "use only so many held-out images"),
    ),
    "loop": (
        Flag("max_new_tokens", "loop.max_new_tokens", "TOKENS", "longest caption"),
        Flag("on_rejected", "loop.on_rejected", "fallback|drop|error", "what to do where a caption fails"),
    ),
    "captioner (what the loop teaches step 1)": (
        Flag("caption_gradient", "policy.caption_gradient", "auto|none|scst|grpo|gumbel|gumbel+..", "estimator"),
        Flag("captions_per_region", "policy.captions_per_region", "CAPTIONS", "sampled for each region (scst, grpo)"),
        Flag("policy_weight", "policy.weight", "NUMBER", "weight of the policy loss"),
        Flag("kl_weight", "policy.kl_weight", "NUMBER", "weight of the divergence from the adapter switched off"),
        Flag("policy_temperature", "policy.temperature", "NUMBER", "of the sampled captions"),
        Flag("reward_listener", "reward.listener", "own|average|frozen", "whose masks earn rewards"),
        Flag("cycle_reward_weight", "reward.cycle_weight", "NUMBER", "reward: IoU of mask' and mask"),
        Flag("contrast_reward_weight", "reward.contrast_weight", "NUMBER", "reward: own mask, not a neighbour's"),
        Flag("caption_reward_weight", "reward.caption_weight", "NUMBER", "reward: likeness to reference captions"),
        Flag("length_reward_weight", "reward.length_weight", "NUMBER", "reward: min_words..max_words words"),
        Flag("judge_url", "reward.judge_url", "URL", "OpenAI-compatible server that judges captions"),
        Flag("judge_failure", "reward.judge_failure", "skip|error", "what to do where the judge fails"),
    ),
    "segmenter (what else the loop teaches step 2)": (
        Flag("cycle_keep", "loop.cycle_keep", "IOU", "captions teach with full weight from this cycle IoU on"),
        Flag("cycle_drop", "loop.cycle_drop", "IOU", "captions up to this cycle IoU teach nothing"),
        Flag("distill_weight", "loss.distill_weight", "NUMBER", "distillation from the weight average"),
        Flag("align_weight", "loss.align_weight", "NUMBER", "[SEG] embedding to SAM 2's own prompt of the mask"),
        Flag("align_through", "loss.align_through", "all|projection", "what the alignment may change"),
        Flag("segment_form", "loop.segment_form", "branches|turns", "regions of an image: apart, or several [SEG]"),
    ),
    "training": (
        Flag("num_epochs", "train.num_epochs", "EPOCHS", "passes over the data"),
        Flag("max_steps", "train.max_steps", "STEPS", "optimiser steps; wins over --num_epochs"),
        Flag("batch_size", "train.batch_size", "IMAGES", "images of a micro-batch, a rank"),
        Flag("gradient_accumulation_steps", "train.gradient_accumulation_steps", "BATCHES", "micro-batches a step"),
        Flag("effective_batch", "train.effective_batch", "IMAGES", "of a step, all ranks; sets the accumulation"),
        Flag("learning_rate", "train.learning_rate", "RATE", "peak learning rate of AdamW"),
        Flag("weight_decay", "train.weight_decay", "NUMBER", "of AdamW, on matrices only"),
        Flag("max_grad_norm", "train.max_grad_norm", "NORM", "clip the gradient's norm; 0 is off"),
        Flag("ema_decay", "train.ema_decay", "FRACTION", "decay of the weight average, a step"),
        Flag("seed", "train.seed", "NUMBER", "decides everything random"),
        Flag("device", "train.device", "auto|cpu|cuda", "where to compute"),
        Flag("parallel", "train.parallel", "ddp|fsdp", "fsdp shards the language model over the ranks"),
        Flag("mixed_precision", "train.mixed_precision", "auto|no|bf16", "auto: bf16 for a bfloat16 model"),
    ),
    "run folder": (
        Flag("output_dir", "train.output_dir", "DIR", "run folder"),
        Flag("resume", "train.resume", "auto|DIR", "newest whole checkpoint of the run folder, or this one"),
        Flag("log_interval", "train.log_interval", "STEPS", "between two logged steps"),
        Flag("save_interval", "train.save_interval", "STEPS", "between two checkpoints"),
        Flag("keep_checkpoints", "train.keep_checkpoints", "NUMBER", "newest checkpoints that are kept"),
        Flag("audit_interval", "train.audit_interval", "STEPS", "between two audits (frozen listener, KL)"),
        Flag("panel_interval", "train.panel_interval", "STEPS", "between two sets of example panels"),
    ),
}


def all_flags() -> list[Flag]:
    """Return every row of the table, in the order of ``--help``."""
    return [flag for flags in FLAGS.values() for flag in flags]


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``, ``--cfg-options``, ``--dry_run`` and the table, in groups."""
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        metavar="FILE|NAME",
        help="a Python config, a name under configs/, or the config.json of a run (default: %(default)s)",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="any setting by its dotted key, e.g. model.gradient_checkpointing=True (flags win over these)",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="build without memory, print what trains, the memory estimate and the effective batch, and stop",
    )
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            text = f"{flag.help} (default: {_show(default_of(flag.key))})".replace("%", "%%")
            group.add_argument(f"--{flag.name}", dest=flag.name, default=None, metavar=flag.unit, help=text)


DATA_TITLES = ("data (a folder left out leaves the source out)", "evaluation")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add training's flags of data and ``--cfg-options``, for commands that read the same data."""
    group = parser.add_argument_group("data (the flags of training)")
    for flag in (flag for title in DATA_TITLES for flag in FLAGS[title]):
        group.add_argument(f"--{flag.name}", dest=flag.name, default=None, metavar=flag.unit, help=flag.help)
    text = "any setting by its dotted key (flags win over these)"
    group.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help=text)


def overrides_from(args: argparse.Namespace) -> dict[str, Any]:
    """Return dotted keys to values from parsed flags; a flag wins over ``--cfg-options``.

    Raises:
        ConfigError: an entry of ``--cfg-options`` is not of the form key=value.
    """
    overrides = parse_options(args.cfg_options)
    for flag in all_flags():
        value = getattr(args, flag.name, None)  # commands offer a part of the table
        if value is not None:
            overrides[flag.key] = value
    return overrides


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Turn ``["model.text.num_hidden_layers=2", ...]`` into dotted keys and values.

    Raises:
        ConfigError: entries without ``=`` or without a group, all of them named.
    """
    wrong = [option for option in options if "=" not in option or "." not in option.split("=", 1)[0]]
    if wrong:
        raise ConfigError(explain("malformed option", "--cfg-options", ", ".join(wrong), "group.key=value"))
    pairs = [option.split("=", 1) for option in options]
    return {key.strip(): _option_value(key, text.strip()) for key, text in pairs}


def default_of(key: str) -> Any:
    """Return the configuration's default of a dotted key."""
    value: Any = Config()
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _option_value(key: str, text: str) -> Any:
    """Keep what the typed configuration converts as text; read literals where it holds free mappings and lists."""
    if key.count(".") < 2 and not text.startswith(("{", "[", "(")):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return "none" if value is None else str(value)


def check_table() -> list[str]:
    """Return what is wrong with the table: keys that the configuration does not have, names given twice."""
    known = {
        f"{group.name}.{item.name}"
        for group in dataclasses.fields(Config)
        for item in dataclasses.fields(getattr(Config(), group.name))
    }
    problems = [f"{flag.name}: unknown key {flag.key}" for flag in all_flags() if flag.key not in known]
    names = [flag.name for flag in all_flags()]
    return problems + [f"{name}: given twice" for name in sorted({n for n in names if names.count(n) > 1})]

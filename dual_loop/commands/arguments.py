"""Arguments that several commands share, and what is said about the weights; nothing here needs torch."""

from __future__ import annotations

import argparse
from typing import Any

from dual_loop.config import add_data_flags, overrides_from

DATA_HELP = (
    "what to measure: refcoco:val, refcoco+:testA, refcocog:test (under --refcoco_dir or --eval_dir), "
    "sav, sa1b, openimages, masks (their folders), or a .parquet file of references"
)
REGIONS_PER_IMAGE = 16


def add_what_is_measured(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, ``--data`` and ``--max_samples``."""
    text = "run folder, checkpoint, or weights (default: the tiny checkpoint in the package)"
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help=text)
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME", help=DATA_HELP)
    parser.add_argument("--max_samples", type=int, metavar="IMAGES", help="take so many entries of each data set")


def add_model_and_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how the checkpoint is loaded, and training's flags of data."""
    model = parser.add_argument_group("model")
    model.add_argument("--weights", choices=("ema", "live"), default="ema", help="of a run: averaged or last")
    model.add_argument("--config", metavar="FILE|NAME", help="of weights that are no run (default: tiny_cpu)")
    model.add_argument("--model_path", metavar="DIR", help="base model: its tokenizer")
    model.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    add_data_flags(parser)


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the flags name; up to 16 regions of an image, unless a flag says otherwise."""
    settings = {"data.regions_per_image": REGIONS_PER_IMAGE, **overrides_from(args)}
    settings["train.device"] = args.device
    if args.model_path:
        settings["train.model_path"] = args.model_path
    return settings


def describe_origin(origin: dict[str, Any]) -> str:
    """Return which weights were measured, on one line."""
    if not origin:
        return "none (saved predictions)"
    parts = [origin["path"], *(origin[key] for key in ("checkpoint", "weights") if key in origin)]
    return " ".join([*parts, f"sha256 {origin['sha256'][:16]}" if "sha256" in origin else ""]).strip()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what names the model: checkpoint, weights, config, device."""
    group = parser.add_argument_group("model")
    text = "run folder, checkpoint, or weights (default: the tiny checkpoint in the package)"
    group.add_argument("--checkpoint", metavar="PATH", help=text)
    group.add_argument("--weights", choices=("ema", "live"), default="ema", help="of a run: averaged or last")
    group.add_argument("--config", metavar="FILE|NAME", help="of weights that are no run (default: tiny_cpu)")
    group.add_argument("--model_path", metavar="DIR", help="base model: its tokenizer, for weights without one")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.add_argument("--max_new_tokens", type=int, metavar="TOKENS", help="longest caption (default: the config's)")

"""``dual-loop evaluate CHECKPOINT --data refcoco:val``: referring segmentation, captioning and the loop, measured.

Started by torchrun it uses every rank: ``torchrun --nproc_per_node 2 -m dual_loop.cli evaluate ...``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dual_loop.commands.common import (
    DATA_HELP,
    data_description,
    default_output,
    open_measured,
    progress_bar,
    with_regions,
    write_json,
)
from dual_loop.config import load_config, resolve_config_path
from dual_loop.errors import ConfigError, DualLoopError, SampleError, explain
from dual_loop.evaluation import runner
from dual_loop.evaluation.figures import figures_of, markdown_table
from dual_loop.evaluation.protocol import CHOICES, PRESETS, choose_protocol
from dual_loop.evaluation.regions import Record, RegionMeter, compare_predictions
from dual_loop.flags import add_data_flags, overrides_from
from dual_loop.serve.loading import DEFAULT_CONFIG, load_trained
from dual_loop.training.devices import build_accelerator, end_processes
from dual_loop.training.run_folder import versions

TASKS = ("referring", "captioning", "loop")
REGIONS_PER_IMAGE = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for a problem that the user can mend."""
    args = _parser().parse_args(argv)
    try:
        return _from_predictions(args) if args.predictions else _with_model(args)
    except DualLoopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="dual-loop evaluate",
        usage="dual-loop evaluate [CHECKPOINT] [--data NAME ...] [flags below]",
        description="Measure a model: referring segmentation, region captioning, and the loop of both.",
        epilog="example: dual-loop evaluate outputs/run --data refcoco:val --refcoco_dir data/ref_seg",
    )
    text = "run folder, checkpoint, or weights (default: the tiny checkpoint in the package)"
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help=text)
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME", help=DATA_HELP)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all three")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="default: CHECKPOINT/evaluation")
    parser.add_argument("--max_samples", type=int, metavar="IMAGES", help="measure so many entries of each data set")
    text = "masks of an earlier evaluation (regions.jsonl) to be counted again; needs no model"
    parser.add_argument("--predictions", type=Path, metavar="FILE", help=text)
    protocol = parser.add_argument_group("protocol (printed in the result)")
    protocol.add_argument("--protocol", default="dual_loop", metavar="NAME", help=", ".join(PRESETS))
    for name, choices in CHOICES.items():
        protocol.add_argument(f"--{name}", metavar="|".join(choices) if len(choices) < 4 else "NAME", default=None)
    model = parser.add_argument_group("model")
    model.add_argument("--weights", choices=("ema", "live"), default="ema", help="of a run: averaged or last")
    model.add_argument("--config", metavar="FILE|NAME", help="of weights that are no run (default: tiny_cpu)")
    model.add_argument("--model_path", metavar="DIR", help="base model: its tokenizer")
    model.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    add_data_flags(parser)
    return parser


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the flags name, regions of an image among them."""
    settings = {"data.regions_per_image": REGIONS_PER_IMAGE, **overrides_from(args)}
    settings["train.device"] = args.device
    if args.model_path:
        settings["train.model_path"] = args.model_path
    return settings


def _with_model(args: argparse.Namespace) -> int:
    protocol = choose_protocol(args.protocol, {name: getattr(args, name) for name in CHOICES})
    loaded = load_trained(
        args.checkpoint, weights=args.weights, config=args.config, overrides=overrides_of(args), device=args.device
    )
    config, folder = loaded.config, args.output_dir or default_output(args.checkpoint, "evaluation")
    data = open_measured(args.data, config.data, limit=args.max_samples, polygons=protocol.polygons)
    accelerator = build_accelerator(config)
    header = {
        "checkpoint": loaded.origin,
        "data": data_description(data),
        "tasks": args.tasks,
        "protocol": protocol.to_dict(),
        "max_new_tokens": config.loop.max_new_tokens,
    }
    runner.start(folder, header, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    loaded.model.to(accelerator.device)
    meter = RegionMeter(loaded.model, loaded.prompter, config, protocol, args.tasks, loaded.autocast())
    rank, world_size = accelerator.process_index, accelerator.num_processes
    show = progress_bar(accelerator, "evaluate")
    runner.measure_chunks(folder, data, meter.measure, config.train.seed, rank, world_size, show)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        records, skipped = runner.join(folder, data)
        report(folder, {**header, "world_size": world_size}, records, skipped, args.tasks)
        runner.finish(folder)
    end_processes(accelerator)
    return 0


def _from_predictions(args: argparse.Namespace) -> int:
    protocol = choose_protocol(args.protocol, {name: getattr(args, name) for name in CHOICES})
    config = load_config(resolve_config_path(args.config or DEFAULT_CONFIG), overrides_of(args))
    config = with_regions(config, REGIONS_PER_IMAGE)
    data = open_measured(args.data, config.data, limit=args.max_samples, polygons=protocol.polygons)
    if not args.predictions.is_file():
        raise ConfigError(explain("no such file", "--predictions", str(args.predictions)))
    saved = {record["name"]: record for record in runner.read_regions(args.predictions)}
    records: dict[str, list[Record]] = {}
    skipped: list[dict[str, str]] = []
    seen: set[str] = set()
    for one in data:
        records[one.name] = []
        for index in range(len(one)):
            try:
                found = compare_predictions(one.load(index, config.train.seed), one.name, saved)
            except SampleError as error:
                entry = {"data": one.name, "entry": one.source.entry_id(index), "reason": error.reason}
                skipped.append({**entry, "message": str(error)})
                continue
            records[one.name] += found
            seen.update(record["name"] for record in found)
    unknown = sorted(set(saved) - seen)
    if unknown:
        print(f"{len(unknown)} of {len(saved)} predictions belong to no region here: {unknown[0]}", file=sys.stderr)
    folder = args.output_dir or Path("outputs/evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    header = {"predictions": str(args.predictions), "data": data_description(data), "protocol": protocol.to_dict()}
    report(folder, {**header, "tasks": ["referring"]}, records, skipped, ["referring"])
    return 0


def report(
    folder: Path,
    header: dict[str, Any],
    records: dict[str, list[Record]],
    skipped: list[dict[str, str]],
    tasks: Sequence[str],
) -> None:
    """Write ``evaluation.json`` and print the figures, the protocol and what was skipped."""
    figures = {name: figures_of(own, tasks) for name, own in records.items() if own}
    if not figures:
        reasons = skipped[0]["message"] if skipped else "the data sets are empty"
        raise ConfigError(explain("no region was measured", str(folder), reasons, fix="check --data and its folders"))
    write_json(folder / "evaluation.json", {**header, "versions": versions(), "skipped": skipped, "figures": figures})
    print(markdown_table(figures))
    protocol: dict[str, str] = header["protocol"]
    print("protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))
    print(f"weights: {describe_origin(header.get('checkpoint', {}))}")
    for entry in skipped:
        print(f"skipped {entry['data']}/{entry['entry']}: {entry['message']}", file=sys.stderr)
    print(f"{len(skipped)} entries skipped; written to {folder}")


def describe_origin(origin: dict[str, Any]) -> str:
    """Return which weights were measured, on one line."""
    if not origin:
        return "none (saved predictions)"
    parts = [origin["path"], *(origin[key] for key in ("checkpoint", "weights") if key in origin)]
    return " ".join([*parts, f"sha256 {origin['sha256'][:16]}" if "sha256" in origin else ""]).strip()

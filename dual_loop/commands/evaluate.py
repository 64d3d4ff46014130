"""``dual-loop evaluate CHECKPOINT --data refcoco:val``: referring segmentation, captioning and the loop, measured.

Started by torchrun it uses every rank: ``torchrun --nproc_per_node 2 -m dual_loop.cli evaluate ...``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dual_loop.commands.arguments import (
    add_model_and_data_arguments,
    add_what_is_measured,
    describe_origin,
    overrides_of,
)
from dual_loop.config import DEFAULT_CONFIG, load_config, resolve_config_path
from dual_loop.errors import ConfigError, DualLoopError, SampleError, explain
from dual_loop.evaluation.protocols import CHOICES, PRESETS, choose_protocol

if TYPE_CHECKING:
    from dual_loop.evaluation.regions import Record

TASKS = ("referring", "captioning", "loop")


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
    add_what_is_measured(parser)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all three")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="default: CHECKPOINT/evaluation")
    text = "masks of an earlier evaluation (regions.jsonl) to be counted again; needs no model"
    parser.add_argument("--predictions", type=Path, metavar="FILE", help=text)
    protocol = parser.add_argument_group("protocol (printed in the result)")
    protocol.add_argument("--protocol", default="dual_loop", metavar="NAME", help=", ".join(PRESETS))
    for name, choices in CHOICES.items():
        protocol.add_argument(f"--{name}", metavar="|".join(choices) if len(choices) < 4 else "NAME", default=None)
    add_model_and_data_arguments(parser)
    return parser


def _with_model(args: argparse.Namespace) -> int:
    from dual_loop.commands.common import measure

    protocol = choose_protocol(args.protocol, {name: getattr(args, name) for name in CHOICES})
    measured = measure(args, "evaluation", protocol, args.tasks)
    if measured is not None:
        report(measured.folder, measured.header, measured.records, measured.skipped, args.tasks)
        measured.finish()
    return 0


def _from_predictions(args: argparse.Namespace) -> int:
    from dual_loop.commands.common import data_description, open_measured
    from dual_loop.evaluation import runner
    from dual_loop.evaluation.regions import compare_predictions

    protocol = choose_protocol(args.protocol, {name: getattr(args, name) for name in CHOICES})
    config = load_config(resolve_config_path(args.config or DEFAULT_CONFIG), overrides_of(args))
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
                skipped.append(one.skipped(index, error))
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
    from dual_loop.evaluation.figures import figures_of, markdown_table
    from dual_loop.training.run_folder import versions, write_json

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

"""``dual-loop evaluate CHECKPOINT --data refcoco:val``: referring segmentation, captioning and the loop, measured.

Started by torchrun it uses every rank: ``torchrun --nproc_per_node 2 -m dual_loop.cli evaluate ...``.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dual_loop.commands import common
from dual_loop.config import DEFAULT_CONFIG, load_config, resolve_config_path
from dual_loop.data.names import is_video
from dual_loop.errors import ConfigError, SampleError, explain
from dual_loop.evaluation.protocols import CHOICES, PRESETS, Protocol, choose_protocol

if TYPE_CHECKING:
    from dual_loop.evaluation.measure import MeasuredRegion
    from dual_loop.evaluation.runner import MeasuredData, SkippedEntry
    from dual_loop.types import SkippedRegion

TASKS = ("referring", "captioning", "loop")
NO_TARGET = "no_target"
"""A further task: expressions of other images, which are to give an empty mask."""


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument(
        "--tasks", nargs="+", choices=(*TASKS, NO_TARGET), default=list(TASKS), help="default: the first three"
    )
    text = "masks of an earlier evaluation (regions.jsonl) to be counted again; needs no model"
    parser.add_argument("--predictions", type=Path, metavar="FILE", help=text)
    protocol = parser.add_argument_group("protocol (printed in the result)")
    protocol.add_argument("--protocol", default="dual_loop", metavar="NAME", help=", ".join(PRESETS))
    for name, choices in CHOICES.items():
        protocol.add_argument(f"--{name}", metavar="|".join(choices) if len(choices) < 4 else "NAME", default=None)
    text = "move masks back by the half cell that weights trained with data.target_pooling=nearest move them by"
    protocol.add_argument("--undo_target_shift", action="store_true", help=text)
    text = "first frames of a video that the language model reads, and on which it prompts SAM 2"
    protocol.add_argument("--frames", type=int, choices=range(1, 65), metavar="N", default=5, help=text)
    common.add_measuring_arguments(parser, "evaluation")


def _evaluate(args: argparse.Namespace) -> int:
    """Write ``evaluation.json`` and print the figures, the protocol and what was skipped."""
    protocol = choose_protocol(args.protocol, {name: getattr(args, name) for name in (*CHOICES, "undo_target_shift")})
    tasks = ["referring"] if args.predictions else args.tasks
    videos = [name for name in args.data if is_video(name)]
    if videos and (len(videos) < len(args.data) or args.predictions or args.listener or args.tasks != list(TASKS)):
        what, fix = "videos are measured alone", "give no other --data, no --predictions, --listener or --tasks"
        raise ConfigError(explain(what, "--data", " ".join(args.data), fix=fix))
    if videos:
        tasks, protocol = ["video"], protocol.of_video(args.frames)
    if args.predictions:
        measured = _count_again(args, protocol)
    else:
        found = common.measure(args, "evaluation", protocol, tasks)
        if found is None:
            return 0
        measured = found
    from dual_loop.evaluation.clip_meter import SUBMISSION
    from dual_loop.evaluation.figures import markdown_table

    figures, submissions = measured.figures(tasks), _write_submissions(measured, tasks)
    document = measured.finish("evaluation.json", {"figures": figures, **submissions})
    if args.json:
        print(document)
        return 0
    print(markdown_table(figures))
    print("protocol: " + ", ".join(f"{key} {value}" for key, value in measured.protocol.to_dict().items()))
    for one in measured.data:
        if protocol_of_set := getattr(one.source, "protocol", ""):
            print(f"{one.name}: {protocol_of_set}")
    for name, written in submissions.get("submissions", {}).items():
        print(f"{name}: {written['captions']} captions in {written['file']} for {written['judge']}")
        print("  The judge is not run here: it needs a language model.")
    if any("video" in own and not own["video"]["scored"] for own in figures.values()):  # type: ignore[call-overload,index]
        print(f"masks that are not public are to be sent in: {measured.folder / SUBMISSION}/VIDEO/EXPRESSION/FRAME.png")
    print(f"weights: {measured.weights}")
    print(f"{len(measured.skipped)} entries or regions skipped; written to {measured.folder}")
    return 0


def _write_submissions(measured: common.Measured, tasks: Sequence[str]) -> dict[str, dict[str, dict[str, object]]]:
    """Write what the judges of evaluation sets read, a JSON of captions by region each, and say where and for whom."""
    from dual_loop.training.run_folder import write_json

    found: dict[str, dict[str, object]] = {}
    for one in measured.data if {"captioning", "loop"} & set(tasks) else ():
        if judge := getattr(one.source, "judge", ""):
            captions = {region.name.rpartition("#")[2]: region.caption for region in measured.regions[one.name]}
            write_json(measured.folder / f"{one.name}.json", captions)
            found[one.name] = {"file": str(measured.folder / f"{one.name}.json"), "captions": len(captions)}
            found[one.name]["judge"] = judge
    return {"submissions": found} if found else {}


def _count_again(args: argparse.Namespace, protocol: Protocol) -> common.Measured:
    """Compare saved masks with the data."""
    from dual_loop.evaluation.measure import compare_predictions
    from dual_loop.evaluation.runner import read_predictions

    config = load_config(resolve_config_path(args.config or DEFAULT_CONFIG), common.overrides_of(args))
    data = common.open_measured(args.data, config.data, limit=args.max_samples, polygons=protocol.polygons)
    if not args.predictions.is_file():
        raise ConfigError(explain("no such file", "--predictions", str(args.predictions)))
    folder = args.output_dir or Path("outputs/evaluation")
    if (folder / "evaluation.json").exists() and not args.overwrite:
        fix = "choose another --output_dir, or replace what is there by --overwrite"
        raise ConfigError(explain("the folder holds a finished evaluation", str(folder), "evaluation.json", fix=fix))
    saved = read_predictions(args.predictions)
    regions: dict[str, list[MeasuredRegion]] = {one.name: [] for one in data}
    skipped: list[SkippedEntry] = []
    faults: list[SkippedRegion] = []
    for one in data:
        for index in range(len(one)):
            try:
                sample = one.load(index, config.train.seed)
                regions[one.name] += compare_predictions(sample, one.name, saved, faults)
                skipped += [one.skipped(index, region) for region in sample.passed_over]
            except SampleError as error:
                skipped.append(one.skipped(index, error))
    _check_names(saved, data, regions, skipped)
    counts = Counter(fault.reason for fault in faults)
    if faults:
        seen = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        print(f"{len(faults)} masks count as misses: {seen}; the first: {faults[0].message}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    header = {
        "predictions": str(args.predictions),
        "data": [one.description() for one in data],
        "protocol": protocol.to_dict(),
        "tasks": ["referring"],
        "masks_that_miss": dict(counts),
    }
    return common.Measured(folder, header, protocol, "none (saved predictions)", data, config, regions, skipped)


def _check_names(
    saved: Iterable[str],
    data: Sequence[MeasuredData],
    regions: Mapping[str, Sequence[MeasuredRegion]],
    skipped: Sequence[SkippedEntry],
) -> None:
    """Refuse predictions of no region; those of entries behind ``--max_samples`` and of skipped ones are left out.

    Raises:
        ConfigError: names the nearest regions.
    """
    known = {region.name for own in regions.values() for region in own}
    not_read = {f"{one.source.name}/{one.source.entry_id(k)}" for one in data for k in range(len(one), len(one.source))}
    not_read |= {f"{one.source.name}/{entry['entry'].split('#')[0]}" for one in data for entry in skipped}
    unknown = [name for name in saved if name not in known and name.rpartition("#")[0] not in not_read]
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(known), n=3, cutoff=0.0)
        seen = f"{len(unknown)} names, the first: {unknown[0]}"
        fix = "name them as the data set does, or give the data set that they are of"
        raise ConfigError(explain("predictions belong to no region", "--predictions", seen, ", ".join(near), fix))


main = common.Command(
    "evaluate",
    "Measure a model: referring segmentation, region captioning, and the loop of both.",
    _add_arguments,
    _evaluate,
    usage="[CHECKPOINT] [--data NAME ...] [flags below]",
    example="dual-loop evaluate outputs/run --data refcoco:val --refcoco_dir data/ref_seg",
)

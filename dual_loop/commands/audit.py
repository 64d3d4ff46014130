"""``dual-loop audit CHECKPOINT --data sa1b``: the loop over a mask set without training, a page, pseudo-labels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dual_loop.commands.arguments import add_model_and_data_arguments, add_what_is_measured, describe_origin
from dual_loop.config import GATES
from dual_loop.errors import ConfigError, DualLoopError, explain
from dual_loop.evaluation.protocols import PRESETS
from dual_loop.loop.gates import CaptionGates

if TYPE_CHECKING:
    from dual_loop.commands.common import Measured
    from dual_loop.evaluation.pseudo_labels import Thresholds
    from dual_loop.evaluation.regions import Record

TASKS = ("captioning", "loop")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for a problem that the user can mend."""
    args = _parser().parse_args(argv)
    try:
        return _audit(args)
    except DualLoopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="dual-loop audit",
        usage="dual-loop audit [CHECKPOINT] [--data NAME ...] [--labels DIR] [flags below]",
        description="Caption every mask, segment every caption, and rank what came back.",
        epilog="example: dual-loop audit outputs/run --data sa1b --sa1b_dir data/sa1b --labels outputs/labels",
    )
    add_what_is_measured(parser)
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="default: CHECKPOINT/audit")
    parser.add_argument("--examples", type=int, default=24, metavar="NUMBER", help="pictures of each kind (24)")
    labels = parser.add_argument_group("pseudo-labels")
    labels.add_argument("--labels", type=Path, metavar="DIR", help="write what passes as a captioned data set there")
    labels.add_argument("--min_iou", type=float, default=0.7, metavar="IOU", help="least cycle IoU (0.7)")
    labels.add_argument("--min_uniqueness", type=float, default=0.1, metavar="IOU", help="least margin (0.1)")
    labels.add_argument("--keep_repeated", action="store_true", help="keep captions that two regions share")
    labels.add_argument("--copy_images", action="store_true", help="copy the images instead of linking to them")
    add_model_and_data_arguments(parser)
    return parser


def _audit(args: argparse.Namespace) -> int:
    from dual_loop.commands.common import measure
    from dual_loop.evaluation.pseudo_labels import Thresholds

    thresholds = Thresholds(args.min_iou, args.min_uniqueness, args.keep_repeated)
    if args.labels is not None and args.labels.exists() and any(args.labels.iterdir()):
        seen = "not empty"
        raise ConfigError(explain("pseudo-labels need a new folder", str(args.labels), seen, fix="choose another"))
    measured = measure(args, "audit", PRESETS["dual_loop"], TASKS)
    if measured is not None:
        _finish(args, measured, thresholds)
    return 0


def _finish(args: argparse.Namespace, measured: Measured, thresholds: Thresholds) -> None:
    """Choose, write and show; on rank 0."""
    from dual_loop.evaluation.audit_page import audit_page
    from dual_loop.evaluation.figures import figures_of
    from dual_loop.evaluation.pseudo_labels import LABELS, choose_labels, write_labels
    from dual_loop.model.prompts import prompt_texts
    from dual_loop.training.run_folder import versions, write_json

    folder, data, loaded = measured.folder, measured.data, measured.loaded
    records, skipped = measured.records, measured.skipped
    everything = [record for own in records.values() for record in own]
    if not everything:
        seen = skipped[0]["message"] if skipped else "the data sets are empty"
        raise ConfigError(explain("no region was audited", str(folder), seen, fix="check --data and its folders"))
    gates = CaptionGates(GATES, prompt_texts())
    chosen = {
        name: choose_labels(own, thresholds, lambda text: gates.check(text, False, loaded.prompter.unreadable(text)))
        for name, own in records.items()
    }
    kept = {name: found for name, (found, _) in chosen.items()}
    left_out: dict[str, int] = {}
    for _, reasons in chosen.values():
        for reason, count in reasons.items():
            left_out[reason] = left_out.get(reason, 0) + count
    figures = {name: figures_of(own, TASKS) for name, own in records.items() if own}
    by_name = {one.name: one for one in data}
    seed = loaded.config.train.seed
    page = audit_page(
        everything,
        lambda record: by_name[record["data"]].load(record["entry"], seed),
        lead=f"{', '.join(by_name)}; weights: {describe_origin(loaded.origin)}",
        figures=figures,
        kept=sum(len(own) for own in kept.values()),
        left_out=left_out,
        skipped=skipped,
        examples=args.examples,
    )
    (folder / "audit.html").write_text(page, encoding="utf-8")
    limits = {"min_iou": thresholds.min_iou, "min_uniqueness": thresholds.min_uniqueness}
    summary = {**measured.header, "versions": versions(), "thresholds": limits, "figures": figures}
    write_json(folder / "audit.json", {**summary, "left_out": left_out, "skipped": skipped})
    if args.labels is not None:
        count = write_labels(args.labels, data, kept, seed, args.copy_images)
        print(f"{count:,} pseudo-labels in {args.labels / LABELS}; train on them with --masks_dir {args.labels}")
    _print(everything, kept, left_out, skipped, folder)
    measured.finish()


def _print(
    everything: list[Record],
    kept: dict[str, list[Record]],
    left_out: dict[str, int],
    skipped: list[dict[str, str]],
    folder: Path,
) -> None:
    count = sum(len(own) for own in kept.values())
    print(f"{len(everything):,} regions, {count:,} captions pass; {len(skipped)} entries skipped")
    print("left out: " + (", ".join(f"{reason} {number}" for reason, number in left_out.items()) or "none"))
    for entry in skipped:
        print(f"skipped {entry['data']}/{entry['entry']}: {entry['message']}", file=sys.stderr)
    print(f"page: {folder / 'audit.html'}")

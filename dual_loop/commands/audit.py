"""``dual-loop audit CHECKPOINT --data sa1b``: the loop over a mask set without training, a page, pseudo-labels."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dual_loop.commands import common
from dual_loop.config import GATES
from dual_loop.errors import ConfigError, explain
from dual_loop.evaluation.protocols import PRESETS
from dual_loop.loop.gates import CaptionGates

TASKS = ("captioning", "loop")


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    common.add_what_is_measured(parser)
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="default: CHECKPOINT/audit")
    parser.add_argument("--examples", type=int, default=24, metavar="NUMBER", help="pictures of each kind (24)")
    labels = parser.add_argument_group("pseudo-labels")
    labels.add_argument("--labels", type=Path, metavar="DIR", help="write what passes as a captioned data set there")
    labels.add_argument("--min_iou", type=float, default=0.7, metavar="IOU", help="least cycle IoU (0.7)")
    labels.add_argument("--min_uniqueness", type=float, default=0.1, metavar="IOU", help="least margin (0.1)")
    labels.add_argument("--keep_repeated", action="store_true", help="keep captions that two regions share")
    labels.add_argument("--copy_images", action="store_true", help="copy the images instead of linking to them")
    common.add_model_and_data_arguments(parser)


def _audit(args: argparse.Namespace) -> int:
    if args.labels is not None and args.labels.exists() and any(args.labels.iterdir()):
        seen = "not empty"
        raise ConfigError(explain("pseudo-labels need a new folder", str(args.labels), seen, fix="choose another"))
    measured = common.measure(args, "audit", PRESETS["dual_loop"], TASKS)
    if measured is not None:
        _finish(args, measured)
        measured.finish()
    return 0


def _finish(args: argparse.Namespace, measured: common.Measured) -> None:
    """Choose, write and show; on rank 0."""
    from dual_loop.evaluation.audit_page import audit_page
    from dual_loop.evaluation.figures import figures_of
    from dual_loop.evaluation.pseudo_labels import LABELS, choose_labels, write_labels
    from dual_loop.model.prompts import prompt_texts
    from dual_loop.training.run_folder import versions, write_json

    folder, config, skipped = measured.folder, measured.config, measured.skipped
    regions = [region for own in measured.regions.values() for region in own]
    if not regions:
        raise common.nothing_was("audited", folder, skipped)
    gates = CaptionGates(GATES, prompt_texts())
    kept, left_out = {}, Counter[str]()
    for name, own in measured.regions.items():
        kept[name], reasons = choose_labels(
            own,
            lambda text: gates.check(text, truncated=False, unreadable=None),  # else it was rejected
            min_iou=args.min_iou,
            min_uniqueness=args.min_uniqueness,
            keep_repeated=args.keep_repeated,
        )
        left_out += reasons
    count = sum(len(own) for own in kept.values())
    figures = {name: figures_of(own, TASKS) for name, own in measured.regions.items() if own}
    by_name, seed = {one.name: one for one in measured.data}, config.train.seed
    page = audit_page(
        regions,
        lambda region: by_name[region.data].load(region.entry, seed),
        lead=f"{', '.join(by_name)}; weights: {measured.weights}",
        figures=figures,
        kept=count,
        left_out=left_out,
        skipped=skipped,
        examples=args.examples,
    )
    (folder / "audit.html").write_text(page, encoding="utf-8")
    limits = {"min_iou": args.min_iou, "min_uniqueness": args.min_uniqueness}
    summary = {**measured.header, "versions": versions(), "thresholds": limits, "figures": figures}
    by_reason = dict(sorted(left_out.items()))
    write_json(folder / "audit.json", {**summary, "left_out": by_reason, "skipped": skipped})
    if args.labels is not None:
        write_labels(args.labels, measured.data, kept, seed, args.copy_images)
        print(f"{count:,} pseudo-labels in {args.labels / LABELS}; train on them with --masks_dir {args.labels}")
    print(f"{len(regions):,} regions, {count:,} captions pass; {len(skipped)} entries skipped")
    print("left out: " + (", ".join(f"{reason} {number}" for reason, number in by_reason.items()) or "none"))
    for entry in skipped:
        print(f"skipped {entry['data']}/{entry['entry']}: {entry['message']}", file=sys.stderr)
    print(f"page: {folder / 'audit.html'}")


main = common.Command(
    "audit",
    "Caption every mask, segment every caption, and rank what came back.",
    _add_arguments,
    _audit,
    usage="[CHECKPOINT] [--data NAME ...] [--labels DIR] [flags below]",
    example="dual-loop audit outputs/run --data sa1b --sa1b_dir data/sa1b --labels outputs/labels",
)

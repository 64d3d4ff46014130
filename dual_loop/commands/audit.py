"""``dual-loop audit CHECKPOINT --data sa1b``: the loop over a mask set without training, a page, pseudo-labels."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dual_loop.commands import common
from dual_loop.config import GATES
from dual_loop.data.names import is_video
from dual_loop.errors import ConfigError, explain
from dual_loop.evaluation.protocols import PRESETS
from dual_loop.loop.gates import CaptionGates

TASKS = ("captioning", "loop")


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("--examples", type=int, default=24, metavar="NUMBER", help="pictures of each kind (24)")
    labels = parser.add_argument_group("pseudo-labels")
    labels.add_argument("--labels", type=Path, metavar="DIR", help="write what passes as a captioned data set there")
    labels.add_argument("--min_iou", type=float, default=0.7, metavar="IOU", help="least cycle IoU (0.7)")
    labels.add_argument("--min_uniqueness", type=float, default=0.1, metavar="IOU", help="least margin (0.1)")
    text = "least likelihood of a caption, a token's to the model and --listener (0: none is left out)"
    labels.add_argument("--likelihood_floor", type=float, default=0.0, metavar="SHARE", help=text)
    text = "samples of each region; the one that --listener finds likeliest replaces the greedy caption (0)"
    labels.add_argument("--best_of", type=int, default=0, metavar="NUMBER", help=text)
    text = "by so much must --listener find it likelier than the greedy caption (0.1)"
    labels.add_argument("--margin", type=float, default=0.1, metavar="NATS", help=text)
    labels.add_argument("--keep_repeated", action="store_true", help="keep captions that two regions share")
    labels.add_argument("--copy_images", action="store_true", help="copy the images instead of linking to them")
    common.add_measuring_arguments(parser, "audit")


def _audit(args: argparse.Namespace) -> int:
    if args.labels is not None and args.labels.exists() and any(args.labels.iterdir()):
        seen = "not empty"
        raise ConfigError(explain("pseudo-labels need a new folder", str(args.labels), seen, fix="choose another"))
    if args.best_of > 0 and args.listener is None:
        what, seen = "captions are chosen by a listener that was trained apart", f"{args.best_of}, and no --listener"
        raise ConfigError(explain(what, "--best_of", seen, fix="give --listener, or leave --best_of out"))
    if videos := [name for name in args.data if is_video(name)]:
        fix = "give images; `evaluate` measures videos"
        raise ConfigError(explain("captions of videos are not audited", "--data", " ".join(videos), fix=fix))
    from dual_loop.evaluation.measure import BestOf

    best_of = BestOf(args.best_of, args.margin, args.likelihood_floor)
    measured = common.measure(args, "audit", PRESETS["dual_loop"], TASKS, best_of)
    if measured is not None:
        _finish(args, measured)
    return 0


def _finish(args: argparse.Namespace, measured: common.Measured) -> None:
    """Choose, write and show; on rank 0."""
    from dual_loop.evaluation.audit_page import audit_page
    from dual_loop.evaluation.pseudo_labels import LABELS, choose_labels, write_labels
    from dual_loop.model.prompts import prompt_texts

    figures, skipped, path = measured.figures(TASKS), measured.skipped, measured.folder / "audit.html"
    regions = [region for own in measured.regions.values() for region in own]
    gates = CaptionGates(GATES, prompt_texts())
    kept, left_out = {}, Counter[str]()
    for name, own in measured.regions.items():
        kept[name], reasons = choose_labels(
            own,
            lambda text: gates.check(text, truncated=False, unreadable=None),  # else it was rejected
            min_iou=args.min_iou,
            min_uniqueness=args.min_uniqueness,
            min_trust=args.likelihood_floor,
            keep_repeated=args.keep_repeated,
        )
        left_out += reasons
    count = sum(len(own) for own in kept.values())
    by_name, seed = {one.name: one for one in measured.data}, measured.config.train.seed
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
    path.write_text(page, encoding="utf-8")
    if args.labels is not None:
        write_labels(args.labels, measured.data, kept, seed, args.copy_images)
    names = ("min_iou", "min_uniqueness", "likelihood_floor", "best_of", "margin")
    limits, replaced = {name: getattr(args, name) for name in names}, sum(one.greedy is not None for one in regions)
    by_reason = dict(sorted(left_out.items()))
    result = {"thresholds": limits, "figures": figures, "replaced": replaced, "left_out": by_reason}
    document = measured.finish("audit.json", result)
    if args.json:
        print(document)
        return
    if args.labels is not None:
        print(f"{count:,} pseudo-labels in {args.labels / LABELS}; train on them with --masks_dir {args.labels}")
    if args.best_of:
        print(f"{replaced:,} greedy captions replaced by one of {args.best_of} samples")
    print(f"{len(regions):,} regions, {count:,} captions pass; {len(skipped)} entries skipped")
    print("left out: " + (", ".join(f"{reason} {number}" for reason, number in by_reason.items()) or "none"))
    print(f"page: {path}")


main = common.Command(
    "audit",
    "Caption every mask, segment every caption, and rank what came back.",
    _add_arguments,
    _audit,
    usage="[CHECKPOINT] [--data NAME ...] [--labels DIR] [flags below]",
    example="dual-loop audit outputs/run --data sa1b --sa1b_dir data/sa1b --labels outputs/labels",
)

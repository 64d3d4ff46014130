"""``dual-loop audit CHECKPOINT --data sa1b``: the loop over a mask set without training, a page, pseudo-labels."""

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
    write_json,
)
from dual_loop.commands.evaluate import describe_origin, overrides_of
from dual_loop.errors import ConfigError, DualLoopError, explain
from dual_loop.evaluation import runner
from dual_loop.evaluation.audit_page import audit_page
from dual_loop.evaluation.figures import figures_of
from dual_loop.evaluation.protocol import PRESETS
from dual_loop.evaluation.pseudo_labels import LABELS, Thresholds, choose_labels, write_labels
from dual_loop.evaluation.regions import Record, RegionMeter
from dual_loop.flags import add_data_flags
from dual_loop.loop.captioner import prompt_texts
from dual_loop.loop.gates import CaptionGates
from dual_loop.serve.loading import LoadedModel, load_trained
from dual_loop.settings import GATES
from dual_loop.training.devices import build_accelerator, end_processes
from dual_loop.training.run_folder import versions

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
    text = "run folder, checkpoint, or weights (default: the tiny checkpoint in the package)"
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help=text)
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME", help=DATA_HELP)
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="default: CHECKPOINT/audit")
    parser.add_argument("--max_samples", type=int, metavar="IMAGES", help="audit so many entries of each data set")
    parser.add_argument("--examples", type=int, default=24, metavar="NUMBER", help="pictures of each kind (24)")
    labels = parser.add_argument_group("pseudo-labels")
    labels.add_argument("--labels", type=Path, metavar="DIR", help="write what passes as a captioned data set there")
    labels.add_argument("--min_iou", type=float, default=0.7, metavar="IOU", help="least cycle IoU (0.7)")
    labels.add_argument("--min_uniqueness", type=float, default=0.1, metavar="IOU", help="least margin (0.1)")
    labels.add_argument("--keep_repeated", action="store_true", help="keep captions that two regions share")
    labels.add_argument("--copy_images", action="store_true", help="copy the images instead of linking to them")
    model = parser.add_argument_group("model")
    model.add_argument("--weights", choices=("ema", "live"), default="ema", help="of a run: averaged or last")
    model.add_argument("--config", metavar="FILE|NAME", help="of weights that are no run (default: tiny_cpu)")
    model.add_argument("--model_path", metavar="DIR", help="base model: its tokenizer")
    model.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    add_data_flags(parser)
    return parser


def _audit(args: argparse.Namespace) -> int:
    thresholds = Thresholds(args.min_iou, args.min_uniqueness, args.keep_repeated)
    if args.labels is not None and args.labels.exists() and any(args.labels.iterdir()):
        seen = "not empty"
        raise ConfigError(explain("pseudo-labels need a new folder", str(args.labels), seen, fix="choose another"))
    settings = overrides_of(args)
    loaded = load_trained(
        args.checkpoint, weights=args.weights, config=args.config, overrides=settings, device=args.device
    )
    config, folder = loaded.config, args.output_dir or default_output(args.checkpoint, "audit")
    data = open_measured(args.data, config.data, limit=args.max_samples)
    accelerator = build_accelerator(config)
    header = {"checkpoint": loaded.origin, "data": data_description(data), "tasks": list(TASKS)}
    runner.start(folder, header, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    loaded.model.to(accelerator.device)
    meter = RegionMeter(loaded.model, loaded.prompter, config, PRESETS["dual_loop"], TASKS, loaded.autocast())
    rank, world_size = accelerator.process_index, accelerator.num_processes
    show = progress_bar(accelerator, "audit")
    runner.measure_chunks(folder, data, meter.measure, config.train.seed, rank, world_size, show)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(args, folder, header, data, thresholds, loaded)
    end_processes(accelerator)
    return 0


def _finish(
    args: argparse.Namespace,
    folder: Path,
    header: dict[str, Any],
    data: list[runner.MeasuredData],
    thresholds: Thresholds,
    loaded: LoadedModel,
) -> None:
    """Choose, write and show; on rank 0."""
    records, skipped = runner.join(folder, data)
    everything = [record for own in records.values() for record in own]
    if not everything:
        seen = skipped[0]["message"] if skipped else "the data sets are empty"
        raise ConfigError(explain("no region was audited", str(folder), seen, fix="check --data and its folders"))
    gates = CaptionGates(GATES, loaded.prompter.find_marker, prompt_texts())
    chosen = {
        name: choose_labels(own, thresholds, lambda text: gates.check(text, False)) for name, own in records.items()
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
    summary = {**header, "versions": versions(), "thresholds": limits, "figures": figures}
    write_json(folder / "audit.json", {**summary, "left_out": left_out, "skipped": skipped})
    if args.labels is not None:
        count = write_labels(args.labels, data, kept, seed, args.copy_images)
        print(f"{count:,} pseudo-labels in {args.labels / LABELS}; train on them with --masks_dir {args.labels}")
    _print(everything, kept, left_out, skipped, folder)
    runner.finish(folder)


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

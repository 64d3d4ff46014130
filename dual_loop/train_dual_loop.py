"""The training entry: flags and config -> checks -> model, data, trainer -> fit -> summary.

Run by ``python -m dual_loop.train_dual_loop``, ``torchrun -m dual_loop.train_dual_loop`` or ``dual-loop train``.
Exit status: 0 done (also after a signal, once the state is saved), 2 a problem the user can mend, 1 a bug, 75 under an
elastic launcher where another machine left and the run is to go on without it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the imports below, so that --help answers without torch
    from dual_loop.commands.train import main

    sys.exit(main())

from dual_loop.checkpoint.store import capture_rng, restore_rng
from dual_loop.commands.train import main as main
from dual_loop.config import Config
from dual_loop.config import load_config as load_config
from dual_loop.config import resolve_config_path as resolve_config_path
from dual_loop.data.dataset_builder import SETTING_PREFIX, has_root
from dual_loop.data.masks import decode_rle
from dual_loop.errors import ConfigError, explain
from dual_loop.evaluation.cheating_flags import find_flags
from dual_loop.evaluation.figures import summarise
from dual_loop.evaluation.measure import Listener, MeasuredRegion, RegionMeter, evaluate_samples, held_out_source
from dual_loop.evaluation.protocols import PRESETS
from dual_loop.iteration import evenly_spread
from dual_loop.metrics import paired_bootstrap
from dual_loop.model.ema import weights
from dual_loop.preflight.machine import require_ready
from dual_loop.training.checks import gather_objects
from dual_loop.training.devices import end_processes
from dual_loop.training.dry_run import dry_run as dry_run
from dual_loop.training.panels import Panel, save_named_panels
from dual_loop.training.setup import Placed, Start, build, load, open_data, place, start, wire
from dual_loop.training.trainer import FitResult, Trainer

TO_BE_CONTINUED = 75
"""Exit status, EX_TEMPFAIL of sysexits.h."""

FIGURES = ("gIoU", "cIoU", "cycle_gIoU", "caption_exact")
EXAMPLES = 6
"""Held-out regions that are drawn before and after."""
MORE_FIGURES = (
    *("cycle_gIoU_frozen", "uniqueness", "uniqueness_frozen"),
    *("caption_words", "vocabulary", "distinct_1", "distinct_2"),
)


def exit_status(result: FitResult) -> int:
    """Return 0, or ``TO_BE_CONTINUED`` where an elastic launcher (``--max_restarts``) should start this rank again.

    That is so where the run stopped for a signal that only other ranks got: their machine leaves, this one stays.
    """
    is_elastic = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    return TO_BE_CONTINUED if is_elastic and result.stopped_by is not None and not result.is_own_signal else 0


def train(config: Config) -> FitResult:
    """Build everything, train, and write the run folder.

    Raises:
        DualLoopError: anything that the user can mend; the message says how.
    """
    check_paths(config)
    warned = require_ready(config)
    run = start(config)
    for warning in warned:
        run.report(f"{warning}")
    built = build(run)
    loaded = load(run, built)
    stream = open_data(run)
    placed = place(run, loaded)
    ready = wire(run, placed, stream)
    trainer, folder = ready.trainer, run.folder
    evaluator = Evaluator(run, placed, partial(weights, ready.task.starting))
    before = evaluator.before(trainer.progress.step)
    result = trainer.fit()
    after = evaluator.after(trainer) if result.stopped_by is None else None
    summary = {**trainer.summary(), "checkpointing": asdict(ready.layers), **evaluation_summary(before, after)}
    folder.write_summary(summary)
    run.report(closing_line(result, summary, folder.path))
    end_processes(run.accelerator)
    return result


def check_paths(config: Config) -> None:
    """Look for every path of the configuration before anything is built.

    Raises:
        ConfigError: a path is missing, or no data set is given; all problems are listed.
    """
    sources = {name: getattr(config.data, f"{prefix}_dir") for name, prefix in SETTING_PREFIX.items()}
    problems = []
    if not any(sources.values()):
        flags = ", ".join(f"--{prefix}_dir" for prefix in SETTING_PREFIX.values())
        problems.append(f"no data set is given: set at least one of {flags}")
    for name, path in sources.items():
        if path and not has_root(name, path):
            problems.append(f"data.{SETTING_PREFIX[name]}_dir: no such folder: {path}")
    folders = {"data.eval_dir": config.data.eval_dir, "train.model_path": config.train.model_path}
    problems += [f"{key}: no such folder: {path}" for key, path in folders.items() if path and not Path(path).is_dir()]
    for key, file in (("pretrained_pth", config.train.pretrained_pth), ("sam2_path", config.train.sam2_path)):
        if file and not Path(file).exists():
            problems.append(f"train.{key}: no such file: {file}")
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problem(s) with paths:\n{listing}")


class Evaluator:
    """Measures the held-out set before and after training, spread over the ranks."""

    def __init__(self, run: Start, placed: Placed, frozen_listener: Listener) -> None:
        self.config, self.accelerator, self.folder, self.report = run.config, run.accelerator, run.folder, run.report
        self.model, self.prompter, self.frozen_listener = placed.model, placed.prompter, frozen_listener
        self.pace: AbstractContextManager[Any] = placed.pace or nullcontext()

    def before(self, step: int) -> list[MeasuredRegion] | None:
        """Measure the starting weights; a resumed run takes what its first start measured."""
        if self.config.data.eval_dir is None:
            return None
        if step == 0:
            # Both listeners are the same weights here.
            return self._measure("before", None)
        kept = self.folder.read_evaluation("before")
        # Only the files of rank 0 count: another machine may not see the folder.
        kept = gather_objects(self.accelerator, kept)[0]
        if kept is None:
            self.report("No evaluation from before the first step was kept: the gain cannot be given")
            return None
        return [MeasuredRegion.from_flat(region) for region in kept["regions"]]

    def after(self, trainer: Trainer) -> list[MeasuredRegion] | None:
        """Measure the averaged weights (``train.eval_weights = ema``) or the live ones."""
        if self.config.data.eval_dir is None:
            return None
        if self.config.train.eval_weights == "live":
            return self._measure("after", self.frozen_listener)
        with weights(trainer.ema):
            return self._measure("after", self.frozen_listener)

    def _measure(self, name: str, listener: Listener | None) -> list[MeasuredRegion]:
        # Random states are put back, so that a run with evaluation trains exactly as one without.
        rng = capture_rng()
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        source = held_out_source(self.config)
        share = (source.load_all(index) for index in range(rank, len(source), world_size))
        with self.accelerator.autocast(), self.pace:
            own = evaluate_samples(self.model, self.prompter, self.config, share, listener)
            if self.accelerator.is_main_process:
                save_named_panels(self._examples(), self.folder.path / "panels", name)
        restore_rng(rng)
        gathered = gather_objects(self.accelerator, [region.flat() for region in own])
        results = [MeasuredRegion.from_flat(region) for part in gathered for region in part]
        results.sort(key=lambda region: region.name)
        if not results:
            raise ConfigError(
                explain(
                    "the evaluation set holds no region",
                    str(self.config.data.eval_dir),
                    seen=f"split {self.config.data.eval_split}",
                    fix="check data.eval_split and data.eval_datasets, or leave --eval_dir out",
                )
            )
        figures = plain_figures(results)
        regions = [region.flat() for region in results]
        self.folder.write_evaluation(name, {"figures": figures, "regions": regions})
        values = {key: figures[key] for key in FIGURES}
        shown = ", ".join(f"{key}={'-' if value is None else format(value, '.3f')}" for key, value in values.items())
        self.report(f"Evaluation {name} ({len(results)} regions): {shown}")
        return results

    def _examples(self) -> list[Panel]:
        """Return panels of a few held-out regions, the same ones before and after."""
        source = held_out_source(self.config)
        meter = RegionMeter(self.model, self.prompter, self.config, PRESETS["dual_loop"], ("loop",))
        panels = []
        for index in evenly_spread(len(source), EXAMPLES):
            sample = source.load_all(index)
            region = meter.measure([sample], self.config.data.eval_split)[0]
            assert region.cycle is not None  # the loop was asked for
            back = decode_rle(region.cycle.mask, region.name)
            origin = "rejected" if region.rejected else "generated"
            pictures = (sample.segmentation_image, sample.segmentation_masks[0], back)
            panels.append(
                Panel(region.name, sample.image, sample.masks[0], region.caption, origin, *pictures, region.cycle_iou)
            )
        return panels


def plain_figures(results: Sequence[MeasuredRegion]) -> dict[str, float | None]:
    """Return all figures as JSON holds them: None where there is nothing to average."""
    values = summarise(results)
    return {name: None if math.isnan(values[name]) else values[name] for name in (*FIGURES, *MORE_FIGURES)}


def evaluation_summary(
    before: Sequence[MeasuredRegion] | None, after: Sequence[MeasuredRegion] | None
) -> dict[str, Any]:
    """Return ``before``, ``after`` and ``gain`` of ``summary.json``, as far as they were measured."""
    summary: dict[str, Any] = {}
    if before is not None:
        summary["before"] = plain_figures(before)
    if after is not None:
        summary["after"] = plain_figures(after)
    if before is not None and after is not None:
        summary["gain"] = {"gIoU": gain(before, after), **cycle_gains(before, after)}
        summary["flags"] = find_flags(before, after)
    return summary


def gain(before: Sequence[MeasuredRegion], after: Sequence[MeasuredRegion]) -> dict[str, float]:
    """Return mean gain in gIoU with its 95 % interval: paired by region and sentence, resampled by image.

    Raises:
        ConfigError: the two did not measure the same regions.
    """
    pairs = list(zip(before, after, strict=False))
    if len(before) != len(after) or any(b.name != a.name or len(b.ious) != len(a.ious) for b, a in pairs):
        raise ConfigError(
            explain(
                "the evaluations before and after measured different regions",
                "data.eval_dir",
                f"{len(before)} and {len(after)} regions",
                fix="keep --eval_dir and --eval_max_samples the same when resuming",
            )
        )
    first = [iou for result in before for iou in result.ious]
    second = [iou for result in after for iou in result.ious]
    images = [result.image for result in before for _ in result.ious]
    return paired_bootstrap(first, second, groups=images)


def cycle_gains(before: Sequence[MeasuredRegion], after: Sequence[MeasuredRegion]) -> dict[str, dict[str, float]]:
    """Return the gains in cycle gIoU by listener; before training the frozen listener is the model itself."""
    images = [result.image for result in before]
    old = [result.cycle_iou for result in before]
    gains = {"cycle_gIoU": paired_bootstrap(old, [result.cycle_iou for result in after], groups=images)}
    frozen = [result.frozen_iou for result in after if result.frozen_iou is not None]
    if len(frozen) == len(old):
        gains["cycle_gIoU_frozen"] = paired_bootstrap(old, frozen, groups=images)
    return gains


def closing_line(result: FitResult, summary: Mapping[str, Any], path: Path) -> str:
    """Return the last printed line: how the run ended and where everything is."""
    if result.stopped_by is not None:
        return (
            f"Stopped by {result.stopped_by} after step {result.step}; saved in {result.checkpoint}; "
            "go on with --resume auto"
        )
    text = f"Done: {result.step} steps, run folder {path}"
    if "gain" in summary:
        change = summary["gain"]["gIoU"]
        interval = f"{100 * change['ci95_low']:+.1f} to {100 * change['ci95_high']:+.1f}"
        text += f", gIoU gain {100 * change['mean']:+.1f} points (95 % interval {interval})"
    text += "".join(f"\nflag: {flag}" for flag in summary.get("flags", ()))
    return text + f"\n{json.dumps({key: summary[key] for key in ('sources', 'counters')})}"

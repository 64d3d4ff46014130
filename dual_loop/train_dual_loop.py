"""The training entry: flags and config -> checks -> model, data, trainer -> fit -> summary.

Run by ``python -m dual_loop.train_dual_loop``, ``torchrun -m dual_loop.train_dual_loop`` or ``dual-loop train``.
Exit status: 0 done (also after a signal, once the state is saved), 2 a problem the user can mend, 1 a bug, 75 under an
elastic launcher where another machine left and the run is to go on without it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the imports below, so that --help answers without torch
    from dual_loop.commands.train import main

    sys.exit(main())

from dual_loop.checkpoint.store import capture_rng, restore_rng
from dual_loop.commands.train import main as main
from dual_loop.config import FIGURES, LISTENERS, Config, has_held_out, how_to_get
from dual_loop.config import load_config as load_config
from dual_loop.config import resolve_config_path as resolve_config_path
from dual_loop.data.dataset_builder import missing_roots
from dual_loop.data.masks import decode_rle
from dual_loop.drawing import Panel, save_panels
from dual_loop.errors import ConfigError, SampleError, explain, writing
from dual_loop.evaluation.gains import EvaluationSummary, evaluation_summary, plain_figures
from dual_loop.evaluation.measure import Listener, MeasuredRegion, RegionMeter
from dual_loop.evaluation.runner import MeasuredData, held_out
from dual_loop.evaluation.vague_references import captioned_samples, heard_regions, warn_of_vague_references
from dual_loop.iteration import evenly_spread
from dual_loop.loop.task import DualLoopTask
from dual_loop.model.stored_weights import weights
from dual_loop.preflight.dry_run import dry_run as dry_run
from dual_loop.preflight.machine import require_ready
from dual_loop.training import ranks
from dual_loop.training.devices import build_accelerator, end_processes, gather_objects
from dual_loop.training.run_lock import holding
from dual_loop.training.setup import Placed, Start, build, load, open_data, place, start, wire
from dual_loop.training.trainer import FitResult, Totals, Trainer, memory_errors_explained
from dual_loop.types import RegionSample

logger = logging.getLogger("dual_loop")

TO_BE_CONTINUED = 75
"""Exit status, EX_TEMPFAIL of sysexits.h."""

EXAMPLES = 6
"""Held-out regions that are drawn before and after."""


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
    accelerator = build_accelerator(config)
    with (
        ranks.failing_together(),
        memory_errors_explained("start-up or evaluation"),
        writing("the run", config.train.output_dir, net=True),
    ):
        check_paths(config)
        warned = require_ready(config)
        # The other ranks meet the one that holds the folder before they look into it.
        is_main, waits = accelerator.is_main_process, config.train.resume is not None
        with holding(config.train.output_dir, waits) if is_main else nullcontext():
            accelerator.wait_for_everyone()
            run = start(config, accelerator)
            for warning in warned:
                run.report(f"{warning}")
            stream = open_data(run)
            built = build(run)
            loaded = load(run, built)
            placed = place(run, loaded)
            ready = wire(run, placed, stream)
            trainer, evaluator = ready.trainer, Evaluator(run, placed, ready.trainer.task)
            before = evaluator.before(trainer.progress.step)
            evaluator.look_at_references(trainer)
            result = trainer.fit(partial(evaluator.during, trainer) if has_held_out(config) else None)
            after = evaluator.after(trainer) if result.stopped_by is None else None
            totals, found = trainer.totals(), evaluation_summary(before, after)
            run.folder.write("summary", {**asdict(totals), "checkpointing": asdict(ready.layers), **found})
            run.report(closing_line(result, totals, found, run.folder.path))
            end_processes(accelerator)
    return result


def check_paths(config: Config) -> None:
    """Look for every path of the configuration before anything is built.

    Raises:
        ConfigError: a path is missing, or no data set is given; all problems are listed.
    """
    train, problems = config.train, missing_roots(config.data)
    folders = {"data.eval_dir": config.data.eval_dir, "train.model_path": train.model_path}
    files = {"train.pretrained_pth": train.pretrained_pth, "train.sam2_path": train.sam2_path}
    files["data.eval_masks_dir"] = config.data.eval_masks_dir
    files["train.audit_listener"] = train.audit_listener
    if config.reward.listener not in LISTENERS:
        files[f"reward.listener ({', '.join(LISTENERS)} or a path)"] = config.reward.listener
    lost = [(key, "folder", path) for key, path in folders.items() if path and not Path(path).is_dir()]
    lost += [(key, "file", path) for key, path in files.items() if path and not Path(path).exists()]
    for key, kind, path in lost:
        fix = "" if key.startswith("data.") else f"; {how_to_get(path)}"
        problems.append(f"{key}: no such {kind}: {path}{fix}")
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problem(s) with paths:\n{listing}")


@contextmanager
def keeping_rng() -> Iterator[None]:
    """Put random states back behind the block, so that a run trains exactly as one without it."""
    states = capture_rng()
    yield
    restore_rng(states)


class Evaluator:
    """Measures the held-out sets before, in and after training, spread over the ranks."""

    def __init__(self, run: Start, placed: Placed, task: DualLoopTask) -> None:
        self.run, self.placed = run, placed
        self.sets = held_out(run.config.data)
        self.frozen = partial(weights, task.starting)
        self.independent = partial(weights, task.independent) if task.independent else None

    def before(self, step: int) -> list[MeasuredRegion] | None:
        """Measure the starting weights; a resumed run takes what its first start measured."""
        if not self.sets:
            return None
        if step == 0:
            # The model and the frozen listener are the same weights here.
            regions, needed = self._measure("before", None), self.run.config.train.keep_best
            if needed and plain_figures(regions)[needed] is None:
                fix = "give captions, or --keep_best cycle_gIoU, which needs none"
                raise ConfigError(explain(f"the held-out set cannot measure {needed}", "train.keep_best", fix=fix))
            return regions
        # Only the files of rank 0 count: another machine may not see the folder.
        kept = gather_objects(self.run.accelerator, self.run.folder.read("evaluation_before"))[0]
        if kept is None:
            self.run.report("No evaluation from before the first step was kept: the gain cannot be given")
            return None
        return [MeasuredRegion.from_flat(region) for region in kept["regions"]]

    def after(self, trainer: Trainer) -> list[MeasuredRegion] | None:
        """Measure the averaged weights (``train.eval_weights = ema``) or the live ones."""
        if not self.sets:
            return None
        with nullcontext() if self.run.config.train.eval_weights == "live" else weights(trainer.ema):
            return self._measure("after", self.frozen)

    def during(self, trainer: Trainer) -> dict[str, float | None]:
        """Return figures of the weights that :meth:`after` would measure now."""
        step = trainer.progress.step
        with nullcontext() if self.run.config.train.eval_weights == "live" else weights(trainer.ema):
            return self._report(f"after step {step}", self._regions())

    def look_at_references(self, trainer: Trainer) -> None:
        """Warn, before the first step, where step 1 is to learn from references vaguer than what it writes."""
        run, placed, accelerator = self.run, self.placed, self.run.accelerator
        if trainer.progress.step or not run.config.loop.caption_supervision:
            return
        place = (run.config.data.regions_per_image, accelerator.process_index, accelerator.num_processes)
        with keeping_rng(), accelerator.autocast(), placed.gathered or nullcontext():
            meter = RegionMeter(placed.model, placed.prompter, run.config, tasks=("referring", "loop"))
            own = heard_regions(meter.measure(captioned_samples(trainer.data.dataset.sources, *place), "train"))
        parts = gather_objects(accelerator, own)
        if warning := warn_of_vague_references([region for part in parts for region in part]):
            run.report(warning)

    def _measure(self, name: str, frozen: Listener | None) -> list[MeasuredRegion]:
        """Measure all regions and write them, with panels of a few."""
        run = self.run
        results = self._regions(
            frozen_listener=frozen,
            independent_listener=self.independent,
            hears_samples=name == "before",  # what words cost that no training chose: find_flags
        )
        with keeping_rng(), run.accelerator.autocast(), self.placed.gathered or nullcontext():
            if run.accelerator.is_main_process:
                with writing("example panels", run.folder.path / "panels"):
                    save_panels(self._examples(), run.folder.path / "panels", name)
        figures = self._report(name, results)
        # Plain values stand in the file.
        run.folder.write(f"evaluation_{name}", {"figures": figures, "regions": [region.flat() for region in results]})
        return results

    def _report(self, name: str, results: Sequence[MeasuredRegion]) -> dict[str, float | None]:
        figures = plain_figures(results)
        values = {key: figures[key] for key in FIGURES}
        shown = ", ".join(f"{key}={'-' if value is None else format(value, '.3f')}" for key, value in values.items())
        self.run.report(f"Evaluation {name} ({len(results)} regions): {shown}")
        return figures

    def _regions(self, **listeners: Any) -> list[MeasuredRegion]:
        """Return all held-out regions, by name, measured over the ranks with the weights that are in place."""
        run, placed, accelerator = self.run, self.placed, self.run.accelerator
        with keeping_rng(), accelerator.autocast(), placed.gathered or nullcontext():
            meter = RegionMeter(placed.model, placed.prompter, run.config, **listeners)
            own = [region for one in self.sets for region in meter.measure(self._read(one), one.name)]
        parts = gather_objects(accelerator, [region.flat() for region in own])
        regions = sorted((region for part in parts for region in part), key=lambda region: str(region["name"]))
        if not regions:
            where, fix = ", ".join(str(one.source.root) for one in self.sets), "check its folder and data.eval_split"
            raise ConfigError(explain("the evaluation set holds no region", where, fix=fix))
        return [MeasuredRegion.from_flat(region) for region in regions]

    def _read(self, one: MeasuredData) -> Iterator[RegionSample]:
        """Yield this rank's entries of a set; one that cannot be read is named and left out, each time."""
        accelerator = self.run.accelerator
        for index in range(accelerator.process_index, len(one), accelerator.num_processes):
            try:
                yield one.load(index, self.run.config.train.seed)
            except SampleError as error:
                logger.warning("held out, skipped: %s", error)

    def _examples(self) -> list[Panel]:
        """Return panels of a few held-out regions, the same ones before and after."""
        model, prompter, config = self.placed.model, self.placed.prompter, self.run.config
        meter = RegionMeter(model, prompter, config, tasks=("loop",))
        entries = [(one, index) for one in self.sets for index in range(len(one))]
        panels = []
        for one, index in (entries[number] for number in evenly_spread(len(entries), EXAMPLES)):
            sample = one.load(index, config.train.seed)
            region = meter.measure([sample], one.name)[0]
            assert region.cycle is not None  # the loop was asked for
            origin = "rejected" if region.rejected else "generated"
            back = decode_rle(region.cycle.mask, region.name)
            target = (sample.segmentation_image, sample.segmentation_masks[0], back, region.cycle_iou)
            panels.append(Panel(region.name, sample.image, sample.masks[0], region.caption, origin, *target))
        return panels


def closing_line(result: FitResult, totals: Totals, found: EvaluationSummary, path: Path) -> str:
    """Return the last printed line: how the run ended and where everything is."""
    if result.stopped_by is not None:
        return (
            f"Stopped by {result.stopped_by} after step {result.step}; saved in {result.checkpoint}; "
            "go on with --resume auto"
        )
    text = f"Done: {result.step} steps, run folder {path}"
    if "gain" in found:
        name, change = next(iter(found["gain"].items()))
        interval = f"{100 * change['ci95_low']:+.1f} to {100 * change['ci95_high']:+.1f}"
        text += f", {name} gain {100 * change['mean']:+.1f} points (95 % interval {interval})"
    text += "".join(f"\nflag: {flag}" for flag in found.get("flags", ()))
    return text + f"\n{json.dumps({'sources': totals.sources, 'counters': totals.counters})}"

"""The trainer: one optimiser step at a time, the same step on any number of ranks.

::

    fetch the accumulation window -> roll out its captions -> one all-reduce of counts -> backward a micro-batch at a
    time -> finite check on all ranks -> clip -> AdamW -> weight average -> one all-reduce of what is reported
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils._pytree import tree_map_only

from dual_loop.checkpoint.store import capture_rng, restore_rng, save_run_checkpoint
from dual_loop.config import Config
from dual_loop.errors import CheckpointError, explain
from dual_loop.loop.step_metrics import step_metrics
from dual_loop.loop.task import DualLoopTask
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.model.shards import place_like, whole
from dual_loop.training.checks import (
    StopRequest,
    check_finite,
    find_non_finite,
    gather_objects,
    memory_errors_explained,
)
from dual_loop.training.device_prefetch import WindowFeed
from dual_loop.training.devices import attention_kernel, peak_memory_mb, wrap_model
from dual_loop.training.metrics_log import (
    MAIN_TERMS,
    PhaseTimer,
    add_into,
    console_line,
    loss_means,
    ratios_and_values,
    reduce_sums,
)
from dual_loop.training.optim import build_optimizer, learning_rate_at, set_learning_rate
from dual_loop.training.panels import choose_regions, make_panel, save_panels
from dual_loop.training.run_folder import RunFolder
from dual_loop.training.sharding import clip_gradients
from dual_loop.training.state import Progress, fill_parameters, find_checkpoint, load_checkpoint
from dual_loop.training.stream import DataStream
from dual_loop.training.window_parts import Part, images_at_once, split_window
from dual_loop.types import Batch, LossTerm, PackedBatch, RegionSample, Segmentation, SkippedSample, StepOutput

TERM, COUNT, SOURCE, SKIPPED, STOP = "term/", "count/", "source/", "skipped", "stop"


@dataclass(frozen=True)
class FitResult:
    """How :meth:`Trainer.fit` ended.

    Attributes:
        step: optimiser steps done.
        stopped_by: name of the signal that ended it early, None where it ran to its end.
        is_own_signal: True where this rank got that signal itself.
        checkpoint: the last checkpoint written.
    """

    step: int
    stopped_by: str | None
    checkpoint: str
    is_own_signal: bool = False


class Trainer:
    """Trains with the dual loop.

    Args:
        config: the whole configuration.
        task: steps 1 to 3; what DDP wraps.
        average: the weight average, on its device.
        data: micro-batches of this rank.
        accelerator: processes, device and precision.
        folder: where records and panels go; writes on rank 0 only.
        report: prints one line (rank 0).
        pace: entered around step 1, where ranks do unequal work (``sharding.Pace``); None where nothing is sharded.
    """

    def __init__(
        self,
        config: Config,
        task: DualLoopTask,
        average: ExponentialMovingAverage,
        data: DataStream,
        accelerator: Accelerator,
        folder: RunFolder,
        report: Callable[[str], None] = print,
        pace: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.config, self.task, self.ema, self.data = config, task, average, data
        self.accelerator, self.folder, self.report = accelerator, folder, report
        self.pace = pace or contextlib.nullcontext()
        self.wrapped = wrap_model(accelerator, task)
        self.parameters = trainable_parameters(task.model)
        self.optimizer = build_optimizer(self.parameters, config.train)
        self.progress = Progress(samples=dict.fromkeys(data.source_names, 0))
        epochs = config.train.num_epochs
        self.total_steps = config.train.max_steps or data.steps_per_epoch * epochs
        self.num_epochs = -(-self.total_steps // data.steps_per_epoch)
        self._rng: Mapping[str, Any] | None = None
        self._saved: tuple[int, str] | None = None

    # ---- the run ---------------------------------------------------------------------------------------------------

    def fit(self) -> FitResult:
        """Train to the end, or until a signal; write a checkpoint at the end in both cases."""
        self.task.train()
        self.folder.open_logs(self.progress.step)
        feed = self._feed()
        with StopRequest() as stop, self._progress_bar() as bar:
            if self._rng is not None:
                restore_rng(self._rng)
            while self.progress.step < self.total_steps:
                self._announce_epoch()
                with memory_errors_explained(self.progress.step + 1):
                    stopping = self._one_step(feed, stop)
                bar.update(1)
                if stopping:
                    break
                if self.progress.step % self.config.train.save_interval == 0:
                    self.save()
            saved = self._saved[1] if self._saved and self._saved[0] == self.progress.step else self.save()
        self.folder.close()
        stopped_by = stop.signal_name or "a signal on another rank" if self._stopped_early() else None
        return FitResult(self.progress.step, stopped_by, saved, stop.requested)

    def summary(self) -> dict[str, Any]:
        """Return the totals of ``summary.json``; every rank must call this."""
        own = peak_memory_mb(self.accelerator.device)
        train, world_size = self.config.train, self.accelerator.num_processes
        return {
            "steps": self.progress.step,
            "seconds": round(self.progress.seconds, 3),
            "world_size": world_size,
            "effective_batch": train.batch_size * train.gradient_accumulation_steps * world_size,
            "sources": dict(self.progress.samples),
            "counters": self._counters(),
            "peak_memory_mb": round(max(gather_objects(self.accelerator, own)), 1),
        }

    def _stopped_early(self) -> bool:
        return self.progress.step < self.total_steps

    def _announce_epoch(self) -> None:
        epoch, position = divmod(self.progress.step, self.data.steps_per_epoch)
        if position == 0:
            self.report(f"Epoch {epoch + 1}/{self.num_epochs}")

    def _progress_bar(self) -> Any:
        import sys

        from tqdm import tqdm

        hidden = not (self.accelerator.is_main_process and sys.stderr.isatty())
        return tqdm(total=self.total_steps, initial=self.progress.step, unit="step", disable=hidden)

    # ---- one optimiser step ----------------------------------------------------------------------------------------

    def _feed(self) -> WindowFeed:
        batches, count = self.data.batches(self.progress.step), self.config.train.gradient_accumulation_steps
        return WindowFeed(batches, count, self.accelerator.device, self.config.speed.prefetch_to_device)

    def _one_step(self, feed: WindowFeed, stop: StopRequest) -> bool:
        """Take one optimiser step and report it; return whether all ranks agree to stop."""
        number = self.progress.step + 1
        is_audited = self._is_audited(number)
        is_logged = is_audited or number % self.config.train.log_interval == 0 or number in (1, self.total_steps)
        timer = PhaseTimer(self.accelerator.device, exact=is_logged)
        with timer.phase("data"):
            parts = split_window(feed.take(), images_at_once(self.config, self.accelerator.device.type))
            window = [part.batch for part in parts]
        with attention_kernel(self.config, self.accelerator.device):
            with timer.phase("rollout"), self.accelerator.autocast(), self.pace:
                packed = self.task.prepare(window, self.progress.step / self.total_steps, is_audited)
            if number < self.total_steps:
                with timer.phase("data"):
                    feed.start_next()
            counts = self._global_counts(packed, window)
            outputs = self._accumulate(packed, counts, timer)
        with timer.phase("optimiser"):
            rate = learning_rate_at(self.progress.step, self.total_steps, self.config.train)
            grad_norm = self._update(outputs, window, rate, number)
        sums = self._global_sums(packed, outputs, stop)
        self._advance(sums, timer)
        if is_logged:
            self._log(sums, counts, grad_norm, rate, timer)
        if number == self.total_steps or number == 1 or number % self.config.train.panel_interval == 0:
            self._save_panels(packed, outputs, parts)
        return sums[STOP] > 0

    def _is_audited(self, number: int) -> bool:
        """Tell whether step ``number`` ends with an audit: every so many steps, and the last of a run that has any."""
        interval = self.config.train.audit_interval
        return number % interval == 0 or (number == self.total_steps and self.total_steps > interval)

    def _global_counts(self, packed: Sequence[PackedBatch], window: Sequence[Batch]) -> dict[str, float]:
        """Return the items of every loss term over all micro-batches and ranks, before any backward pass.

        Samples consumed and skipped travel in the same all-reduce.
        """
        sums = {f"{SOURCE}{name}": 0.0 for name in self.data.source_names}
        skipped = [item for batch in window for item in batch.skipped]
        sums[SKIPPED] = float(len(skipped))
        for batch in window:
            for name in batch.sources:
                sums[f"{SOURCE}{name}"] += 1.0
        for rows in packed:
            add_into(sums, rows.counts, COUNT)
        sums = reduce_sums(self.accelerator, sums)
        self._record_samples(sums, skipped)
        return {name.removeprefix(COUNT): value for name, value in sums.items() if name.startswith(COUNT)}

    def _record_samples(self, sums: Mapping[str, float], skipped: list[SkippedSample]) -> None:
        """Count consumed and skipped samples of all ranks on every rank, so that all of them stop together."""
        consumed = {name: int(sums[f"{SOURCE}{name}"]) for name in self.data.source_names}
        everywhere = skipped
        if sums[SKIPPED] and self.accelerator.num_processes > 1:
            everywhere = [item for rank in gather_objects(self.accelerator, skipped) for item in rank]
        self.data.record(everywhere, consumed)
        for name, count in consumed.items():
            self.progress.samples[name] += count

    def _accumulate(
        self, packed: Sequence[PackedBatch], counts: Mapping[str, float], timer: PhaseTimer
    ) -> list[StepOutput]:
        """Run steps 2 and 3 with backward for every micro-batch; DDP exchanges gradients in the last one only."""
        outputs = []
        for index, rows in enumerate(packed):
            is_last = index == len(packed) - 1
            waits = contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.wrapped)
            with waits:
                with timer.phase("forward"), self.accelerator.autocast():
                    output: StepOutput = self.wrapped(rows)
                    loss = self._loss(output, counts)
                with timer.phase("backward"):
                    loss.backward()
            outputs.append(detach_output(output))
        return outputs

    def _loss(self, output: StepOutput, counts: Mapping[str, float]) -> torch.Tensor:
        """Return this micro-batch's share of the global average: sums divided by global counts.

        DDP averages gradients over ranks; the factor world size turns that into the sum that is wanted.
        """
        scale = self.accelerator.num_processes
        shares = [term.total * (scale / max(counts[name], 1.0)) for name, term in output.terms.items()]
        return torch.stack([share.float() for share in shares]).sum()

    def _update(self, outputs: Sequence[StepOutput], window: Sequence[Batch], rate: float, number: int) -> float:
        """Check, clip and apply the gradient; return its norm before clipping. Nothing changes when a check fails."""
        max_norm = self.config.train.max_grad_norm or float("inf")
        grad_norm = clip_gradients(self.parameters.values(), max_norm)
        values = [{name: float(term.total) for name, term in output.terms.items()} for output in outputs]
        names = [batch.region_names for batch in window]
        problems = find_non_finite(values, names)
        check_finite(self.accelerator, number, problems, grad_norm, [name for group in names for name in group])
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        return grad_norm

    def _global_sums(
        self, packed: Sequence[PackedBatch], outputs: Sequence[StepOutput], stop: StopRequest
    ) -> dict[str, float]:
        """Return loss sums and metric sums over all micro-batches and ranks, and how many ranks want to stop."""
        sums = {STOP: float(stop.requested)}
        for rows, output in zip(packed, outputs, strict=True):
            add_into(sums, {name: float(term.total) for name, term in output.terms.items()}, TERM)
            add_into(sums, step_metrics(rows, output.masks))
        return reduce_sums(self.accelerator, sums)

    def _advance(self, sums: Mapping[str, float], timer: PhaseTimer) -> None:
        self.progress.step += 1
        self.progress.seconds += timer.total()["total"]
        self.progress.counters.add({n: v for n, v in sums.items() if not n.startswith(TERM)})

    # ---- what is reported ------------------------------------------------------------------------------------------

    def _counters(self) -> dict[str, int]:
        return {**self.progress.counters.as_dict(), **self.data.counters()}

    def _log(
        self, sums: Mapping[str, float], counts: Mapping[str, float], grad_norm: float, rate: float, timer: PhaseTimer
    ) -> None:
        totals = {name.removeprefix(TERM): value for name, value in sums.items() if name.startswith(TERM)}
        means = loss_means(totals, counts)
        plain = {n: v for n, v in sums.items() if n != STOP and not n.startswith(TERM)}
        record: dict[str, Any] = {
            "step": self.progress.step,
            "epoch": (self.progress.step - 1) // self.data.steps_per_epoch + 1,
            **{name: means[name] for name in ("loss", *MAIN_TERMS)},
            "other_losses": {name: value for name, value in means.items() if name not in ("loss", *MAIN_TERMS)},
            "grad_norm": grad_norm,
            "lr": rate,
            "ranks": self.accelerator.num_processes,
            "seconds": timer.total(),
            **ratios_and_values(plain),
            "counters": self._counters(),
        }
        self.folder.log(record)
        self.report(console_line(record, self.total_steps))

    def _save_panels(self, packed: Sequence[PackedBatch], outputs: Sequence[StepOutput], parts: Sequence[Part]) -> None:
        """Draw some regions of this step (rank 0), one a source first; the images are read again."""
        if not self.accelerator.is_main_process:
            return
        places = [(index, region) for index, rows in enumerate(packed) for region in range(rows.batch.num_regions)]
        sources = [packed[index].batch.region_names[region].split("/")[0] for index, region in places]
        chosen = [places[p] for p in choose_regions(sources, self.config.train.panels_per_save)]
        samples = {index: self._samples(parts[index]) for index, _ in chosen}
        panels = [make_panel(packed[i], outputs[i].masks, samples[i], region) for i, region in chosen]
        save_panels(panels, self.folder.path / "panels", self.progress.step)

    def _samples(self, part: Part) -> list[RegionSample]:
        read = self.data.samples(self.progress.step - 1, part.micro_step)
        return read[part.first : part.first + part.batch.num_images]

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def save(self) -> str:
        """Write a checkpoint of the current step; every rank must call this."""
        ema = self.ema.state_dict()
        state = {
            "progress": self.progress.state_dict(),
            "data": self.data.state_dict(self.progress.step),
            "ema_updates": ema["num_updates"],
            "total_steps": self.total_steps,
        }
        own = {"rng": capture_rng(), "loop": self.task.run_state()}
        path = save_run_checkpoint(
            self.folder.path,
            self.progress.step,
            model_tensors={name: whole(parameter.detach()) for name, parameter in self.parameters.items()},
            ema_tensors={name: whole(average) for name, average in ema["averages"].items()},
            optimizer_state=tree_map_only(torch.Tensor, whole, self.optimizer.state_dict()),
            state=state,
            rng_states=own,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            barrier=self.accelerator.wait_for_everyone,
            keep=self.config.train.keep_checkpoints,
        )
        self._saved = (self.progress.step, str(path))
        return str(path)

    def restore(self) -> bool:
        """Continue from the checkpoint that ``train.resume`` means; return whether there was one.

        Raises:
            CheckpointError: it does not fit this run.
        """
        path = find_checkpoint(self.config.train.resume, self.folder.path)
        if path is None:
            return False
        saved = load_checkpoint(path, self.accelerator.process_index, self.accelerator.num_processes)
        if saved.ema_tensors is None:
            raise CheckpointError(explain("the checkpoint has no weight average", str(path)))
        fill_parameters(self.parameters, saved.model_tensors)
        self.ema.load_state_dict({"num_updates": saved.state["ema_updates"], "averages": saved.ema_tensors})
        self._load_optimizer(saved.optimizer_state)
        self.data.load_state_dict(saved.state["data"])
        self.progress = Progress.from_state(saved.state["progress"])
        if saved.rng_states is not None:
            self._rng = saved.rng_states["rng"]
            self.task.load_run_state(saved.rng_states["loop"])
        self._saved = (saved.step, str(path))
        self.report(f"Resumed from {path} at step {saved.step}")
        if saved.state["total_steps"] != self.total_steps:
            self.report(
                f"Warning: the saved run had {saved.state['total_steps']} steps in all, this one has "
                f"{self.total_steps}: the learning-rate schedule differs from a straight run"
            )
        return True

    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Give each parameter's moments, saved whole, the shards of the parameter."""
        numbered = [p for group in self.optimizer.param_groups for p in group["params"]]
        own = {
            number: {k: place_like(v, numbered[number]) if getattr(v, "ndim", 0) else v for k, v in values.items()}
            for number, values in state["state"].items()
        }
        # How the update is computed belongs to this start, not to the one that saved.
        how = [{key: group[key] for key in ("fused", "foreach")} for group in self.optimizer.param_groups]
        groups = [{**group, **kept} for group, kept in zip(state["param_groups"], how, strict=True)]
        self.optimizer.load_state_dict({**state, "param_groups": groups, "state": own})


def detach_output(output: StepOutput) -> StepOutput:
    """Return ``output`` without its graph, so that the memory of one micro-batch is free before the next."""
    terms = {name: LossTerm(term.total.detach(), term.count) for name, term in output.terms.items()}
    masks = output.masks
    kept = (masks.mask_logits, masks.predicted_iou, masks.chosen, masks.object_score_logits)
    return StepOutput(terms, Segmentation(*(tensor.detach() for tensor in kept)))

"""The trainer: one optimiser step at a time, the same step on any number of ranks.

::

    data     the accumulation window
    prepare  step 1: its captions, and the rows that step 2 reads; one all-reduce of counts
    backward steps 2 and 3, a micro-batch at a time
    update   finite check on all ranks -> clip -> AdamW -> weight average
    log      one all-reduce of what is reported
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProfileKwargs
from torch.utils._pytree import tree_map_only

from dual_loop.checkpoint.store import capture_rng, load_run_checkpoint, restore_rng, save_run_checkpoint
from dual_loop.config import Config
from dual_loop.drawing import save_panels
from dual_loop.errors import CheckpointError, EnvironmentProblem, explain, writing
from dual_loop.iteration import progress_bar
from dual_loop.loop.task import DualLoopTask
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.model.shards import whole
from dual_loop.training import ranks
from dual_loop.training.device_prefetch import DataStream, DevicePrefetch, end_loaders
from dual_loop.training.devices import gather_objects, images_at_once, peak_memory_mb, wrap_model
from dual_loop.training.metrics_log import (
    MetricsLog,
    PhaseTimer,
    StepRecord,
    add_into,
    choose_regions,
    counters_of,
    make_panels,
    ratios_and_values,
    reduce_sums,
    step_metrics,
)
from dual_loop.training.optim import (
    build_optimizer,
    check_finite,
    clip_gradients,
    gradient_norms,
    load_optimizer,
    rate_factor,
)
from dual_loop.training.run_folder import RunFolder, fill_parameters, find_checkpoint
from dual_loop.training.stop import StopRequest
from dual_loop.types import Batch, PackedBatch, StepOutput

TERM, COUNT, SOURCE, SKIPPED, STOP = "term/", "count/", "source/", "skipped", "stop"


@dataclass(frozen=True)
class FitResult:
    """How :meth:`Trainer.fit` ended: after ``step`` steps, and ``checkpoint`` is the last one written.

    ``stopped_by`` names the signal, or ``max_time``, that ended it early, if any; ``is_own_signal`` where this rank
    got it itself.
    """

    step: int
    stopped_by: str | None
    checkpoint: str
    is_own_signal: bool = False


@dataclass(frozen=True)
class Totals:
    """What ``summary.json`` holds of the training itself, over all starts and ranks.

    ``sources`` are samples consumed; ``peak_memory_mb`` is in MiB, of the rank that used most; ``best`` is figure,
    value and step of ``checkpoints/best``, None without ``train.keep_best``.
    """

    steps: int
    seconds: float
    world_size: int
    effective_batch: int
    sources: dict[str, int]
    counters: dict[str, int]
    peak_memory_mb: float
    best: dict[str, str | float] | None


@dataclass
class Progress:
    """How far a run has come, over all starts and ranks; what a checkpoint keeps of it.

    ``best`` and ``best_step`` are of the evaluations so far, by ``train.keep_best``; ``worse``: evaluations since then.
    """

    step: int = 0
    seconds: float = 0.0
    samples: dict[str, int] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int = 0
    worse: int = 0


class Trainer:
    """Trains with the dual loop.

    Args:
        task: steps 1 to 3; what DDP wraps.
        average: the weight average, on its device.
        data: micro-batches of this rank.
        gathered: entered around step 1, where ranks do unequal work (``sharding.Gathered``); None: nothing is sharded.
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
        gathered: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.config, self.task, self.ema, self.data = config, task, average, data
        self.accelerator, self.folder, self.report = accelerator, folder, report
        self.gathered = gathered or nullcontext()
        self.log = MetricsLog(folder.path, folder.writes, config.train.report_to)
        self.wrapped = wrap_model(accelerator, task)
        self.parameters = trainable_parameters(task.model)
        self.optimizer = build_optimizer(self.parameters, config.train)
        # float16 alone needs a loss scale: where there is none, it changes nothing.
        self.scaler = accelerator.scaler or torch.amp.GradScaler(accelerator.device.type, enabled=False)
        self.progress = Progress(samples=dict.fromkeys(data.source_names, 0))
        self.total_steps = config.train.max_steps or data.steps_per_epoch * config.train.num_epochs
        self.images_at_once = images_at_once(config, accelerator.device.type)
        self._rng: Mapping[str, Any] | None = None
        self._saved: tuple[int, str] | None = None

    # ---- the run ---------------------------------------------------------------------------------------------------

    def fit(self, evaluate: Callable[[], Mapping[str, float | None]] | None = None) -> FitResult:
        """Train to the end, or until a signal or ``train.max_time``; write a checkpoint at the end in all cases.

        Args:
            evaluate: measures the held-out set when ``train.eval_strategy`` says so, on all ranks, and returns figures;
                with ``train.patience`` training ends where they are no longer better.
        """
        progress, total, per_epoch = self.progress, self.total_steps, self.data.steps_per_epoch
        self.task.train()
        self.log.open(progress.step, asdict(self.config))
        windows = self.open_windows()
        bar = progress_bar("training", "step", total, done=progress.step)
        with StopRequest(self.config.train.max_time) as stop, bar, self._profiler() as profiler:
            if self._rng is not None:
                restore_rng(self._rng)
            while progress.step < total:
                if progress.worse == self.config.train.patience:
                    self.report(f"No better {self.config.train.keep_best} since step {progress.best_step}")
                    total = progress.step
                    break
                if progress.step % per_epoch == 0:
                    self.report(f"Epoch {progress.step // per_epoch + 1}/{-(-total // per_epoch)}")
                with memory_errors_explained(f"optimiser step {progress.step + 1}"):
                    is_stopping = self.step(windows, stop)
                bar.update(1)
                if profiler is not None:
                    profiler.step()
                if is_stopping:
                    break
                is_best = evaluate is not None and self._is_evaluated() and self._is_best(evaluate())
                if is_best or progress.step % self.config.train.save_interval == 0:
                    self.save(is_best)
            saved = self._saved[1] if self._saved and self._saved[0] == progress.step else self.save()
        self.log.close()
        stopped_by = (stop.reason or "a signal on another rank") if progress.step < total else None
        return FitResult(progress.step, stopped_by, saved, stop.reason is not None)

    def _profiler(self) -> AbstractContextManager[torch.profiler.profile | None]:
        """Record ``train.profile_steps`` steps: a table of what took longest, and a trace for Perfetto of each rank."""
        count, folder = self.config.train.profile_steps, self.folder.path / "profile"

        def write(profile: torch.profiler.profile) -> None:
            folder.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(folder / f"rank_{self.accelerator.process_index}.json"))
            order = f"self_{'cpu' if self.accelerator.device.type == 'cpu' else 'device'}_time_total"
            self.report(f"{folder}:\n{profile.key_averages().table(sort_by=order, row_limit=15)}")

        if not count:
            return nullcontext()
        plan = {"wait": 1, "warmup": 1, "active": count, "repeat": 1}
        made: torch.profiler.profile = ProfileKwargs(schedule_option=plan, on_trace_ready=write).build()
        return made

    def open_windows(self) -> DevicePrefetch:
        """Start the loader at the next step."""
        batches = self.data.batches(self.progress.step)
        return DevicePrefetch(batches, self.config, self.accelerator.device, self.images_at_once)

    def step(self, windows: DevicePrefetch, stop: StopRequest) -> bool:
        """Take one optimiser step and report it; return whether all ranks agree to stop."""
        train, accelerator, progress, last = self.config.train, self.accelerator, self.progress, self.total_steps
        number, world_size = progress.step + 1, accelerator.num_processes
        # An audit ends every so many steps, and the last one of a run that has any.
        is_audited = number % train.audit_interval == 0 or number == last > train.audit_interval
        is_logged = is_audited or number % train.log_interval == 0 or number in (1, last)
        timer = PhaseTimer(accelerator.device, exact=is_logged)
        ranks.note(f"step {number}, data")

        # ---- data
        window = windows.take()
        timer.end("data")
        ranks.note(f"step {number}, roll-out")

        # ---- step 1, for the whole window
        with accelerator.autocast(), self.gathered:
            packed = self.task.prepare(window, progress.step / last, is_audited)
        timer.end("rollout")
        if number < last:
            windows.start_next()
            timer.end("data")
        counts = self._count(window, packed)
        ranks.note(f"step {number}, forward and backward")

        # ---- steps 2 and 3; DDP exchanges gradients in the last micro-batch only
        losses_of, masks, norms = list[dict[str, torch.Tensor]](), list[torch.Tensor](), dict[str, float]()
        for index, rows in enumerate(packed):
            with nullcontext() if index == len(packed) - 1 else accelerator.no_sync(self.wrapped):
                with accelerator.autocast():
                    output: StepOutput = self.wrapped(rows)
                    # Sums are divided by global counts. DDP averages gradients over ranks; the factor world size
                    # turns that into the sum that is wanted.
                    shares = [t.total * (world_size / max(counts[n], 1.0)) for n, t in output.terms.items()]
                    loss = torch.stack([share.float() for share in shares]).sum()
                timer.end("forward")
                norms = norms or (gradient_norms(output.terms, self.parameters.values()) if is_audited else {})
                self.scaler.scale(loss).backward()
                timer.end("backward")
            # Without the graph, so that the memory of one micro-batch is free before the next.
            losses_of.append({name: term.total.detach() for name, term in output.terms.items()})
            masks.append(output.masks.mask_logits.detach())

        # ---- update
        factor = rate_factor(progress.step, last, train)
        terms, grad_norm = self._update(losses_of, [batch.region_names for batch in window], factor)
        timer.end("optimiser")

        # ---- log
        sums = {STOP: float(stop.reason is not None), **norms}
        if self.scaler.is_enabled():
            sums["precision/overflows"] = float(grad_norm is None and accelerator.is_main_process)
        for rows, logits, values in zip(packed, masks, terms, strict=True):
            add_into(sums, values, TERM)
            add_into(sums, step_metrics(rows, logits))
        sums = reduce_sums(accelerator, sums)
        is_stopping = sums.pop(STOP) > 0
        names = [name.removeprefix(TERM) for name in sums if name.startswith(TERM)]
        losses = {name: sums.pop(TERM + name) / max(counts[name], 1.0) for name in names}
        progress.step = number
        progress.seconds += timer.total()["total"]
        add_into(progress.counters, counters_of(sums))
        if is_logged:
            epoch, averages = (number - 1) // self.data.steps_per_epoch + 1, ratios_and_values(sums)
            seconds, counters = timer.total(), self.counters()
            rate = train.learning_rate * factor
            record = StepRecord(number, epoch, losses, grad_norm, rate, world_size, seconds, averages, counters)
            self.log.write(record)
            self.report(record.line(last, progress.seconds / number))
        if number in (1, last) or number % train.panel_interval == 0:
            self._save_panels(window, packed, masks)
        return is_stopping

    def _update(
        self, losses_of: Sequence[Mapping[str, torch.Tensor]], regions: Sequence[Sequence[str]], factor: float
    ) -> tuple[list[dict[str, float]], float | None]:
        """Update with the gradients that have been summed up; nothing changes where a check fails.

        Args:
            losses_of: of each micro-batch. regions: their names. factor: of the peak learning rates.

        Returns:
            The losses as numbers, and the gradient's norm before clipping: None where it is beyond float16, which
            lowers the loss scale and changes nothing else, as long as there is a scale.
        """
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters.values(), self.config.train.max_grad_norm or float("inf"))
        # The one place where a step waits for what its losses are.
        totals = [total for losses in losses_of for total in losses.values()]
        *flat, grad_norm = torch.stack([value.float() for value in (*totals, norm)]).tolist()
        left = iter(flat)
        terms = [{name: next(left) for name in losses} for losses in losses_of]
        is_overflow = not math.isfinite(grad_norm) and self.scaler.get_scale() > 1
        check_finite(self.accelerator, self.progress.step + 1, terms, regions, 0.0 if is_overflow else grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if is_overflow:
            return terms, None
        self.ema.update()
        return terms, grad_norm

    def _count(self, window: Sequence[Batch], packed: Sequence[PackedBatch]) -> dict[str, float]:
        """Return the items of every loss term over all micro-batches and ranks, before any backward pass.

        Samples consumed and skipped travel in the same all-reduce; every rank counts those of all, so that all stop
        together where too many were skipped.
        """
        names, drawn = self.data.source_names, [name for batch in window for name in batch.sources]
        skipped = [item for batch in window for item in (*batch.skipped, *batch.passed_over)]
        sums = {SKIPPED: float(len(skipped)), **{SOURCE + name: float(drawn.count(name)) for name in names}}
        for rows in packed:
            add_into(sums, rows.counts, COUNT)
        sums = reduce_sums(self.accelerator, sums)
        if sums[SKIPPED] and self.accelerator.num_processes > 1:
            skipped = [item for rank in gather_objects(self.accelerator, skipped) for item in rank]
        consumed = {name: int(sums[SOURCE + name]) for name in names}
        self.data.ledger.record(skipped, consumed)
        for name in names:
            self.progress.samples[name] += consumed[name]
        return {name.removeprefix(COUNT): value for name, value in sums.items() if name.startswith(COUNT)}

    # ---- what is reported ------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """Return the counters of the run so far: of the loop, and of skipped samples."""
        own = {name: round(value) for name, value in sorted(self.progress.counters.items())}
        if self.config.speed.compile:
            own["compile/graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return {**own, **self.data.ledger.as_counters()}

    def totals(self) -> Totals:
        """Return what the run took; every rank must call this."""
        own = peak_memory_mb(self.accelerator.device)
        train, world_size = self.config.train, self.accelerator.num_processes
        value, step = self.progress.best, self.progress.best_step
        best: dict[str, str | float] = {"figure": train.keep_best or "", "value": value or 0.0, "step": step}
        return Totals(
            steps=self.progress.step,
            seconds=round(self.progress.seconds, 3),
            world_size=world_size,
            effective_batch=train.batch_size * train.gradient_accumulation_steps * world_size,
            sources=dict(self.progress.samples),
            counters=self.counters(),
            best=None if value is None else best,
            peak_memory_mb=round(max(gather_objects(self.accelerator, own)), 1),
        )

    # ---- evaluations on the way --------------------------------------------------------------------------------------

    def _is_evaluated(self) -> bool:
        train, step = self.config.train, self.progress.step
        every = train.eval_interval or (train.save_interval if train.eval_strategy == "steps" else None)
        if train.eval_strategy == "epoch" and step % self.data.steps_per_epoch == 0:
            return True
        return every is not None and step % every == 0

    def _is_best(self, figures: Mapping[str, float | None]) -> bool:
        """Record an evaluation; return whether its figure is the best so far."""
        progress, name = self.progress, self.config.train.keep_best
        self.log.write_evaluation(progress.step, figures)
        value = figures[name] if name is not None else None
        if value is not None and (progress.best is None or value > progress.best):
            progress.best, progress.best_step, progress.worse = value, progress.step, 0
            return True
        progress.worse += name is not None
        return False

    def _save_panels(
        self, window: Sequence[Batch], packed: Sequence[PackedBatch], masks: Sequence[torch.Tensor]
    ) -> None:
        """Draw some regions of this step (rank 0), one a source first; their images are read again."""
        if not self.accelerator.is_main_process:
            return
        places = [(index, region) for index, batch in enumerate(window) for region in range(batch.num_regions)]
        sources = [name.split("/")[0] for batch in window for name in batch.region_names]
        firsts = [0, *accumulate(batch.num_images for batch in window)]
        regions, images = [], []
        for position in choose_regions(sources, self.config.train.panels_per_save):
            index, region = places[position]
            regions.append((packed[index], masks[index], region))
            images.append(firsts[index] + int(window[index].region_image[region]))
        read = list(dict.fromkeys(images))
        samples = dict(zip(read, self.data.samples(self.progress.step - 1, read), strict=True))
        panels = make_panels(regions, [samples[image] for image in images])
        folder = self.folder.path / "panels"
        with writing("example panels", folder):
            save_panels(panels, folder, f"step_{self.progress.step:06d}")

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, is_best: bool = False) -> str:
        """Write a checkpoint of the current step, which ``checkpoints/best`` then names; every rank must call this."""
        step, accelerator = self.progress.step, self.accelerator
        ranks.note(f"saves step {step}")
        scaler = self.scaler.state_dict()  # empty without one
        state = {"progress": asdict(self.progress), "data": self.data.state_dict(step)}
        path = save_run_checkpoint(
            self.folder.path,
            step,
            model_tensors={name: whole(parameter.detach()) for name, parameter in self.parameters.items()},
            ema_tensors={name: whole(average) for name, average in self.ema.values.items()},
            optimizer_state=tree_map_only(torch.Tensor, whole, self.optimizer.state_dict()),
            state={**state, "ema_updates": self.ema.num_updates, "total_steps": self.total_steps, "scaler": scaler},
            rng_states={"rng": capture_rng(), "loop": self.task.run_state()},
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            barrier=accelerator.wait_for_everyone,
            keep=self.config.train.keep_checkpoints,
        )
        if is_best and self.accelerator.is_main_process:
            with writing("the link to the best checkpoint", path.parent):
                link = path.with_name(".best")
                link.unlink(missing_ok=True)
                link.symlink_to(path.name)
                link.replace(path.with_name("best"))
        self._saved = (step, str(path))
        return str(path)

    def restore(self, path: Path | None = None) -> bool:
        """Continue from a checkpoint, by default what ``train.resume`` means; return whether there was one.

        Args:
            path: as :func:`find_checkpoint` returned it; its hashes are not looked at again.

        Raises:
            CheckpointError: it does not fit this run.
        """
        path = path or find_checkpoint(self.config.train.resume, self.folder.path)
        if path is None:
            return False
        accelerator = self.accelerator
        saved = load_run_checkpoint(path, accelerator.process_index, accelerator.num_processes, verify=False)
        if saved.ema_tensors is None:
            raise CheckpointError(explain("the checkpoint has no weight average", str(path)))
        fill_parameters(self.parameters, saved.model_tensors)
        fill_parameters(self.ema.values, saved.ema_tensors)
        self.ema.num_updates = saved.state["ema_updates"]
        load_optimizer(self.optimizer, saved.optimizer_state, self.parameters)
        if self.scaler.is_enabled() and saved.state.get("scaler"):
            self.scaler.load_state_dict(saved.state["scaler"])
        self.data.load_state_dict(saved.state["data"])
        self.progress = Progress(**saved.state["progress"])
        if saved.rng_states is not None:
            self._rng = saved.rng_states["rng"]
            self.task.load_run_state(saved.rng_states["loop"])
        self._saved = (saved.step, str(path))
        self.report(f"Resumed from {path} at step {saved.step}")
        if saved.state["total_steps"] != self.total_steps:
            totals = f"the saved run had {saved.state['total_steps']} steps in all, this one has {self.total_steps}"
            self.report(f"Warning: {totals}: the learning-rate schedule differs from a straight run")
        return True


@contextmanager
def memory_errors_explained(where: str) -> Iterator[None]:
    """Turn running out of memory, and a loader's process that ended, into an EnvironmentProblem with what to do."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if "DataLoader" in str(error):
            end_loaders()  # one that is stopped would be waited for at the end
            what = "a process that loads data was killed or hangs"
            fix = "look for what ended it (often want of memory: lower --num_workers); go on with --resume auto"
        elif isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            what = "out of memory"
            fix = "lower --batch_size (and raise --gradient_accumulation_steps), --regions_per_image or "
            fix += "--max_new_tokens; or --cfg-options speed.images_at_once=1 speed.checkpoint_layers=all "
            fix += "model.gradient_checkpointing=True loop.rollout_batch_size=8"
        else:
            raise
        raise EnvironmentProblem(explain(what, where, str(error).splitlines()[0], fix=fix)) from error

"""Count one optimiser step of a configuration without computing it: operations, bytes and memory, by phase.

The package's own loop runs on hollow tensors (``plan.fake_tensors``) under the counter of the benchmark
(``bench.phases``), so what is counted is what a step does: shared prefixes, packed rows, frozen matrices that get
no gradient, what checkpointing computes again. Three things are put in place of what a run has: generated images of
one size, captions of exactly ``loop.max_new_tokens`` tokens, and the optimiser, whose bytes are plain arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dual_loop.config import Config, precision
from dual_loop.data.prepare import batch_from_samples
from dual_loop.errors import ConfigError, explain
from dual_loop.loop.task import DualLoopTask
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.build import build_model, build_prompter, geometry
from dual_loop.model.decode import Decoder, Rows
from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.model.recompute import checkpoint_first
from dual_loop.training.memory import MemoryEstimator
from dual_loop.types import Batch, PackedBatch, RegionSample

from bench.phases import PHASES, PhaseClock, ProductCounter, watch_task
from bench.setup import word_ids
from plan.fake_tensors import HollowMode

REGION_SHARE = 0.05
"""Share of the image that a generated region covers."""

DECODED_STEPS = 2
"""Decoding steps that are run; the others follow from these, since a step's cost is linear in the cache's length."""

LANGUAGE = "language forward"

OPTIMISER_BYTES, EMA_BYTES = 40, 12
"""Bytes that move for every trained value: norm and clipping 12 and AdamW 28; read, read and write of the average."""


@dataclass
class CountedStep:
    """One optimiser step of one rank.

    Attributes:
        state: bytes of memory that a step starts with, by part.
        trained: values that train.
        images, regions: of the step. captions: written in step 1, all samples of a region counted.
        flops, bytes: by phase of ``bench.phases``; bytes are those of the operands of products, and of the values
            that the optimiser and the average read and write.
        training, captioning: bytes that come on top at the fullest moment of a micro-batch's forward and backward
            pass, and of step 1, by the phase that made them.
        language_activations: bytes that the language model keeps for its backward pass, with gradient checkpointing
            ("on") and without ("off"): that of the configuration, or both.
        row_tokens: tokens of the packed rows of step 2, padding included, a micro-batch.
    """

    state: dict[str, float]
    trained: int
    window: InitVar[Sequence[Batch]]
    images: int = 0
    regions: int = 0
    captions: int = 0
    flops: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    captioning: dict[str, float] = field(default_factory=dict)
    language_activations: dict[str, float] = field(default_factory=dict)
    row_tokens: list[int] = field(default_factory=list)

    def __post_init__(self, window: Sequence[Batch]) -> None:
        self.images = sum(batch.num_images for batch in window)
        self.regions = sum(batch.num_regions for batch in window)

    @property
    def starting_copy(self) -> float:
        """Bytes of the starting weights, which stay in the host's memory."""
        return 4.0 * self.trained

    @property
    def peak(self) -> float:
        """Bytes of one rank at the fullest moment, on the device."""
        return sum(self.state.values()) + max(sum(self.training.values()), sum(self.captioning.values()))


class PlannedCaptions:
    """Stands in for what a model would write: as many tokens as allowed, drawn from ``ids``; or what one did write.

    Args:
        ids: tokens to draw from.
        end_id: what ends a caption; None lets every caption run into the limit, as random weights do.
        written: captions of a run, in the order of its generations; these come first.
    """

    def __init__(self, ids: Sequence[int], end_id: int | None, written: Sequence[Sequence[int]] = ()) -> None:
        self.ids, self.end_id, self.written = list(ids), end_id, [list(one) for one in written]
        self.random = np.random.default_rng(0)
        self.num_written = 0

    @classmethod
    def of_words(cls, tokenizer: Any) -> PlannedCaptions:
        """Draw from the tokens that are a word with a blank before it, so that a text reads back as long as it is."""
        return cls(word_ids(tokenizer) or range(len(tokenizer)), tokenizer.eos_token_id)

    def write(self, length: int) -> list[int]:
        """Return the ids of one caption of ``length`` tokens, its end included."""
        self.num_written += 1
        if self.num_written <= len(self.written):
            return self.written[self.num_written - 1]
        if self.end_id is None:
            return [int(i) for i in self.random.choice(self.ids, length)]
        return [*(int(i) for i in self.random.choice(self.ids, length - 1)), self.end_id]


class _Seen(Exception):
    """Enough decoding steps were run."""


def plan_config(config: Config) -> Config:
    """Return ``config`` with what cannot be counted, or would write to disk, switched off.

    Raises:
        ConfigError: a plan does not cover this way of sharing the model.
    """
    if config.train.parallel != "ddp":
        problem = f"train.parallel={config.train.parallel}"
        raise ConfigError(explain("a plan does not cover this", problem, expected="the default", fix="leave it out"))
    return replace(config, speed=replace(config.speed, pack_weights="off", feature_cache=None, start_on_disk=False))


def generated_window(config: Config) -> list[Batch]:
    """Return the micro-batches of one step: images with ``data.regions_per_image`` discs, no text."""
    random, shape, count = np.random.default_rng(0), geometry(config), config.data.regions_per_image
    height, width = 480, 640
    rows, columns = np.mgrid[:height, :width]
    radius = (REGION_SHARE * height * width / np.pi) ** 0.5
    window = []
    for micro in range(config.train.gradient_accumulation_steps):
        samples = []
        for number in range(config.train.batch_size):
            centres = random.uniform(radius, (height - radius, width - radius), (count, 2))
            masks = np.stack([(rows - y) ** 2 + (columns - x) ** 2 <= radius**2 for y, x in centres])
            image = np.full((height, width, 3), 127, np.uint8)
            names = tuple(str(k) for k in range(count))
            samples.append(RegionSample("planned", f"{micro}/{number}", image, masks, names, ((),) * count))
        window.append(batch_from_samples(samples, shape, seed=micro))
    return window


def count_step(
    config: Config,
    tokenizer: Any,
    *,
    world_size: int = 1,
    window: Sequence[Batch] | None = None,
    captions: PlannedCaptions | None = None,
    compare_checkpointing: bool = False,
) -> CountedStep:
    """Count one optimiser step of one rank.

    Args:
        config: the configuration; see :func:`plan_config` for what is not covered.
        tokenizer: cuts the texts of prompts and captions.
        world_size: ranks; decides only whether there are DDP buckets.
        window: the micro-batches of the step. None takes :func:`generated_window`, whose micro-batches are alike: one
            is then run through steps 2 and 3 and counted as often as there are.
        captions: what step 1 writes; None takes words, each caption ended by its last token.
        compare_checkpointing: also count what the language model keeps under the other setting.
    """
    config = plan_config(config)
    batches = list(window) if window is not None else generated_window(config)
    writer = captions or PlannedCaptions.of_words(tokenizer)
    model: Any = build_model(config, tokenizer, device="meta")
    rows = MemoryEstimator(config, model, world_size=world_size).estimate(0).rows()
    state = {name: float(size) for name, size in rows.items() if not name.startswith("activations")}
    clock = PhaseClock()
    mode = HollowMode(lambda: clock.current)
    mode.fill(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = mode.reserve(parameter)  # counted as state
    model.train()
    average = ExponentialMovingAverage(trainable_parameters(model), config.train.ema_decay)
    task = DualLoopTask(model, build_prompter(config, tokenizer), config, average)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    step = CountedStep(state, trained, batches)
    with _watched(task, clock), _planned_decoding(task, clock, writer), quiet(), mode, ProductCounter() as counter:
        clock.counter = counter
        clock.start()
        with _autocast(config):
            packed = task.prepare(batches)
        clock.stop()
        step.captioning, step.captions = dict(mode.at_peak), writer.num_written
        run = _Pass(config, task, clock, mode)
        _run_micro_batches(run, packed, step, is_alike=window is None)
        if compare_checkpointing:
            step.language_activations.update([_other_checkpointing(run, packed[0])])
    return step


@dataclass
class _Pass:
    """What steps 2 and 3 are run with."""

    config: Config
    task: DualLoopTask
    clock: PhaseClock
    mode: HollowMode

    def forward(self, rows: PackedBatch) -> Tensor:
        with _autocast(self.config):
            output = self.task(rows)
            return torch.stack([term.total.float() for term in output.terms.values()]).sum()


def _run_micro_batches(run: _Pass, packed: Sequence[PackedBatch], step: CountedStep, is_alike: bool) -> None:
    """Run forward and backward of every micro-batch, or of one, which then counts for all."""
    run.mode.reset_peak()
    before = {phase: (run.clock.flops[phase], run.clock.bytes[phase]) for phase in PHASES}
    for rows in packed[:1] if is_alike else packed:
        run.clock.start()
        loss = run.forward(rows)
        step.language_activations[_setting(run.config)] = float(run.mode.owned.get(LANGUAGE, 0))
        with run.clock.phase("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        run.clock.stop()
        del loss
    step.training = dict(run.mode.at_peak)
    step.row_tokens = [rows.input_ids.numel() for rows in packed]
    repeats = len(packed) - 1 if is_alike else 0
    for phase, (flops, moved) in before.items():
        step.flops[phase] = run.clock.flops[phase] + (run.clock.flops[phase] - flops) * repeats
        step.bytes[phase] = run.clock.bytes[phase] + (run.clock.bytes[phase] - moved) * repeats
    step.bytes["optimiser"] += OPTIMISER_BYTES * step.trained
    step.bytes["EMA"] += EMA_BYTES * step.trained


def _setting(config: Config) -> str:
    return "on" if config.model.gradient_checkpointing else "off"


def _other_checkpointing(run: _Pass, rows: PackedBatch) -> tuple[str, float]:
    """Return the other setting of gradient checkpointing, and the bytes that the language model keeps under it."""
    is_on = run.config.model.gradient_checkpointing
    model = run.task.model
    checkpoint_first(model, 0 if is_on else model.num_layers)
    loss = run.forward(rows)
    kept = float(run.mode.owned.get(LANGUAGE, 0))
    del loss
    return "off" if is_on else "on", kept


@contextmanager
def _watched(task: DualLoopTask, clock: PhaseClock) -> Iterator[None]:
    with ExitStack() as stack:
        for undo in watch_task(task, lambda: clock, lambda rows: None):
            stack.callback(undo)
        yield


@contextmanager
def _planned_decoding(task: DualLoopTask, clock: PhaseClock, writer: PlannedCaptions) -> Iterator[None]:
    """Let step 1 run the first decoding steps of a generation, count the others, and take its captions from elsewhere.

    It lies over the watches, so that what is added belongs to the phase "decode".
    """
    decoder = cast(Any, Decoder)
    write, step = decoder.write, decoder._step
    marks: list[tuple[float, float]] = []

    def marked(own: Decoder, state: Rows) -> None:
        assert clock.counter is not None
        marks.append((clock.counter.flops, clock.counter.bytes))
        if len(marks) > DECODED_STEPS:
            raise _Seen
        step(own, state)

    def planned(own: Decoder, rows: Sequence[int], *_: Any) -> list[list[int]]:
        marks.clear()
        with clock.phase("decode"):
            try:
                write(own, rows)
                assert len(marks) == own.max_new_tokens - 1, "a hollow caption ended early"
            except _Seen:
                _add_steps(clock.counter, marks, own.max_new_tokens - 1)
        return [writer.write(own.max_new_tokens) for _ in rows]

    decoder.write, decoder._step = planned, marked
    try:
        yield
    finally:
        decoder.write, decoder._step = write, step


def _add_steps(counter: ProductCounter | None, marks: Sequence[tuple[float, float]], total: int) -> None:
    """Count decoding steps 3 to ``total`` by the first and the second: each is as much more as the second was."""
    assert counter is not None
    for index, name in enumerate(("flops", "bytes")):
        first, second = (marks[k + 1][index] - marks[k][index] for k in range(DECODED_STEPS))
        missing = total - DECODED_STEPS
        added = missing * second + (second - first) * missing * (missing + 1) / 2
        setattr(counter, name, getattr(counter, name) + added)


def _autocast(config: Config) -> AbstractContextManager[Any]:
    """Return what the accelerator would: autocast of a CPU casts what that of a GPU casts, as far as products go."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = names.get(precision(config))
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the package: planned captions are no captions, and what is said of them concerns nobody."""
    logger = logging.getLogger("dual_loop")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

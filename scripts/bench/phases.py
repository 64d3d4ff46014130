"""Seconds, floating-point operations and bytes of one optimiser step, by phase; each moment belongs to one phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PHASES = (
    *("data", "vision tower", "prompt prefill", "decode", "language forward", "SAM 2 encoder", "mask decoder"),
    *("losses", "backward", "optimiser", "EMA", "other"),
)

Undo = Callable[[], None]


@dataclass
class PhaseClock:
    """Adds up what passes in each phase. A phase inside another one pauses it, but for "backward", which keeps all.

    On a GPU the borders of phases are marked in its own queue, so that nothing waits before :meth:`stop`. A phase
    inside a recorded graph belongs to the one that plays the graph.

    Attributes:
        is_gpu: whether the seconds are those of the GPU's queue.
        seconds, flops, bytes: by phase. ``flops`` and ``bytes`` stay 0 without a counter.
        allocated, reserved: most bytes of the GPU's memory in each phase, where there is a counter: to ask takes time.
        calls: how often each phase was entered.
        counter: what counts operations, if anything does.
    """

    is_gpu: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    bytes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    allocated: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    reserved: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    counter: ProductCounter | None = None
    _stack: list[str] = field(default_factory=lambda: ["other"])
    _last: tuple[float, float, float] = (0.0, 0.0, 0.0)
    _marks: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def current(self) -> str:
        """The phase that the present moment belongs to."""
        return self._stack[-1]

    def start(self) -> None:
        self._last = self._now()
        self._mark("")

    def stop(self) -> None:
        """End the last phase; wait for a GPU."""
        self._book()
        if self.is_gpu:
            torch.cuda.synchronize()
        for (_, before), (name, after) in pairwise(self._marks):
            self.seconds[name] += before.elapsed_time(after) / 1e3
        self._marks.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._stack[-1] == "backward":  # what checkpointing computes again is part of the backward pass
            yield
            return
        self._book()
        self._stack.append(name)
        self.calls[name] += 1
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def _now(self) -> tuple[float, float, float]:
        counted = (self.counter.flops, self.counter.bytes) if self.counter else (0.0, 0.0)
        return (0.0 if self.is_gpu else time.perf_counter(), *counted)

    def _mark(self, name: str) -> None:
        """Mark the end of ``name`` in the GPU's queue."""
        if not self.is_gpu or torch.cuda.is_current_stream_capturing():
            return
        event: Any = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))
        if name and self.counter is not None:
            self.allocated[name] = max(self.allocated[name], torch.cuda.max_memory_allocated())
            self.reserved[name] = max(self.reserved[name], torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()

    def _book(self) -> None:
        now, name = self._now(), self._stack[-1]
        self._mark(name)
        for table, new, old in zip((self.seconds, self.flops, self.bytes), now, self._last, strict=True):
            table[name] += new - old
        self._last = now


class ProductCounter(TorchDispatchMode):
    """Counts the operations of matrix products, attention and convolutions with torch's formulas, and their bytes.

    Bytes are those of the operands and results of these products alone: what must move, however the rest is fused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
            outputs = out if isinstance(out, (tuple, list)) else (out,)
            self.bytes += sum(_bytes_of(value) for value in (*args, *outputs))
        return out


def _bytes_of(value: Any) -> float:
    return float(value.numel() * value.element_size()) if isinstance(value, torch.Tensor) else 0.0


def _packed_flops(x: Any, weight: Any, *_: Any, out_val: Any = None, **__: Any) -> float:
    return float(2 * x.numel() * out_val.shape[-1])


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> float:
    rows = query.numel() / query.shape[-1]
    return float(2.0 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> float:
    return 2.5 * _attention_flops(query, key, value)


def _formulas() -> dict[Any, Callable[..., float]]:
    found: dict[Any, Callable[..., float]] = dict(flop_registry)
    aten = torch.ops.aten
    found.setdefault(aten._scaled_dot_product_flash_attention_for_cpu, _attention_flops)
    found.setdefault(aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward_flops)
    for in_place, stock in ((aten.addmm_, aten.addmm), (aten.baddbmm_, aten.baddbmm)):
        found.setdefault(in_place, found[stock])
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found[torch.ops.mkldnn._linear_pointwise] = _packed_flops
    return found


_FORMULAS = _formulas()


def watch(owner: Any, name: str, clock: Callable[[], PhaseClock], phase: str | Callable[..., str]) -> Undo:
    """Let every call of ``owner.name`` be booked under ``phase`` (a name, or a function of the arguments).

    Returns:
        What ends the watch.
    """
    original = getattr(owner, name)

    @wraps(original)
    def timed(*args: Any, **options: Any) -> Any:
        with clock().phase(phase if isinstance(phase, str) else phase(*args, **options)):
            return original(*args, **options)

    return exchange(owner, name, timed)


def exchange(owner: Any, name: str, new: Any) -> Undo:
    """Put ``new`` in the place of ``owner.name``; return what takes it back."""
    original, was_own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, new)
    return lambda: setattr(owner, name, original) if was_own else delattr(owner, name)


def watch_task(task: Any, clock: Callable[[], PhaseClock], decoded: Callable[[int], None]) -> list[Undo]:
    """Book what a step asks of ``task`` and its model under its phases; return what ends the watches.

    Args:
        task: ``DualLoopTask``.
        clock: gives the clock of the moment.
        decoded: told the rows of every decoding step.
    """
    from dual_loop.model.decode import Decoder

    model = task.model

    repeated = model.repeated

    def counted(step: Any) -> Callable[[], None]:
        # Around a step, not in it: it may be recorded once and played.
        run, rows = repeated(step), len(step.args[0].chosen)

        def call() -> None:
            decoded(rows)
            run()

        return call

    undo = exchange(model, "repeated", counted)
    return [undo] + [
        watch(owner, name, clock, phase)
        for owner, name, phase in (
            (model, "encode_vision", "vision tower"),
            (model, "step_language", "prompt prefill"),
            (Decoder, "write", "decode"),
            (model, "run_language", "language forward"),
            (model, "project_vision", "language forward"),
            (model, "encode_grounding", "SAM 2 encoder"),
            (model.grounding, "finish", "mask decoder"),
            (model.grounding, "decode_prompts", "mask decoder"),
            (task, "forward", "losses"),  # what is left of steps 2 and 3
        )
    ]

"""The accumulation windows of a run on the device, the next one copied ahead where that is asked for.

Pinned memory comes from the loader. On a GPU the copies run on a stream of their own beside the step's kernels; the
step's stream waits for them before it reads. On a CPU a copy ahead changes nothing but the time at which the loader is
asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch

from dual_loop.types import Batch


class WindowFeed:
    """Hands out the micro-batches of one optimiser step after the other.

    Args:
        batches: this rank's micro-batches, on the CPU.
        count: micro-batches of a window.
        device: where they go.
        copies_ahead: whether :meth:`start_next` does anything (``speed.prefetch_to_device``).
    """

    def __init__(self, batches: Iterator[Batch], count: int, device: torch.device, copies_ahead: bool = False) -> None:
        self.batches, self.count, self.device, self.copies_ahead = batches, count, device, copies_ahead
        self._stream: Any = torch.cuda.Stream(device) if copies_ahead and device.type == "cuda" else None
        self._next: list[Batch] | None = None

    def take(self) -> list[Batch]:
        """Return the next window on the device."""
        window = self._next if self._next is not None else self._copy()
        self._next = None
        if self._stream is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self._stream)
            for batch in window:
                _keep_for(batch, computing)
        return window

    def start_next(self) -> None:
        """Start to copy the window after the one that was taken.

        The loader may be waited for here. Call it when the step has work queued, and not after the last step.
        """
        if self.copies_ahead and self._next is None:
            self._next = self._copy()

    def _copy(self) -> list[Batch]:
        with torch.cuda.stream(self._stream):  # of no effect with None
            return [next(self.batches).to(self.device, non_blocking=True) for _ in range(self.count)]


def _keep_for(batch: Batch, stream: Any) -> None:
    """Tell the allocator that ``stream`` reads tensors that were made on another one."""
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            value.record_stream(stream)

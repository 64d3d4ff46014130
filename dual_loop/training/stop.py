"""Signals that stop a run after its step: the trainer saves and leaves."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

# SIGUSR1 is for clusters: torchrun's launcher ends its workers 30 seconds after SIGTERM, done or not. Where it is told
# to ignore SIGUSR1, workers alone hear it and take the time that a step and a checkpoint need.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# torchrun passes a Ctrl-C on to workers that the terminal has told already; that is one wish, not two.
SAME_WISH_SECONDS = 3.0


class StopRequest:
    """Remembers that SIGINT, SIGTERM or SIGUSR1 came, so that the trainer can finish its step, save and leave.

    ``signal_name`` is None as long as none has come. A second one, more than a moment later, ends the process at once.

    Args:
        minutes: after which it is time to stop without a signal; None: never.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.signal_name: str | None = None
        self._deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self._time = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> str | None:
        """Why it is time to stop; None where it is not."""
        return self.signal_name or ("max_time" if time.monotonic() > self._deadline else None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name, self._time = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._time > SAME_WISH_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

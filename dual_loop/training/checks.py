"""What stops a run before it does harm: values that are not finite, memory that runs out, signals."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from dual_loop.errors import DualLoopError, EnvironmentProblem, explain
from dual_loop.training.metrics_log import reduce_sums

MAX_NAMES = 8
# SIGUSR1 is for clusters: torchrun's launcher ends its workers 30 seconds after SIGTERM, done or not. Where it is told
# to ignore SIGUSR1, workers alone hear it and take the time that a step and a checkpoint need.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# torchrun passes a Ctrl-C on to workers that the terminal has told already; that is one wish, not two.
SAME_WISH_SECONDS = 3.0


class NonFiniteError(DualLoopError):
    """A loss or gradient is infinite or not a number; no parameter was changed."""


def find_non_finite(terms: Sequence[Mapping[str, float]], region_names: Sequence[Sequence[str]]) -> list[str]:
    """Return one message for each micro-batch with a loss term that is not finite.

    Args:
        terms: for each micro-batch the value of its loss terms by name.
        region_names: for each micro-batch the names of its regions.
    """
    problems = []
    for index, (values, names) in enumerate(zip(terms, region_names, strict=True)):
        wrong = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            problems.append(f"{', '.join(wrong)} in micro-batch {index} ({_shorten(names)})")
    return problems


def check_finite(
    accelerator: Accelerator, step: int, problems: Sequence[str], grad_norm: float, region_names: Sequence[str]
) -> None:
    """Raise on all ranks when any rank saw a value that is not finite. Call before the update.

    Costs one all-reduce of a flag where all is well.

    Args:
        step: number of the optimiser step, for the message.
        problems: messages of this rank, from :func:`find_non_finite`.
        grad_norm: norm of the gradient on this rank.
        region_names: all regions of this rank in this step; named where only the gradient is wrong.

    Raises:
        NonFiniteError: names the rank, the term and the regions.
    """
    own = list(problems)
    if not own and not math.isfinite(grad_norm):
        own.append(f"gradient norm = {grad_norm}, losses finite, in the regions {_shorten(region_names)}")
    flag = torch.tensor(float(bool(own)), device=accelerator.device)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(flag)
    if not flag.item():
        return
    raise NonFiniteError(
        explain(
            "a loss or gradient is not finite; nothing was updated",
            where=f"optimiser step {step}",
            seen="; ".join(f"rank {rank}: {message}" for rank, message in _from_all_ranks(accelerator, own)),
            expected="finite numbers",
            fix="look at the regions named; lower --learning_rate, check --max_grad_norm, or resume from the last "
            "checkpoint with --mixed_precision no",
        )
    )


@contextmanager
def memory_errors_explained(step: int) -> Iterator[None]:
    """Turn running out of memory into an EnvironmentProblem that says which flags to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(step, error) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise _out_of_memory(step, error) from error


class StopRequest:
    """Remembers that SIGINT, SIGTERM or SIGUSR1 came, so that the trainer can finish its step, save and leave.

    A second signal, more than a moment later, ends the process at once.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
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
    def requested(self) -> bool:
        return self.signal_name is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name, self._time = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._time > SAME_WISH_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _out_of_memory(step: int, error: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(
        explain(
            "out of memory",
            where=f"optimiser step {step}",
            seen=str(error).splitlines()[0],
            fix="lower --batch_size (and raise --gradient_accumulation_steps), --regions_per_image or "
            "--max_new_tokens; or --cfg-options speed.images_at_once=1 model.gradient_checkpointing=True "
            "speed.checkpoint_layers=all loop.rollout_batch_size=8 (loop.max_new_tokens bounds the captions)",
        )
    )


def _from_all_ranks(accelerator: Accelerator, own: list[str]) -> list[tuple[int, str]]:
    gathered = gather_objects(accelerator, own)
    return [(rank, message) for rank, messages in enumerate(gathered) for message in messages]


def gather_objects(accelerator: Accelerator, own: Any) -> list[Any]:
    """Return what every rank gave, in the order of ranks. Only for values that this package made itself."""
    if accelerator.num_processes == 1:
        return [own]
    gathered: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, own)
    return gathered


class RankExchange:
    """The loop's view of the other ranks (``dual_loop.types.Exchange``).

    Args:
        accelerator: whose ranks.
        settle: called before every exchange; ranks that share layers wait for each other there (``sharding.Pace``).
    """

    def __init__(self, accelerator: Accelerator, settle: Callable[[], None] = lambda: None) -> None:
        self.accelerator, self.settle = accelerator, settle

    def reduce(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Add ``sums`` over all ranks in one all-reduce."""
        self.settle()
        return reduce_sums(self.accelerator, sums)

    def gather(self, own: Sequence[str]) -> list[str]:
        """Return the texts of all ranks, rank by rank."""
        self.settle()
        return [text for texts in gather_objects(self.accelerator, list(own)) for text in texts]


def _shorten(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")

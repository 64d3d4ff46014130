"""Where the ranks of a run meet: barriers, comparisons and errors of all, which :mod:`rank_watch` carries out.

On one rank alone nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import Accelerator

from dual_loop.training.rank_watch import Ranks

_ranks: Ranks | None = None


class RankAccelerator(Accelerator):
    """accelerate's, whose ranks wait for each other without a time-out."""

    def wait_for_everyone(self) -> None:
        if _ranks is not None:
            _ranks.meet("a barrier")

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        if not self.is_main_process:
            self.wait_for_everyone()
        yield
        if self.is_main_process:
            self.wait_for_everyone()


def watch(timeout: float) -> None:
    """Let the ranks watch each other from now on, where there are several; call :func:`leave` at the end."""
    global _ranks
    if _ranks is None and dist.is_initialized() and dist.get_world_size() > 1:
        _ranks = Ranks(timeout)


def leave() -> None:
    """End what :func:`watch` began."""
    global _ranks
    if _ranks is not None:
        _ranks.close()
        _ranks = None


def note(doing: str) -> None:
    """Say what this rank does from now on, for the others' messages."""
    if _ranks is not None:
        _ranks.doing = doing


def compare(values: Mapping[str, object]) -> None:
    """Raise ConfigError on all ranks where these values are not the same on all of them."""
    if _ranks is not None:
        _ranks.compare(values)


@contextmanager
def exchange() -> Iterator[None]:
    """Mark a collective, in which the other ranks are waited for."""
    if _ranks is None:
        yield
        return
    _ranks.num_exchanges += 1
    _ranks.exchange = _ranks.num_exchanges
    try:
        yield
    finally:
        _ranks.exchange = 0


@contextmanager
def failing_together() -> Iterator[None]:
    """End all ranks with the error of one; on one rank alone the error passes."""
    try:
        yield
    except Exception as error:
        if _ranks is None:
            raise
        _ranks.fail(error)

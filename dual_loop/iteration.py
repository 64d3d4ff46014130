"""Ways of walking over many things that several packages need, and the bar that shows how far one is."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
BAR_DELAY = 1.0
"""Seconds after which a bar shows itself."""
QUIET = "DUAL_LOOP_QUIET"
"""Set by ``--quiet``, for this process and those that it starts."""


def in_chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of ``size`` items in order; the last one may be shorter. Items are fetched as they are needed."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def evenly_spread(length: int, count: int) -> list[int]:
    """Return at most ``count`` indices of 0..length-1, ascending, first and last among them; all where they fit."""
    if count <= 1:
        return [0][: min(length, count)]
    return sorted({number * (length - 1) // (count - 1) for number in range(count)}) if length else []


def progress_bar(
    describe: str, unit: str, total: int | None = None, items: Iterable[Any] | None = None, done: int = 0
) -> tqdm[Any]:
    """Return a bar on stderr that shows itself after a second, and that goes through ``items`` where they are given.

    It is hidden where stderr is no terminal, by ``--quiet``, and in all processes of a run but the first.
    """
    hidden = not sys.stderr.isatty() or QUIET in os.environ or os.environ.get("RANK", "0") != "0"
    own = {"initial": done, "unit_scale": total is None, "disable": hidden, "delay": BAR_DELAY}
    return tqdm(items, desc=describe, unit=unit, total=total, **own)

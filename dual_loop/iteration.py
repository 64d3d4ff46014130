"""Two ways of walking over many things that several packages need."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


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

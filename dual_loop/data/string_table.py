"""Many strings in two arrays: small in memory, readable without pickle, and at home in a mapped file."""

from __future__ import annotations

import array
from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise

import numpy as np

from dual_loop.iteration import in_chunks

_CHUNK = 4096


class StringTable:
    """Strings by their number.

    Args:
        data: (total bytes,) uint8, the strings one after another in UTF-8.
        offsets: (number of strings + 1,) int64, where each begins.
    """

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        self.data, self.offsets = data, offsets

    @classmethod
    def from_strings(cls, strings: Iterable[str]) -> StringTable:
        """Store ``strings``; file names that are not valid UTF-8 survive (surrogate escapes)."""
        data = bytearray()
        offsets = array.array("q", [0])
        for chunk in in_chunks(strings, _CHUNK):
            try:
                pieces = [string.encode("utf-8", "surrogateescape") for string in chunk]
            except UnicodeEncodeError:
                pieces = [_encode(string) for string in chunk]
            data += b"".join(pieces)
            offsets.extend(accumulate(map(len, pieces), initial=offsets.pop()))
        return cls(np.frombuffer(data, np.uint8), np.frombuffer(offsets, np.int64))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], name: str) -> StringTable:
        """Return the table that :meth:`to_arrays` wrote under ``name``."""
        return cls(arrays[f"{name}_bytes"], arrays[f"{name}_offsets"])

    def to_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Return ``{name_bytes, name_offsets}`` for an index."""
        return {f"{name}_bytes": self.data, f"{name}_offsets": self.offsets}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        piece = self.data[self.offsets[index] : self.offsets[index + 1]]
        return piece.tobytes().decode("utf-8", "surrogateescape")

    def slice(self, start: int, stop: int) -> list[str]:
        """Return strings ``start`` to ``stop`` - 1, faster than one by one."""
        if stop <= start:
            return []
        ends = self.offsets[start : stop + 1].tolist()
        first, data = ends[0], self.data[ends[0] : ends[-1]].tobytes()
        return [data[a - first : b - first].decode("utf-8", "surrogateescape") for a, b in pairwise(ends)]


def _encode(string: str) -> bytes:
    try:
        return string.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # JSON can hold half a pair, which is no name of a file and no text
        return string.encode("utf-8", "replace")

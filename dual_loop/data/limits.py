"""What a file of a data set may ask of this process: which files are opened, how much of them is read or drawn.

A few bytes can claim any size: readers therefore open files by :func:`open_file` (or ask :func:`check_file` where a
library opens by name) and compare sizes with the limits before anything is decoded, drawn or allocated.
"""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO

import numpy as np

from dual_loop.config import DataConfig
from dual_loop.errors import bad_sample

MAX_SIDE = 65_535
"""Longest side of an image or mask in pixels (JPEG's own limit): filters and codes take memory by the side as well."""

SAMPLE_BYTES = 1 << 25
"""Most bytes of JSON that belong to one image or video, or to one line; parsed, they may take 25 times as many."""

_ARRAY_HEADER = 10_000
"""Most bytes of the header of a ``.npy``, numpy's own limit."""

_in_use = DataConfig()
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


class RefusedFile(OSError):
    """A file that is not opened, or not read, for what it is or for its size."""


def use_limits(data: DataConfig) -> None:
    """Take the limits of ``data`` in this process; one that it starts is handed :func:`limits_in_use`."""
    global _in_use
    _in_use = data


def limits_in_use() -> DataConfig:
    """Return the settings that this process takes its limits from."""
    return _in_use


def max_pixels() -> int:
    """Return ``data.max_pixels``."""
    return _in_use.max_pixels


def max_file_bytes() -> int:
    """Return ``data.max_file_mb`` in bytes."""
    return _in_use.max_file_mb << 20


def check_file(path: str | Path) -> int:
    """Return the size of a regular file in bytes; links are followed.

    Raises:
        RefusedFile: it is no regular file (reading a FIFO or a device may never end), or no file can have the name.
        OSError: it is not there, or must not be looked at.
    """
    try:
        state = os.stat(path)
    except ValueError as error:
        raise RefusedFile(f"no file can have this name: {error}") from error
    if not stat.S_ISREG(state.st_mode):
        raise RefusedFile(f"{_KINDS.get(stat.S_IFMT(state.st_mode), 'a folder')}, not a regular file")
    return state.st_size


def open_file(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading; errors are those of :func:`check_file`."""
    check_file(path)
    return open(path, "rb", buffering)  # type: ignore[return-value]


def read_file(path: str | Path, most: int | None = None) -> bytes:
    """Return the contents of a file of at most ``most`` bytes (None: ``data.max_file_mb``), else raise RefusedFile."""
    limit = max_file_bytes() if most is None else most
    with open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            fix = " (data.max_file_mb)" if most is None else ""
            raise RefusedFile(f"{size:,} bytes, more than the limit of {limit:,}{fix}")
        return file.read(limit + 1)


def read_lines(file: IO[AnyStr], most: int = SAMPLE_BYTES) -> Iterator[AnyStr]:
    """Yield the lines of an open file, with their ends; one of more than ``most`` bytes or characters is refused."""
    while line := file.readline(most + 1):
        if len(line) > most:
            raise RefusedFile(f"a line of more than {most:,} bytes")
        yield line


def parse_json(text: bytes | str) -> Any:
    """Return what JSON holds, a byte order mark passed over; every fault of it is a ValueError."""
    try:
        return json.loads(text.removeprefix("\ufeff") if isinstance(text, str) else text)
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"JSON that is nested too deep or too large: {error}") from error


@contextmanager
def of_content(where: str) -> Iterator[None]:
    """Turn what Python raises where a record has a value of another type than it should have into ``broken_json``.

    For code that takes a record apart and nothing else: a fault of the code itself would be taken for one of the data.
    """
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise bad_sample(
            "broken_json", "a record holds another kind of value than it should", where, error, fix="mend or replace it"
        ) from error


def array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and the dtype that the header of a ``.npy`` claims; every fault of it is a ValueError."""
    version = np.lib.format.read_magic(file)
    length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
    if length > _ARRAY_HEADER:
        raise ValueError(f"the header of an array of {length:,} bytes")
    try:
        header = io.BytesIO(length.to_bytes(2, "little") + file.read(length))
        shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    except Exception as error:  # numpy has Python parse it
        raise ValueError(f"the header of an array is damaged: {type(error).__name__}: {error}") from error
    return shape, dtype


def check_pixels(height: int, width: int, where: str, reason: str = "too_large") -> None:
    """Raise ``SampleError`` (``reason``) where an image or mask is larger than the limits, or has no pixel."""
    limit = max_pixels()
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and height * width <= limit):
        seen = f"{width} x {height} pixels (W x H)"
        expected = f"1 to {MAX_SIDE:,} pixels a side, at most {limit:,} in all"
        fix = "leave it out, make it smaller, or raise data.max_pixels"
        raise bad_sample(reason, "the size of an image or mask is out of bounds", where, seen, expected, fix)

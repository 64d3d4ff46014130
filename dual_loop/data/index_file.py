"""Stored arrays of an index: one safetensors file, opened memory-mapped, and the paths whose change makes it stale.

A file holds a dict of numpy arrays and a key in its metadata. It is written under a name of its own and moved into
place: several processes may write the same file without a lock, and whoever has the old one open keeps it. Opening
reads the header alone (https://github.com/huggingface/safetensors, "Format"). A header that does not fit the file, so
also a file that was cut off, counts as no file. Damage inside the arrays is not looked for.

Some arrays (``watched_*``) hold the folders and files that an index was made from with their modification times; a
stored index is used only while all of them are unchanged.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from dual_loop.data.string_table import StringTable
from dual_loop.errors import EnvironmentProblem, explain

WATCHED_STATES = "watched_states"

ANY_SIZE = -1
"""In place of a size: of a folder only the time counts."""

_DTYPES = {
    **{f"I{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": f"<f{size}" for size in (2, 4, 8)},
    "BOOL": "|b1",
}


class StoredArray(np.memmap[Any, Any]):
    """A read-only array in a stored file. A process that gets it by pickle opens the file instead of copying it."""

    stored_as: tuple[str, str, tuple[int, ...]] | None = None

    def __reduce__(self) -> Any:
        # Only the whole array knows where it is stored; a slice or a result is pickled by value.
        return np.asarray(self).__reduce__() if self.stored_as is None else (_open_again, self.stored_as)


def _open_again(path: str, name: str, identity: tuple[int, ...]) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            if _identity(file) == identity:
                return _map_arrays(Path(path), file)[0][name]
            seen = "another file than the one that was opened first"
    except (OSError, ValueError) as error:
        seen = f"{type(error).__name__}: {error}"
    what, fix = "a data index was replaced while processes were starting", "start again"
    raise EnvironmentProblem(explain(what, path, seen, "the same index in all processes", fix))


def watch_files(paths: Iterable[Path], any_size: bool = False) -> dict[str, np.ndarray]:
    """Return ``paths`` with their modification times and sizes as arrays of an index; call it before reading them.

    ``any_size``: they are folders, of which only the time counts.
    """
    states = [(str(path), path.stat()) for path in paths]
    return watched_arrays([(path, s.st_mtime_ns, ANY_SIZE if any_size else s.st_size) for path, s in states])


def watched_arrays(watched: Sequence[tuple[str, int, int]]) -> dict[str, np.ndarray]:
    """Return (path, modification time in ns, size or :data:`ANY_SIZE`) of each path as arrays of an index."""
    table = StringTable.from_strings(path for path, _, _ in watched)
    states = np.array([state for _, *state in watched], np.int64).reshape(-1, 2)
    return {**table.to_arrays("watched"), WATCHED_STATES: states}


def is_current(arrays: Mapping[str, np.ndarray]) -> bool:
    """Say whether all watched paths of an index are as they were; an index without any is always current."""
    if WATCHED_STATES not in arrays:
        return True
    table = StringTable.from_arrays(arrays, "watched")
    for path, (modified, size) in zip(table.slice(0, len(table)), arrays[WATCHED_STATES].tolist(), strict=True):
        try:
            now = os.stat(path)
        except OSError:
            return False
        if now.st_mtime_ns != modified or size not in (ANY_SIZE, now.st_size):
            return False
    return True


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to, which takes the place of ``path`` in one step, or goes where that fails.

    The folder is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], key: str) -> None:
    """Write ``arrays`` and ``key`` to ``path`` in one step; its folder is made where it is missing.

    Raises:
        OSError: it cannot be written. TypeError: an array's dtype is no bool, integer or float.
    """
    codes = {np.dtype(name): code for code, name in _DTYPES.items()}
    odd = [f"{name}: {values.dtype}" for name, values in arrays.items() if values.dtype not in codes]
    if odd:
        raise TypeError(f"an index cannot hold {', '.join(odd)}")
    header: dict[str, object] = {"__metadata__": {"key": key}}
    end = 0
    # Wide items first, as the format advises: every array then begins at a multiple of its item size.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0]))
    for name, values in ordered:
        begin, end = end, end + values.nbytes
        header[name] = {"dtype": codes[values.dtype], "shape": values.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in ordered:
            file.write(np.ascontiguousarray(values).data)  # the library would hold a copy of all arrays


def read_arrays(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Return the arrays at ``path``, mapped read-only; None where there is no whole file that has this key."""
    try:
        with open(path, "rb") as file:
            arrays, stored_key = _map_arrays(path, file)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return None  # whatever is wrong with it, the index can be built again
    return arrays if stored_key == key else None


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _map_arrays(path: Path, file: BinaryIO) -> tuple[dict[str, np.ndarray], str]:
    """Return the arrays and the key of an open safetensors file."""
    with safe_open(path, "np"):  # refuses a header that does not fit the file
        header_size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(header_size))
    key = header.pop("__metadata__")["key"]
    arrays: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        dtype, shape, (begin, end) = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
        if begin == end:
            arrays[name] = np.empty(shape, dtype)  # nothing can be mapped
            arrays[name].flags.writeable = False
            continue
        mapped = StoredArray(file, dtype, "r", 8 + header_size + begin, shape)
        mapped.stored_as = (os.path.abspath(path), name, _identity(file))
        arrays[name] = mapped
    return arrays, key

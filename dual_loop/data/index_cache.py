"""The on-disk index: what a reader learnt by listing its folders, kept as an npz so that the next start is quick.

An index is a dict of numpy arrays. Some of them (``watched_*``) hold the folders and files that it was made from with
their modification times; a stored index is used only while all of them are unchanged (adding, removing or renaming a
file changes the time of its folder). So a second start asks for a few folder times and lists nothing, and a changed
root is noticed. An image overwritten in place does not change a listing, hence no index.

Also here, as every reader needs them: listing a tree, capping the number of samples, and the error for a bad root.
"""

from __future__ import annotations

import array
import hashlib
import json
import os
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dual_loop.errors import ConfigError, explain

INDEX_VERSION = 1
"""Part of every key: raise it when the arrays of any reader change their meaning."""

MAX_WATCHED = 4096
"""Most folders that an index checks at the next start, the upper ones first; deeper changes need a new index."""

CAP_SEED = 20_240_816
"""Seed of the shuffle before a cap. Fixed, so that a capped data set is the same in every run."""

WATCHED_STATES = "watched_states"

_ANY_SIZE = -1
"""In place of a size: of a folder only the time counts."""

_warned_folders: set[str] = set()


class StringTable:
    """Many strings in two arrays: small in memory, shared by forked workers, and readable without pickle.

    Args:
        data: (total bytes,) uint8, the strings one after another in UTF-8.
        offsets: (number of strings + 1,) int64, where each begins.
    """

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        self.data = data
        self.offsets = offsets

    @classmethod
    def from_strings(cls, strings: Iterable[str]) -> StringTable:
        """Store ``strings``; file names that are not valid UTF-8 survive (surrogate escapes)."""
        data = bytearray()
        offsets = array.array("q", [0])
        for string in strings:
            data.extend(string.encode("utf-8", "surrogateescape"))
            offsets.append(len(data))
        return cls(np.frombuffer(bytes(data), np.uint8), np.frombuffer(offsets.tobytes(), np.int64))

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


# --- listing ---------------------------------------------------------------------------------------------------------


class TreeListing:
    """The files below a root, and the folders that were listed, for :meth:`watched_arrays`.

    Args:
        root: folder to list; links to folders are followed, each folder once.
        suffixes: lower-case endings of the wanted files, with the dot. Names that begin with a dot are left out
            (macOS writes a ``._x.jpg`` beside ``x.jpg``).

    Raises:
        ConfigError: a folder below the root cannot be listed.
    """

    def __init__(self, root: Path, suffixes: tuple[str, ...]) -> None:
        self.root = root
        self.files: list[str] = []
        self.folders: list[tuple[str, int, int]] = []
        self._seen: set[tuple[int, int]] = set()
        pending = [""]
        while pending:  # level by level, so that the upper folders come first in ``folders``
            pending = [child for folder in pending for child in self._list_or_explain(folder, suffixes)]
        self.files.sort()

    def _list_or_explain(self, folder: str, suffixes: tuple[str, ...]) -> list[str]:
        try:
            return self._list(folder, suffixes)
        except OSError as error:
            where, fix = str(self.root / folder), "make it readable, or move it out of the data set's folder"
            raise ConfigError(explain("a data folder cannot be listed", where, str(error), fix=fix)) from error

    def _list(self, folder: str, suffixes: tuple[str, ...]) -> list[str]:
        path = self.root / folder
        # The time is taken before the listing: a change in between then makes the index stale, not wrong.
        status = path.stat()
        if (status.st_dev, status.st_ino) in self._seen:
            return []
        self._seen.add((status.st_dev, status.st_ino))
        self.folders.append((str(path), status.st_mtime_ns, _ANY_SIZE))
        children = []
        with os.scandir(path) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    children.append(name)
                elif entry.name.lower().endswith(suffixes):
                    self.files.append(name)
        return sorted(children)

    def watched_arrays(self) -> dict[str, np.ndarray]:
        """Return the listed folders (at most :data:`MAX_WATCHED`) as arrays of an index."""
        return _watched_arrays(self.folders[:MAX_WATCHED])


def watch_files(paths: Iterable[Path]) -> dict[str, np.ndarray]:
    """Return ``paths`` with their modification times and sizes as arrays of an index; call it before reading them."""
    states = [(str(path), path.stat()) for path in paths]
    return _watched_arrays([(path, state.st_mtime_ns, state.st_size) for path, state in states])


def _watched_arrays(watched: list[tuple[str, int, int]]) -> dict[str, np.ndarray]:
    table = StringTable.from_strings(path for path, _, _ in watched)
    states = np.array([state for _, *state in watched], np.int64).reshape(-1, 2)
    return {**table.to_arrays("watched"), WATCHED_STATES: states}


# --- storing ---------------------------------------------------------------------------------------------------------


def default_index_dir() -> Path:
    """Return ``$DUAL_LOOP_CACHE`` where it is set, else ``~/.cache/dual_loop/index``."""
    chosen = os.environ.get("DUAL_LOOP_CACHE")
    return Path(chosen) if chosen else Path("~/.cache/dual_loop/index").expanduser()


def load_or_build(
    index_dir: str | Path | None, key: Mapping[str, Any], build: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the stored index for ``key``, or build and store it.

    Several processes may do this at once without a lock: each writes a file of its own and moves it into place, which
    is atomic, and all of them write the same.

    Args:
        index_dir: folder of the indexes; None takes :func:`default_index_dir`. Where it cannot be written, the index
            is built in memory, with one warning.
        key: reader, absolute root and options, as JSON holds them; the file's name is a hash of it.
        build: makes the arrays; include :meth:`TreeListing.watched_arrays` or :func:`watch_files` in them. An index
            without watched paths never becomes stale.
    """
    folder = default_index_dir() if index_dir is None else Path(index_dir)
    text = json.dumps({**key, "index_version": INDEX_VERSION}, sort_keys=True)
    name = f"{key.get('kind', 'index')}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz"
    stored = _read(folder / name, text)
    if stored is not None and _is_current(stored):
        return stored
    arrays = build()
    _write(folder, name, {**arrays, "key": np.frombuffer(text.encode(), np.uint8)})
    return arrays


def _read(path: Path, key_text: str) -> dict[str, np.ndarray] | None:
    """Return the arrays of an index, None where there is none, or it is damaged, or belongs to another key."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, TypeError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error):
        return None  # whatever is wrong with it, the index can be built again
    if "key" not in arrays or arrays.pop("key").tobytes() != key_text.encode():
        return None
    return arrays


def _is_current(arrays: Mapping[str, np.ndarray]) -> bool:
    if WATCHED_STATES not in arrays:
        return True
    table = StringTable.from_arrays(arrays, "watched")
    for index, (modified, size) in enumerate(arrays[WATCHED_STATES]):
        try:
            now = os.stat(table[index])
        except OSError:
            return False
        if now.st_mtime_ns != modified or size not in (_ANY_SIZE, now.st_size):
            return False
    return True


def _write(folder: Path, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    temporary = folder / f".{name}.{os.getpid()}.{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if str(folder) not in _warned_folders:
            _warned_folders.add(str(folder))
            message = explain(
                "the data index cannot be stored, so every start lists the data folders again",
                str(folder),
                f"{type(error).__name__}: {error}",
                "a folder that can be written",
                "set data.index_dir or $DUAL_LOOP_CACHE",
            )
            warnings.warn(message, stacklevel=3)


# --- shared by the readers -------------------------------------------------------------------------------------------


def choose_capped(num_entries: int, max_samples: int | None, setting: str) -> np.ndarray:
    """Return the kept entries, ascending, (n,) int64: all of them, or ``max_samples`` drawn with a fixed seed.

    The first n in sorted order would be one video, one shard or one kind of object; a shuffle with :data:`CAP_SEED`
    comes first. A smaller cap keeps a subset of what a larger one keeps.

    Raises:
        ConfigError: ``max_samples`` is below 1; the message names ``setting``.
    """
    if max_samples is None:
        return np.arange(num_entries)
    if max_samples < 1:
        fix = "leave the directory out to skip a data set, or the cap to use all of it"
        raise ConfigError(explain("a cap on samples is too small", setting, max_samples, "1 or more, or none", fix))
    return np.sort(np.random.default_rng(CAP_SEED).permutation(num_entries)[:max_samples])


def check_root(root: str | Path, name: str, layout: str) -> Path:
    """Return ``root`` as an absolute path (links kept).

    Raises:
        ConfigError: it is not a folder that can be listed.
    """
    path = Path(os.path.abspath(Path(root).expanduser()))
    if not path.exists():
        raise layout_error(f"the {name} folder does not exist", path, "nothing there", layout)
    if not path.is_dir():
        raise layout_error(f"the {name} folder is not a folder", path, "a file", layout)
    if not os.access(path, os.R_OK | os.X_OK):
        raise layout_error(f"the {name} folder cannot be read", path, "no permission to list it", layout)
    return path


def layout_error(what: str, path: Path, seen: str, layout: str) -> ConfigError:
    """Return the error for a root that does not hold what its reader needs; ``layout`` is a small tree."""
    fix = "give the folder that holds this tree, or leave its flag out to train without this data set"
    return ConfigError(explain(what, str(path), seen, f"this layout\n{layout.rstrip()}\n", fix))

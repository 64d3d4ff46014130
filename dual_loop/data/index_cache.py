"""The on-disk index: what a reader learnt by listing its folders, stored so that the next start is quick.

An index is a dict of numpy arrays in one file (:mod:`~dual_loop.data.index_store`): a second start asks for a few
folder times, lists nothing and reads nothing but what it uses. Long builds go in parts
(:mod:`~dual_loop.data.index_build`).

Also here, as every reader needs them: listing a tree, capping the number of samples, and the error for a bad root.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dual_loop.data.index_build import Arrays, build_in_parts, default_index_dir, index_path, partial_folder
from dual_loop.data.index_store import (
    ANY_SIZE,
    StringTable,
    is_current,
    read_arrays,
    watch_files,
    watched_arrays,
    write_arrays,
)
from dual_loop.errors import ConfigError, explain

__all__ = [
    "StringTable",
    "TreeListing",
    "check_root",
    "choose_capped",
    "default_index_dir",
    "layout_error",
    "load_or_build",
    "watch_files",
]

MAX_WATCHED = 4096
"""Most folders that an index checks at the next start, the upper ones first; deeper changes need a new index."""

CAP_SEED = 20_240_816
"""Seed of the shuffle before a cap. Fixed, so that a capped data set is the same in every run."""

NUM_GROUPS = 64
"""Parts that the folders of a tree are listed in."""

_MANY_FOLDERS = 16
"""As soon as a level of a tree has so many folders, they are listed in parts."""

_warned_folders: set[str] = set()


# --- listing ---------------------------------------------------------------------------------------------------------


class TreeListing:
    """The files below a root, and the folders that were listed, for :meth:`watched_arrays`.

    A wide tree is listed in parts (:func:`~dual_loop.data.index_build.build_in_parts`), in threads, as listing waits
    for the file system. No file is asked for its state, so a folder of a million files is one listing.

    Args:
        root: folder to list; links to folders are followed, each folder once.
        suffixes: lower-case endings of the wanted files, with the dot. Names that begin with a dot are left out
            (macOS writes a ``._x.jpg`` beside ``x.jpg``).
        index_dir, key: those given to :func:`load_or_build`, so that a listing that was killed goes on; without a
            key it is one walk.
        workers: see :func:`~dual_loop.data.index_build.build_in_parts`.

    Attributes:
        files: paths below the root with ``/``, sorted.
        folders: (path, modification time in ns, :data:`~dual_loop.data.index_store.ANY_SIZE`), upper ones first.

    Raises:
        ConfigError: a folder below the root cannot be listed.
    """

    def __init__(
        self,
        root: Path,
        suffixes: tuple[str, ...],
        index_dir: str | Path | None = None,
        key: Mapping[str, Any] | None = None,
        workers: int | None = None,
    ) -> None:
        self.root = root
        walk = _Walk(root, suffixes)
        pending = [""]
        while pending and (key is None or len(pending) < _MANY_FOLDERS):
            pending = walk.list_level(pending)
        found = [walk.as_arrays()]
        if pending and key is not None:
            groups: dict[int, list[str]] = {}
            for folder in pending:
                groups.setdefault(zlib.crc32(os.fsencode(folder)) % NUM_GROUPS, []).append(folder)
            parts = [json.dumps([groups[number], suffixes]) for number in sorted(groups)]
            make = functools.partial(_list_group, str(root), frozenset(walk.seen))
            text = f"listing {root.name}"
            found += build_in_parts(
                parts, make, index_dir, key, workers=workers, threads=True, describe=text, count=_num_files
            )
        self.files, self.folders = _join_listings(root, found)

    def watched_arrays(self) -> dict[str, np.ndarray]:
        """Return the listed folders (at most :data:`MAX_WATCHED`) as arrays of an index."""
        return watched_arrays(self.folders[:MAX_WATCHED])


class _Walk:
    """Lists folders of one tree, each once, level by level."""

    def __init__(self, root: Path, suffixes: tuple[str, ...], seen: frozenset[tuple[int, int]] = frozenset()) -> None:
        self.root, self.suffixes, self.seen = root, suffixes, set(seen)
        self.folders: list[str] = []
        self.identities: list[tuple[int, int]] = []
        self.modified: list[int] = []
        self.num_files: list[int] = []
        self.files: list[str] = []

    def list_level(self, folders: Sequence[str]) -> list[str]:
        """List ``folders`` (below the root) and return those in them."""
        return [child for folder in folders for child in self._list_or_explain(folder)]

    def _list_or_explain(self, folder: str) -> list[str]:
        try:
            return self._list(folder)
        except OSError as error:
            where, fix = str(self.root / folder), "make it readable, or move it out of the data set's folder"
            raise ConfigError(explain("a data folder cannot be listed", where, str(error), fix=fix)) from error

    def _list(self, folder: str) -> list[str]:
        path = self.root / folder
        # The time is taken before the listing: a change in between then makes the index stale, not wrong.
        status = path.stat()
        if (status.st_dev, status.st_ino) in self.seen:
            return []
        self.seen.add((status.st_dev, status.st_ino))
        children, num_before = [], len(self.files)
        with os.scandir(path) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    children.append(name)
                elif entry.name.lower().endswith(self.suffixes):
                    self.files.append(name)
        self.folders.append(folder)
        self.identities.append((status.st_dev, status.st_ino))
        self.modified.append(status.st_mtime_ns)
        self.num_files.append(len(self.files) - num_before)
        return sorted(children)

    def as_arrays(self) -> Arrays:
        """Return tables ``folder`` and ``file``, and by folder ``identities``, ``modified`` (ns) and ``num_files``."""
        return {
            **StringTable.from_strings(self.folders).to_arrays("folder"),
            **StringTable.from_strings(self.files).to_arrays("file"),
            "identities": np.array(self.identities, np.uint64).reshape(-1, 2),
            "modified": np.array(self.modified, np.int64),
            "num_files": np.array(self.num_files, np.int64),
        }


def _list_group(root: str, seen: frozenset[tuple[int, int]], part: str) -> Arrays:
    """List a part of a tree: the folders in ``part`` (JSON: folders, suffixes) and all below them."""
    pending, suffixes = json.loads(part)
    walk = _Walk(Path(root), tuple(suffixes), seen)
    while pending:
        pending = walk.list_level(pending)
    folders = zip(walk.folders, walk.modified, strict=True)
    return {**walk.as_arrays(), **watched_arrays([(f"{root}/{name}", time, ANY_SIZE) for name, time in folders])}


def _num_files(arrays: Mapping[str, np.ndarray]) -> int:
    return int(arrays["num_files"].sum())


def _join_listings(root: Path, found: Sequence[Arrays]) -> tuple[list[str], list[tuple[str, int, int]]]:
    """Return all files, sorted, and all folders; one that two parts reached by links counts where it is highest."""
    listed = []
    for number, arrays in enumerate(found):
        names = StringTable.from_arrays(arrays, "folder")
        starts = np.cumsum(arrays["num_files"]) - arrays["num_files"]
        columns = (arrays["identities"], arrays["modified"], starts, arrays["num_files"])
        for index, (identity, modified, start, length) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            levels = names[index].split("/") if names[index] else []
            listed.append(((len(levels), levels), tuple(identity), modified, number, start, length))
    listed.sort(key=lambda row: row[0])
    tables = [StringTable.from_arrays(arrays, "file") for arrays in found]
    seen: set[tuple[int, int]] = set()
    files: list[str] = []
    folders = []
    for (_, levels), identity, modified, number, start, length in listed:
        if identity not in seen:
            seen.add(identity)
            folders.append((str(root / "/".join(levels)), modified, ANY_SIZE))
            files.extend(tables[number].slice(start, start + length))
    files.sort()
    return files, folders


# --- storing ---------------------------------------------------------------------------------------------------------


def load_or_build(
    index_dir: str | Path | None, key: Mapping[str, Any], build: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the stored index for ``key``, or build and store it.

    Several processes may do this at once without a lock: each writes a file of its own and moves it into place, which
    is atomic, and all of them write the same. The arrays are memory-mapped and read-only, so that any number of
    processes share one copy; a process that gets them by pickle opens the file itself.

    Args:
        index_dir: folder of the indexes; None takes :func:`default_index_dir`. Where it cannot be written, the index
            is built in memory, with one warning.
        key: reader, absolute root and options, as JSON holds them; the file's name is a hash of it.
        build: makes the arrays; include :meth:`TreeListing.watched_arrays` or :func:`watch_files` in them. An index
            without watched paths never becomes stale.
    """
    path, text = index_path(index_dir, key)
    stored = read_arrays(path, text)
    if stored is not None and is_current(stored):
        return stored
    arrays = build()
    try:
        write_arrays(path, arrays, text)
    except OSError as error:
        _warn_not_stored(path.parent, error)
        return arrays
    # Only now: until the index is stored, its parts are what a build that is killed goes on from.
    shutil.rmtree(partial_folder(index_dir, key), ignore_errors=True)
    stored = read_arrays(path, text)
    return arrays if stored is None else stored


def _warn_not_stored(folder: Path, error: OSError) -> None:
    if str(folder) in _warned_folders:
        return
    _warned_folders.add(str(folder))
    message = explain(
        "the data index cannot be stored, so every start lists the data folders again",
        str(folder),
        f"{type(error).__name__}: {error}",
        "a folder that can be written",
        "set data.index_dir or $DUAL_LOOP_CACHE",
    )
    warnings.warn(message, stacklevel=4)


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

"""The on-disk index: what a reader learnt by listing its folders, stored so that the next start is quick.

An index is a dict of numpy arrays in one file (:mod:`~dual_loop.data.index_file`): a second start asks for a few
folder times, lists nothing and reads nothing but what it uses.

A long build goes in parts (an archive, or some folders of a tree), several at once. A finished part is stored beside
the index, in ``<index>.partial/``, so that a build that was killed goes on from there; :func:`load_or_build` removes
this folder. :mod:`~dual_loop.data.sa1b` shows the whole of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dual_loop.data.index_file import ANY_SIZE, WATCHED_STATES, is_current, read_arrays, watched_arrays, write_arrays
from dual_loop.data.limits import limits_in_use, use_limits
from dual_loop.data.string_table import StringTable
from dual_loop.errors import ConfigError, EnvironmentProblem, explain
from dual_loop.iteration import progress_bar

INDEX_VERSION = 2
"""Part of every key: raise it when the arrays of any reader change their meaning."""

MAX_WORKERS = 8
"""Most workers unless a number is given: more do not make one disk faster."""

PATIENCE = 2.0
"""Seconds of building in this process before others are started, unless a number of workers is given."""

Arrays = dict[str, np.ndarray]
Key = Mapping[str, object]
"""Reader, absolute root and options of an index, as JSON holds them."""

MAX_WATCHED = 1_000_000
"""Most folders that an index checks at the next start, the upper ones first; deeper changes need a new index."""

CHECKED: dict[str, tuple[int, float]] = {}
"""Of each kind of index that was found: how many paths were looked at for changes, and the seconds that took."""

NUM_GROUPS, _MANY_FOLDERS = 64, 16
"""As soon as a level of a tree has so many folders as the second, they are listed in so many parts as the first."""

_warned_folders: set[str] = set()


def load_or_build(
    index_dir: str | Path | None, key: Key, build: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the stored index for ``key``, or build and store it.

    Several processes may do this at once: all write the same, and move it into place. The arrays are memory-mapped and
    read-only, so that processes share one copy.

    Args:
        index_dir: folder of the indexes; None takes that of :func:`index_folder`. Where it cannot be written, the index
            is built in memory, with one warning.
        key: reader, absolute root and options, as JSON holds them; the file's name is a hash of it.
        build: makes the arrays, with those of :func:`list_tree` or :func:`watch_files`, without which an index never
            becomes stale.
    """
    path, text = index_path(index_dir, key)
    started = time.monotonic()
    stored = _read_current(path, text)
    if stored is not None:
        if WATCHED_STATES in stored:
            CHECKED[str(key.get("kind"))] = len(stored[WATCHED_STATES]), time.monotonic() - started
        return stored
    arrays = build()
    try:
        write_arrays(path, arrays, text)
    except OSError as error:
        if str(path.parent) not in _warned_folders:
            _warned_folders.add(str(path.parent))
            what = "the data index cannot be stored, so every start lists the data folders again"
            fix = "set data.index_dir or $DUAL_LOOP_CACHE"
            warnings.warn(explain(what, str(path.parent), error, "a folder that can be written", fix), stacklevel=3)
        return arrays
    # Only now: until the index is stored, its parts are what a build that is killed goes on from.
    shutil.rmtree(partial_folder(index_dir, key), ignore_errors=True)
    stored = read_arrays(path, text)
    return arrays if stored is None else stored


def index_folder(index_dir: str | Path | None) -> Path:
    """Return ``index_dir``, else ``$DUAL_LOOP_CACHE`` where it is set, else ``~/.cache/dual_loop/index``."""
    return Path(index_dir or os.environ.get("DUAL_LOOP_CACHE") or "~/.cache/dual_loop/index").expanduser()


def index_path(index_dir: str | Path | None, key: Key) -> tuple[Path, str]:
    """Return where the index of ``key`` is stored, and the key as text."""
    text = json.dumps({**key, "index_version": INDEX_VERSION}, sort_keys=True)
    return index_folder(index_dir) / f"{key.get('kind', 'index')}-{_digest(text)}.safetensors", text


def partial_folder(index_dir: str | Path | None, key: Key) -> Path:
    """Return the folder of the finished parts of the index of ``key``."""
    return index_path(index_dir, key)[0].with_suffix(".partial")


def build_in_parts(
    parts: Sequence[str],
    build_part: Callable[[str], Arrays],
    index_dir: str | Path | None,
    key: Key,
    *,
    workers: int | None = None,
    threads: bool = False,
    describe: str = "index",
    count: Callable[[Arrays], int] | None = None,
) -> list[Arrays]:
    """Return what ``build_part`` returns for each part, in the order of ``parts``; stored parts are not built again.

    Args:
        parts: names of the parts, each once; all that ``build_part`` needs to know beside its own constants.
        build_part: makes the arrays of a part, with the watched paths. For processes it must be a function at the top
            of a module, or a ``functools.partial`` of one.
        index_dir, key: those given to :func:`load_or_build`. A folder that cannot be written leaves parts in memory.
        workers: how many parts are built at once. None takes one until :data:`PATIENCE` is over, then
            :func:`default_workers`. A loader worker always takes one.
        threads: build in threads, for work that waits for the file system; else in spawned processes.
        describe, count: text before the progress bar; from the arrays of a part to its number of entries.

    Raises:
        ValueError: a part is there twice, or ``workers`` is below 1. EnvironmentProblem: a worker process was killed.
        Exception: what ``build_part`` raises; the parts that were finished stay stored.
    """
    if len(set(parts)) != len(parts) or (workers is not None and workers < 1):
        raise ValueError(f"parts must differ and workers be 1 or more, seen {len(parts)} parts, {workers=}")
    _, text = index_path(index_dir, key)
    folder = partial_folder(index_dir, key)
    places = {part: (folder / f"{_digest(part)}.safetensors", f"{text}\n{json.dumps(part)}") for part in parts}
    built: dict[str, Arrays] = {}
    with progress_bar(describe, "part", total=len(parts)) as bar:
        for part, arrays in _built_parts(build_part, places, workers, threads):
            built[part] = arrays
            if count:
                bar.set_postfix_str(f"{sum(map(count, built.values())):,} entries", refresh=False)
            bar.update()
    return [built[part] for part in parts]


def join_parts(parts: Sequence[Mapping[str, np.ndarray]]) -> Arrays:
    """Return the parts as one: string tables (``<name>_bytes`` with ``<name>_offsets``) and arrays, end to end.

    Arrays that count rows or bytes of their own part must be moved on before. ValueError where names differ.
    """
    if not parts or any(part.keys() != parts[0].keys() for part in parts):
        raise ValueError(f"parts must have the same arrays, seen {[sorted(part) for part in parts[:9]]}")
    joined: Arrays = {}
    for name in parts[0]:
        if name.endswith("_offsets") and f"{name.removesuffix('_offsets')}_bytes" in parts[0]:
            starts = np.cumsum([0, *(int(part[name][-1]) for part in parts)])
            moved = [part[name][1:] + start for part, start in zip(parts, starts, strict=False)]
            joined[name] = np.concatenate([np.zeros(1, np.int64), *moved])
        else:
            joined[name] = np.concatenate([np.asarray(part[name]) for part in parts])
    return joined


def default_workers() -> int:
    """Return one worker a core of this machine, shared by its ranks, 1 to :data:`MAX_WORKERS`."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, num_cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:20]


def _built_parts(
    build_part: Callable[[str], Arrays], places: dict[str, tuple[Path, str]], workers: int | None, threads: bool
) -> Iterator[tuple[str, Arrays]]:
    """Yield parts as they are finished: the first ones from this process, the rest from workers where it takes long."""
    pending = list(reversed(places))
    wanted = default_workers() if workers is None else workers
    if multiprocessing.current_process().daemon and not threads:
        wanted = 1  # a loader worker may not have children

    def finished(part: str, arrays: Arrays | None) -> tuple[str, Arrays]:
        # The file is gone where another process has stored the whole index meanwhile and cleared up.
        arrays = read_arrays(*places[part]) if arrays is None else arrays
        return part, build_part(part) if arrays is None else arrays

    started = time.monotonic()
    while pending and (wanted == 1 or (workers is None and time.monotonic() - started < PATIENCE)):
        part = pending.pop()
        yield finished(part, _make_part(build_part, part, *places[part]))
    if not pending:
        return
    wanted = min(wanted, len(pending))
    # A forked child of a process that has threads (torch, CUDA) may hang; a spawned one starts clean.
    spawn = multiprocessing.get_context("spawn")
    pool = ThreadPoolExecutor(wanted) if threads else ProcessPoolExecutor(wanted, spawn, use_limits, (limits_in_use(),))
    try:
        futures = {pool.submit(_make_part, build_part, part, *places[part]): part for part in reversed(pending)}
        for future in as_completed(futures):
            yield finished(futures[future], future.result())
    except BrokenProcessPool as error:
        what = "a process that builds a data index ended unexpectedly"
        fix = "start again: finished parts are kept. Where memory ran out, give fewer workers; in your own script, "
        fix += 'start under `if __name__ == "__main__":`'
        folder = str(next(iter(places.values()))[0].parent)
        raise EnvironmentProblem(explain(what, folder, str(error), "an end with a result", fix)) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _read_current(path: Path, key: str) -> Arrays | None:
    arrays = read_arrays(path, key)
    return arrays if arrays is not None and is_current(arrays) else None


def _make_part(build_part: Callable[[str], Arrays], part: str, path: Path, key: str) -> Arrays | None:
    """Build and store a part unless it is there; return None, or the arrays where they cannot be stored."""
    if _read_current(path, key) is not None:
        return None  # an earlier build left it, or another process was faster
    arrays = build_part(part)
    try:
        write_arrays(path, arrays, key)
    except OSError:
        return arrays  # load_or_build warns when it cannot store the whole index either
    return None


def list_tree(
    root: Path, suffixes: tuple[str, ...], index_dir: str | Path | None, key: Key
) -> tuple[list[str], Arrays]:
    """List the files below ``root``; a wide tree in parts (:func:`build_in_parts`), by threads, as listing waits.

    No file is asked for its state, so a folder of a million files is one listing. Links to folders are followed, each
    folder once. Names that begin with a dot are left out (macOS writes a ``._x.jpg`` beside ``x.jpg``).

    Args:
        suffixes: lower-case endings of the wanted files, with the dot.
        index_dir, key: those given to :func:`load_or_build`, so that a listing that was killed goes on.

    Returns:
        The paths below the root with ``/``, sorted, and the listed folders (at most :data:`MAX_WATCHED`, upper ones
        first) as watched paths of an index.

    Raises:
        ConfigError: a folder below the root cannot be listed.
    """
    seen: set[tuple[int, int]] = set()
    found, pending = _walk(root, [""], suffixes, seen, _MANY_FOLDERS)
    if pending:
        groups: dict[int, list[str]] = {}
        for name in pending:
            groups.setdefault(zlib.crc32(os.fsencode(name)) % NUM_GROUPS, []).append(name)
        names = [json.dumps([groups[number], suffixes]) for number in sorted(groups)]
        make = functools.partial(_list_group, str(root), frozenset(seen))
        text, count = f"listing {root.name}", lambda part: int(part["num_files"].sum())
        parts = build_in_parts(names, make, index_dir, key, threads=True, describe=text, count=count)
        found += [folder for part in parts for folder in _unpack(part)]
    found.sort(key=lambda folder: (folder.name.count("/"), folder.name.split("/")))
    # A folder that two parts reached by links counts where it is highest.
    highest: dict[tuple[int, int], _Folder] = {}
    for folder in found:
        highest.setdefault(folder.identity, folder)
    folders = list(highest.values())
    files = sorted(file for folder in folders for file in folder.files)
    return files, _watched(root, folders[:MAX_WATCHED])


class _Folder(NamedTuple):
    """A folder that was listed: its name and those of its wanted files below the root, device and inode, time in ns."""

    name: str
    identity: tuple[int, int]
    modified: int
    files: list[str]


def _watched(root: Path, folders: Sequence[_Folder]) -> Arrays:
    return watched_arrays([(str(root / folder.name), folder.modified, ANY_SIZE) for folder in folders])


def _walk(
    root: Path, pending: list[str], suffixes: tuple[str, ...], seen: set[tuple[int, int]], limit: int | None = None
) -> tuple[list[_Folder], list[str]]:
    """List folders that are not in ``seen``, level by level, until a level has ``limit``; return that level too."""
    found: list[_Folder] = []
    while pending and (limit is None or len(pending) < limit):
        below: list[str] = []
        for name in pending:
            try:
                # The time is taken before the listing: a change in between then makes the index stale, not wrong.
                status = (root / name).stat()
                identity = (status.st_dev, status.st_ino)
                if identity in seen:
                    continue
                seen.add(identity)
                prefix, children, files = f"{name}/" if name else "", [], []
                with os.scandir(root / name) as entries:
                    for entry in entries:
                        if entry.name.startswith("."):
                            continue
                        if entry.is_dir():
                            children.append(prefix + entry.name)
                        elif entry.name.lower().endswith(suffixes):
                            files.append(prefix + entry.name)
            except OSError as error:
                where, fix = str(root / name), "make it readable, or move it out of the data set's folder"
                raise ConfigError(explain("a data folder cannot be listed", where, str(error), fix=fix)) from error
            below += sorted(children)
            found.append(_Folder(name, identity, status.st_mtime_ns, files))
        pending = below
    return found, pending


def _list_group(root: str, seen: frozenset[tuple[int, int]], part: str) -> Arrays:
    """List a part of a tree: the folders in ``part`` (JSON: folders, suffixes) and all below them."""
    pending, suffixes = json.loads(part)
    found, _ = _walk(Path(root), pending, tuple(suffixes), set(seen))
    return {
        **StringTable.from_strings(folder.name for folder in found).to_arrays("folder"),
        **StringTable.from_strings(file for folder in found for file in folder.files).to_arrays("file"),
        "identities": np.array([folder.identity for folder in found], np.uint64).reshape(-1, 2),
        "num_files": np.array([len(folder.files) for folder in found], np.int64),
        **_watched(Path(root), found),
    }


def _unpack(arrays: Arrays) -> Iterator[_Folder]:
    """Yield the folders that :func:`_list_group` packed."""
    names, files = StringTable.from_arrays(arrays, "folder"), StringTable.from_arrays(arrays, "file")
    ends = np.cumsum(arrays["num_files"]).tolist()
    states = zip(arrays["identities"].tolist(), arrays[WATCHED_STATES].tolist(), [0, *ends], ends, strict=False)
    for number, (identity, (modified, _), start, end) in enumerate(states):
        yield _Folder(names[number], tuple(identity), modified, files.slice(start, end))

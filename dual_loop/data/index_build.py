"""Building an index in parts: in parallel, with a progress bar, and resumable.

A part is what one call of a function reads: an archive, or some folders of a tree. A finished part is stored at once
beside the index, in ``<index>.partial/``; a build that was killed goes on from there. A stored part is used only
while the paths that it watches (:func:`~dual_loop.data.index_store.watch_files`) are unchanged.
:func:`~dual_loop.data.index_cache.load_or_build` removes the folder once the whole index is stored.

A reader of archives::

    def _list_archive(path: str) -> dict[str, np.ndarray]:          # at the top of a module: workers import it
        watched = watch_files([Path(path)])
        return {**StringTable.from_strings(names_in(path)).to_arrays("name"), **watched}

    def build() -> dict[str, np.ndarray]:
        return join_parts(build_in_parts(archives, _list_archive, index_dir, key, describe="SA-1B archives"))

    arrays = load_or_build(index_dir, key, build)
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dual_loop.data.index_store import StringTable, is_current, read_arrays, write_arrays
from dual_loop.errors import EnvironmentProblem, explain

INDEX_VERSION = 2
"""Part of every key: raise it when the arrays of any reader change their meaning."""

MAX_WORKERS = 8
"""Most workers unless a number is given: more do not make one disk faster."""

PATIENCE = 2.0
"""Seconds of building in this process before others are started, unless a number of workers is given."""

Arrays = dict[str, np.ndarray]


def default_index_dir() -> Path:
    """Return ``$DUAL_LOOP_CACHE`` where it is set, else ``~/.cache/dual_loop/index``."""
    chosen = os.environ.get("DUAL_LOOP_CACHE")
    return Path(chosen) if chosen else Path("~/.cache/dual_loop/index").expanduser()


def index_path(index_dir: str | Path | None, key: Mapping[str, Any]) -> tuple[Path, str]:
    """Return where the index of ``key`` is stored, and the key as text (None: :func:`default_index_dir`)."""
    folder = default_index_dir() if index_dir is None else Path(index_dir)
    text = json.dumps({**key, "index_version": INDEX_VERSION}, sort_keys=True)
    return folder / f"{key.get('kind', 'index')}-{_digest(text)}.safetensors", text


def partial_folder(index_dir: str | Path | None, key: Mapping[str, Any]) -> Path:
    """Return the folder of the finished parts of the index of ``key``."""
    path, _ = index_path(index_dir, key)
    return path.with_suffix(".partial")


def build_in_parts(
    parts: Sequence[str],
    build_part: Callable[[str], Arrays],
    index_dir: str | Path | None,
    key: Mapping[str, Any],
    *,
    workers: int | None = None,
    threads: bool = False,
    describe: str = "index",
    count: Callable[[Mapping[str, np.ndarray]], int] | None = None,
) -> list[Arrays]:
    """Return what ``build_part`` returns for each part, in the order of ``parts``; stored parts are not built again.

    Several processes may build the same index at once: each takes over the parts that another has finished.

    Args:
        parts: names of the parts, each once; all that ``build_part`` needs to know beside its own constants.
        build_part: makes the arrays of a part; include the watched paths. For processes it must be a function at
            the top of a module, or a ``functools.partial`` of one.
        index_dir, key: those given to :func:`~dual_loop.data.index_cache.load_or_build`. Where the folder cannot be
            written, the parts are kept in memory.
        workers: how many parts are built at once. None takes one until :data:`PATIENCE` is over, then one a core
            (shared by the ranks of a machine, at most :data:`MAX_WORKERS`). A loader worker always takes one.
        threads: build in threads, for work that waits for the file system; else in spawned processes.
        describe: text before the progress bar, which is shown on a terminal by the first process of a run.
        count: number of entries in the arrays of a part, for the bar.

    Raises:
        ValueError: a part is there twice, or ``workers`` is below 1.
        EnvironmentProblem: a worker process was killed.
        Exception: what ``build_part`` raises; the parts that were finished stay stored.
    """
    if len(set(parts)) != len(parts) or (workers is not None and workers < 1):
        raise ValueError(f"parts must differ and workers be 1 or more, seen {len(parts)} parts, {workers=}")
    _, text = index_path(index_dir, key)
    folder = partial_folder(index_dir, key)
    places = {part: (folder / f"{_digest(part)}.safetensors", f"{text}\n{json.dumps(part)}") for part in parts}
    built = {part: arrays for part in parts if (arrays := _read_part(*places[part])) is not None}
    missing = [part for part in parts if part not in built]
    with progress_bar(describe, "part", total=len(parts), initial=len(built)) as bar:
        num_entries = sum(count(arrays) for arrays in built.values()) if count else 0
        for part, arrays in _build_missing(missing, build_part, places, workers, threads):
            built[part] = arrays
            if count:
                num_entries += count(arrays)
                bar.set_postfix_str(f"{num_entries:,} entries", refresh=False)
            bar.update()
    return [built[part] for part in parts]


def join_parts(parts: Sequence[Mapping[str, np.ndarray]]) -> Arrays:
    """Return the parts as one: string tables (``<name>_bytes`` with ``<name>_offsets``) and arrays, end to end.

    Watched paths join like any table. Arrays that count rows or bytes of their own part must be moved on before.

    Raises:
        ValueError: there is no part, or the parts have different names.
    """
    if not parts or any(part.keys() != parts[0].keys() for part in parts):
        raise ValueError(f"parts must have the same arrays, seen {[sorted(part) for part in parts[:9]]}")
    tables = [name.removesuffix("_bytes") for name in parts[0] if name.endswith("_bytes")]
    tables = [name for name in tables if f"{name}_offsets" in parts[0]]
    joined: Arrays = {}
    for name in tables:
        joined |= StringTable.join([StringTable.from_arrays(part, name) for part in parts]).to_arrays(name)
    for name in parts[0].keys() - joined.keys():
        joined[name] = np.concatenate([np.asarray(part[name]) for part in parts])
    return joined


def progress_bar(describe: str, unit: str, total: int | None = None, initial: int = 0) -> tqdm[Any]:
    """Return a bar on stderr, hidden where that is no terminal and in all processes of a run but the first."""
    hidden = not (sys.stderr.isatty() and os.environ.get("RANK", "0") == "0")
    return tqdm(total=total, initial=initial, desc=describe, unit=unit, unit_scale=total is None, disable=hidden)


def default_workers() -> int:
    """Return one worker a core of this machine, shared by its ranks, 1 to :data:`MAX_WORKERS`."""
    try:
        num_cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        num_cores = os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, num_cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:20]


def _build_missing(
    missing: Sequence[str],
    build_part: Callable[[str], Arrays],
    places: Mapping[str, tuple[Path, str]],
    workers: int | None,
    threads: bool,
) -> Iterator[tuple[str, Arrays]]:
    """Yield parts as they are finished: the first ones from this process, the rest from workers where it takes long."""
    pending = list(reversed(missing))
    wanted = default_workers() if workers is None else workers
    if multiprocessing.current_process().daemon and not threads:
        wanted = 1  # a loader worker may not have children
    started = time.monotonic()
    while pending and (wanted == 1 or (workers is None and time.monotonic() - started < PATIENCE)):
        part = pending.pop()
        yield part, _finish(_make_part(build_part, part, *places[part]), build_part, part, *places[part])
    if not pending:
        return
    pool = _pool(min(wanted, len(pending)), threads)
    try:
        futures = {pool.submit(_make_part, build_part, part, *places[part]): part for part in reversed(pending)}
        for future in as_completed(futures):
            part = futures[future]
            yield part, _finish(future.result(), build_part, part, *places[part])
    except BrokenProcessPool as error:
        what = "a process that builds a data index ended unexpectedly"
        fix = (
            "start again: finished parts are kept. Where memory ran out, give fewer workers; in a script of your own, "
            'start under `if __name__ == "__main__":`'
        )
        folder = str(next(iter(places.values()))[0].parent)
        raise EnvironmentProblem(explain(what, folder, str(error), "an end with a result", fix)) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int, threads: bool) -> Executor:
    if threads:
        return ThreadPoolExecutor(workers)
    # A forked child of a process that has threads (torch, CUDA) may hang; a spawned one starts clean.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _read_part(path: Path, key: str) -> Arrays | None:
    arrays = read_arrays(path, key)
    return arrays if arrays is not None and is_current(arrays) else None


def _make_part(build_part: Callable[[str], Arrays], part: str, path: Path, key: str) -> Arrays | None:
    """Build and store a part; return None, or the arrays where they cannot be stored."""
    if _read_part(path, key) is not None:
        return None  # another process was faster
    arrays = build_part(part)
    try:
        write_arrays(path, arrays, key)
    except OSError:
        return arrays  # load_or_build warns when it cannot store the whole index either
    return None


def _finish(arrays: Arrays | None, build_part: Callable[[str], Arrays], part: str, path: Path, key: str) -> Arrays:
    """Return the arrays of a part that was made: as they came, or from its file.

    The file is gone where another process has stored the whole index meanwhile and cleared up: then it is built here.
    """
    if arrays is None:
        arrays = read_arrays(path, key)
    return build_part(part) if arrays is None else arrays

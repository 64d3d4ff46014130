"""Building an index in parts: in this process, threads and processes; going on after a kill; parts that became old."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from dual_loop.data import index_build
from dual_loop.data.index_build import build_in_parts, join_parts, partial_folder
from dual_loop.data.index_cache import load_or_build
from dual_loop.data.index_store import StoredArray, StringTable, watch_files
from dual_loop.errors import ConfigError, EnvironmentProblem

KEY = {"kind": "test", "root": "somewhere"}
Arrays = dict[str, np.ndarray]


def read_lines(part: str) -> Arrays:
    """A reader of text files: one entry a line; a line ``fail`` is refused, a line ``die`` kills the process."""
    path = Path(part)
    watched = watch_files([path])
    lines = path.read_text().split()
    with path.with_suffix(".log").open("a") as log:
        log.write(f"{os.getpid()}\n")
    if "fail" in lines:
        raise ConfigError(f"{part} is refused")
    if "die" in lines:
        os.kill(os.getpid(), signal.SIGKILL)
    return {**StringTable.from_strings(lines).to_arrays("line"), "length": np.array([len(n) for n in lines]), **watched}


def read_slowly(part: str) -> Arrays:
    time.sleep(0.2)
    return read_lines(part)


def write_parts(folder: Path, num_parts: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.txt" for number in range(num_parts)]
    for number, path in enumerate(paths):
        path.write_text("\n".join(f"line{number}.{index}" for index in range(number)))
    return [str(path) for path in paths]


def lines_of(arrays: Mapping[str, np.ndarray]) -> list[str]:
    table = StringTable.from_arrays(arrays, "line")
    return table.slice(0, len(table))


def builders(part: str) -> list[int]:
    """The processes that built a part, in order."""
    log = Path(part).with_suffix(".log")
    return [int(line) for line in log.read_text().split()] if log.exists() else []


@pytest.mark.parametrize(("workers", "threads"), [(None, False), (1, False), (2, False), (3, True)])
def test_parts_come_in_order_and_are_built_once(tmp_path: Path, workers: int | None, threads: bool) -> None:
    parts = write_parts(tmp_path / "data", 5)
    for _ in range(2):
        found = build_in_parts(parts, read_lines, tmp_path / "cache", KEY, workers=workers, threads=threads)
        assert [len(lines_of(arrays)) for arrays in found] == [0, 1, 2, 3, 4]
        assert all(isinstance(arrays["length"], StoredArray) for arrays in found[1:]), "finished parts stay on disk"
    assert [len(builders(part)) for part in parts] == [1] * 5
    in_other_processes = {pid for part in parts for pid in builders(part)} - {os.getpid()}
    assert bool(in_other_processes) == (workers == 2)


def test_joined_parts_are_the_whole(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "data", 4)
    whole = join_parts(build_in_parts(parts, read_lines, tmp_path / "cache", KEY))
    expected = [line for part in parts for line in Path(part).read_text().split()]
    assert lines_of(whole) == expected
    assert whole["length"].tolist() == [len(line) for line in expected]
    watched = StringTable.from_arrays(whole, "watched")
    assert watched.slice(0, len(watched)) == parts
    assert whole["watched_states"].shape == (4, 2)
    for wrong in ([], [{"a": np.arange(2)}, {"b": np.arange(2)}]):
        with pytest.raises(ValueError, match="same arrays"):
            join_parts(wrong)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_that_failed_goes_on_from_its_parts(tmp_path: Path, workers: int) -> None:
    parts = write_parts(tmp_path / "data", 4)
    Path(parts[3]).write_text("fail")
    with pytest.raises(ConfigError, match=r"3\.txt is refused"):
        build_in_parts(parts, read_lines, tmp_path / "cache", KEY, workers=workers)
    num_before = len(list(partial_folder(tmp_path / "cache", KEY).iterdir()))
    Path(parts[3]).write_text("mended")
    found = build_in_parts(parts, read_lines, tmp_path / "cache", KEY, workers=workers)
    assert lines_of(found[3]) == ["mended"]
    assert sum(len(builders(part)) for part in parts[:3]) <= 3 + 3 - num_before
    assert num_before == 3 or workers == 2


def test_a_killed_build_goes_on_from_its_parts(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "data", 30)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_index_build as t; from pathlib import Path\n"
        "t.build_in_parts(sys.argv[3:], t.read_slowly, sys.argv[2], t.KEY, workers=1)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "cache"), *parts]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    folder = partial_folder(tmp_path / "cache", KEY)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(folder.glob("[!.]*"))) < 2:
        time.sleep(0.05)
    process.kill()
    process.wait()
    num_finished = len(list(folder.glob("[!.]*")))
    assert 2 <= num_finished < 30
    found = build_in_parts(parts, read_lines, tmp_path / "cache", KEY)
    assert [len(lines_of(arrays)) for arrays in found] == list(range(30))
    own = [part for part in parts if os.getpid() in builders(part)]
    assert len(own) == 30 - num_finished


def test_a_killed_worker_is_explained_and_its_mates_parts_are_kept(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "data", 3)
    Path(parts[2]).write_text("die")
    with pytest.raises(EnvironmentProblem, match=r"ended unexpectedly.*finished parts are kept"):
        build_in_parts(parts, read_lines, tmp_path / "cache", KEY, workers=2)
    assert builders(parts[2]) != [os.getpid()]


def test_a_changed_part_alone_is_built_again(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "data", 4)
    build_in_parts(parts, read_lines, tmp_path / "cache", KEY)
    Path(parts[1]).write_text("another longer line")
    found = build_in_parts(parts, read_lines, tmp_path / "cache", KEY)
    assert lines_of(found[1]) == ["another", "longer", "line"]
    assert [len(builders(part)) for part in parts] == [1, 2, 1, 1]


@pytest.mark.parametrize("damage", [b"", b"\xff" * 40, None])
def test_a_damaged_part_is_built_again(tmp_path: Path, damage: bytes | None) -> None:
    parts = write_parts(tmp_path / "data", 2)
    build_in_parts(parts, read_lines, tmp_path / "cache", KEY)
    for stored in partial_folder(tmp_path / "cache", KEY).iterdir():
        stored.write_bytes(stored.read_bytes()[:-1] if damage is None else damage)
    found = build_in_parts(parts, read_lines, tmp_path / "cache", KEY)
    assert lines_of(found[1]) == ["line1.0"]
    assert [len(builders(part)) for part in parts] == [2, 2]


def test_keys_have_parts_of_their_own(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "data", 2)
    for key in (KEY, {**KEY, "split": "val"}):
        build_in_parts(parts, read_lines, tmp_path / "cache", key)
    assert [len(builders(part)) for part in parts] == [2, 2]


def test_parts_are_removed_once_the_index_is_stored(tmp_path: Path) -> None:
    parts, cache = write_parts(tmp_path / "data", 3), tmp_path / "cache"
    stored = load_or_build(cache, KEY, lambda: join_parts(build_in_parts(parts, read_lines, cache, KEY)))
    assert not partial_folder(cache, KEY).exists()
    assert len(list(cache.iterdir())) == 1
    assert lines_of(stored) == ["line1.0", "line2.0", "line2.1"]


def test_parts_that_another_process_cleared_are_built_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, folder = write_parts(tmp_path / "data", 2), partial_folder(tmp_path, KEY)

    def write_and_lose(path: Path, arrays: Arrays, key: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    monkeypatch.setattr(index_build, "write_arrays", write_and_lose)
    found = build_in_parts(parts, read_lines, tmp_path, KEY)
    assert [lines_of(arrays) for arrays in found] == [[], ["line1.0"]]


@pytest.mark.parametrize("workers", [1, 2])
def test_without_write_access_parts_stay_in_memory(tmp_path: Path, workers: int) -> None:
    parts = write_parts(tmp_path / "data", 3)
    (tmp_path / "file").write_text("")
    found = build_in_parts(parts, read_lines, tmp_path / "file" / "cache", KEY, workers=workers)
    assert [len(lines_of(arrays)) for arrays in found] == [0, 1, 2]


def test_others_start_only_when_it_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_build, "default_workers", lambda: 2)
    monkeypatch.setattr(index_build, "PATIENCE", 0.0)
    parts = write_parts(tmp_path / "data", 3)
    build_in_parts(parts, read_lines, tmp_path / "cache", KEY)
    assert os.getpid() not in {pid for part in parts for pid in builders(part)}


def test_the_bar_counts_parts_and_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = write_parts(tmp_path / "data", 4)
    build = functools.partial(
        build_in_parts, parts, read_lines, describe="text files", count=lambda a: len(a["length"])
    )
    build(tmp_path / "one", KEY)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("RANK", "1")
    build(tmp_path / "two", KEY)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    build(tmp_path / "three", KEY)
    shown = capsys.readouterr().err
    assert "text files" in shown
    assert "4/4" in shown
    assert "6 entries" in shown


def test_workers_are_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    numbers = []
    for ranks in ("1", "16", "100"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        numbers.append(index_build.default_workers())
    assert numbers == [8, 4, 1]


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    for parts, workers in ((["a", "a"], None), (["a"], 0)):
        with pytest.raises(ValueError, match="parts must differ"):
            build_in_parts(parts, read_lines, tmp_path, KEY, workers=workers)

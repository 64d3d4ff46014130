"""The on-disk index: stored once, noticed when stale, built in parts that a killed build goes on from."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from dual_loop import iteration
from dual_loop.config import DataConfig
from dual_loop.data import index
from dual_loop.data.index import build_in_parts, join_parts, list_tree, load_or_build, partial_folder
from dual_loop.data.index_file import StoredArray, watch_files
from dual_loop.data.limits import max_pixels
from dual_loop.data.string_table import StringTable
from dual_loop.errors import ConfigError, EnvironmentProblem

KEY = {"kind": "test", "root": "somewhere"}


class Builder:
    """Counts how often an index is built; lists ``root`` like a reader does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.num_calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.num_calls += 1
        files, watched = list_tree(self.root, (".npz",), None, KEY)
        return {**StringTable.from_strings(files).to_arrays("path"), **watched}


def names(arrays: dict[str, np.ndarray]) -> list[str]:
    table = StringTable.from_arrays(arrays, "path")
    return [table[i] for i in range(len(table))]


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def make_older(folder: Path) -> None:
    """Set the folder's time back, so that the next change differs even on a clock with coarse ticks."""
    past = time.time_ns() - 10**10
    os.utime(folder, ns=(past, past))


def test_second_start_reads_and_lists_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    for name in ("b.npz", "deep/er/a.npz", "deep/skip.txt", ".hidden.npz"):
        touch(root / name)
    build = Builder(root)
    key = {"kind": "test", "root": str(root)}
    first = load_or_build(cache, key, build)
    assert names(first) == ["b.npz", "deep/er/a.npz"]
    monkeypatch.setattr(os, "scandir", lambda *a: pytest.fail("a folder was listed again"))
    second = load_or_build(cache, key, build)
    assert names(second) == names(first)
    assert build.num_calls == 1
    assert [p.suffix for p in cache.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("where", ["new.npz", "deep/new.npz", "deep/er/new.npz", "fresh/new.npz"])
def test_a_change_at_any_depth_is_noticed(tmp_path: Path, where: str) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    touch(root / "deep/er/a.npz")
    for folder in (root, root / "deep", root / "deep/er"):
        make_older(folder)
    build = Builder(root)
    load_or_build(cache, {"kind": "test"}, build)
    touch(root / where)
    assert where in names(load_or_build(cache, {"kind": "test"}, build))
    assert build.num_calls == 2
    (root / where).unlink()
    make_older((root / where).parent)
    assert where not in names(load_or_build(cache, {"kind": "test"}, build))
    assert len(list(cache.iterdir())) == 1, "a stale index is replaced, not kept beside the new one"


def test_a_changed_or_lost_file_is_noticed(tmp_path: Path) -> None:
    file, cache = tmp_path / "rows.csv", tmp_path / "cache"
    calls = []

    def build() -> dict[str, np.ndarray]:
        calls.append(1)
        return {**(watch_files([file]) if file.exists() else {}), "n": np.array([len(calls)])}

    touch(file)
    make_older(file)
    load_or_build(cache, {}, build)
    assert load_or_build(cache, {}, build)["n"] == 1
    file.write_text("x")
    assert load_or_build(cache, {}, build)["n"] == 2
    state = file.stat()
    file.write_text("xy")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # the size alone gives it away
    assert load_or_build(cache, {}, build)["n"] == 3
    file.unlink()
    assert load_or_build(cache, {}, build)["n"] == 4


def test_keys_have_files_of_their_own(tmp_path: Path) -> None:
    one = load_or_build(tmp_path, {"kind": "a"}, lambda: {"n": np.array([1])})
    two = load_or_build(tmp_path, {"kind": "a", "split": "val"}, lambda: {"n": np.array([2])})
    assert (one["n"], two["n"]) == (1, 2)
    assert load_or_build(tmp_path, {"kind": "a"}, lambda: pytest.fail("built again"))["n"] == 1


def test_an_index_that_belongs_to_another_key_is_not_used(tmp_path: Path) -> None:
    load_or_build(tmp_path, {"root": "x"}, lambda: {"n": np.array([1])})
    (stored,) = tmp_path.iterdir()
    load_or_build(tmp_path, {"root": "y"}, lambda: {"n": np.array([2])})
    (other,) = set(tmp_path.iterdir()) - {stored}
    os.replace(stored, other)
    assert load_or_build(tmp_path, {"root": "y"}, lambda: {"n": np.array([3])})["n"] == 3


def test_folder_without_write_access_warns_once(tmp_path: Path) -> None:
    blocked = tmp_path / "file" / "cache"  # below a file: cannot be made, whoever runs the tests
    touch(tmp_path / "file")
    with pytest.warns(UserWarning, match="DUAL_LOOP_CACHE"):
        assert load_or_build(blocked, {}, lambda: {"n": np.array([1])})["n"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_or_build(blocked, {}, lambda: {"n": np.array([2])})["n"] == 2


def test_concurrent_builds_leave_one_sound_file(tmp_path: Path) -> None:
    results: list[np.ndarray] = []
    barrier = threading.Barrier(6)

    def build() -> dict[str, np.ndarray]:
        barrier.wait(timeout=10)
        return {"n": np.arange(1000)}

    threads = [
        threading.Thread(target=lambda: results.append(load_or_build(tmp_path, {}, build)["n"])) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert len(list(tmp_path.iterdir())) == 1
    assert load_or_build(tmp_path, {}, lambda: pytest.fail("built again"))["n"].size == 1000


def test_default_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUAL_LOOP_CACHE", str(tmp_path / "chosen"))
    load_or_build(None, {}, lambda: {"n": np.array([1])})
    assert len(list((tmp_path / "chosen").iterdir())) == 1
    monkeypatch.delenv("DUAL_LOOP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert index.index_folder(None) == tmp_path / ".cache/dual_loop/index"


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere/a.npz")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(root)
    assert list_tree(root, (".npz",), tmp_path / "cache", KEY)[0] == ["link/a.npz"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match="cannot be listed") as caught:
        list_tree(tmp_path, (".npz",), tmp_path / "cache", KEY)
    assert str(tmp_path) in str(caught.value)


def test_watching_keeps_the_upper_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MAX_WATCHED", 2)
    touch(tmp_path / "a/b/c/x.npz")
    _, arrays = list_tree(tmp_path, (".npz",), None, KEY)
    table = StringTable.from_arrays(arrays, "watched")
    assert [table[i] for i in range(len(table))] == [str(tmp_path), str(tmp_path / "a")]


def test_changes_below_more_than_4096_folders_are_seen(tmp_path: Path) -> None:
    for number in range(4200):
        (tmp_path / "tree" / f"f{number:04}").mkdir(parents=True)
    touch(tmp_path / "tree/f4199/a.npz")
    found = []

    def build() -> dict[str, np.ndarray]:
        found.append(list_tree(tmp_path / "tree", (".npz",), tmp_path / "cache", KEY))
        return found[-1][1]

    load_or_build(tmp_path / "cache", KEY, build)
    load_or_build(tmp_path / "cache", KEY, build)
    assert len(found) == 1
    assert index.CHECKED[str(KEY["kind"])][0] == 4201
    touch(tmp_path / "tree/f4199/b.npz")
    os.utime(tmp_path / "tree/f4199", (1, 1))
    load_or_build(tmp_path / "cache", KEY, build)
    assert found[-1][0] == ["f4199/a.npz", "f4199/b.npz"]


def grow_tree(root: Path) -> None:
    for number in range(40):
        for name in ("a.npz", "deep/b.npz", "deep/.hidden.npz", "deep/c.txt"):
            touch(root / f"part{number:02}" / name)
    touch(root / "top.npz")


def test_a_wide_tree_is_listed_in_parts_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    grow_tree(root)
    (root / "part05/back").symlink_to(root)
    (root / "part06/side").symlink_to(root / "part30/deep")  # as deep as its target, and before it in the order
    (root / "part07/deep/down").symlink_to(root / "part31")
    with monkeypatch.context() as patch:
        patch.setattr(index, "_MANY_FOLDERS", 1000)
        files, watched = list_tree(root, (".npz",), tmp_path / "whole", KEY)
    assert not (tmp_path / "whole").exists(), "this was one walk"
    monkeypatch.setattr(index, "PATIENCE", 0.0)
    for workers in (1, 3):
        monkeypatch.setattr(index, "default_workers", lambda workers=workers: workers)
        same, watched_too = list_tree(root, (".npz",), tmp_path / str(workers), KEY)
        assert same == files
        assert {name: values.tolist() for name, values in watched_too.items()} == {
            name: values.tolist() for name, values in watched.items()
        }
    assert "part06/side/b.npz" in files
    assert "part30/deep/b.npz" not in files
    assert len(files) == 81
    parts = list(partial_folder(tmp_path / "1", KEY).iterdir())
    assert 10 < len(parts) <= index.NUM_GROUPS


def test_a_listing_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    grow_tree(root)
    scandir, listed = os.scandir, []

    def die_after_50(path: Path) -> object:
        listed.append(path)
        if len(listed) == 50:
            raise KeyboardInterrupt
        return scandir(path)

    monkeypatch.setattr(os, "scandir", die_after_50)
    with pytest.raises(KeyboardInterrupt):
        list_tree(root, (".npz",), cache, KEY)
    num_before = len(listed)
    assert len(list_tree(root, (".npz",), cache, KEY)[0]) == 81
    assert len(listed) - num_before < 81 - 30, "finished parts are not listed again"
    touch(root / "part11/deep/new.npz")
    assert "part11/deep/new.npz" in list_tree(root, (".npz",), cache, KEY)[0]


def test_listing_asks_for_no_file_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        touch(tmp_path / f"{number}.npz")
    asked: list[str] = []
    stat = os.stat

    def note(path: str | Path, **options: bool) -> os.stat_result:
        asked.append(os.fspath(path))
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", note)
        files = list_tree(tmp_path, (".npz",), None, KEY)[0]
    assert len(files) == 200
    assert asked == [str(tmp_path)]


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
    lengths, limit = np.array([len(line) for line in lines]), np.array([max_pixels()])
    return {**StringTable.from_strings(lines).to_arrays("line"), "length": lengths, "limit": limit, **watched}


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
def test_parts_come_in_order_and_are_built_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None, threads: bool
) -> None:
    monkeypatch.setattr("dual_loop.data.limits._in_use", DataConfig(max_pixels=4321))
    parts = write_parts(tmp_path / "data", 5)
    for _ in range(2):
        found = build_in_parts(parts, read_lines, tmp_path / "cache", KEY, workers=workers, threads=threads)
        assert [len(lines_of(arrays)) for arrays in found] == [0, 1, 2, 3, 4]
        assert all(isinstance(arrays["length"], StoredArray) for arrays in found[1:]), "finished parts stay on disk"
    assert {int(arrays["limit"][0]) for arrays in found} == {4321}, "other processes are handed the limits"
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
        "import sys; sys.path.insert(0, sys.argv[1]); import test_index as t; from pathlib import Path\n"
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

    monkeypatch.setattr(index, "write_arrays", write_and_lose)
    found = build_in_parts(parts, read_lines, tmp_path, KEY)
    assert [lines_of(arrays) for arrays in found] == [[], ["line1.0"]]


@pytest.mark.parametrize("workers", [1, 2])
def test_without_write_access_parts_stay_in_memory(tmp_path: Path, workers: int) -> None:
    parts = write_parts(tmp_path / "data", 3)
    (tmp_path / "file").write_text("")
    found = build_in_parts(parts, read_lines, tmp_path / "file" / "cache", KEY, workers=workers)
    assert [len(lines_of(arrays)) for arrays in found] == [0, 1, 2]


def test_others_start_only_when_it_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "default_workers", lambda: 2)
    monkeypatch.setattr(index, "PATIENCE", 0.0)
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
    monkeypatch.setattr(iteration, "BAR_DELAY", 0)
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
        numbers.append(index.default_workers())
    assert numbers == [8, 4, 1]


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    for parts, workers in ((["a", "a"], None), (["a"], 0)):
        with pytest.raises(ValueError, match="parts must differ"):
            build_in_parts(parts, read_lines, tmp_path, KEY, workers=workers)

"""The on-disk index: stored once, noticed when stale, safe against damage, races and folders without write access."""

from __future__ import annotations

import os
import pickle
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dual_loop.data import index_cache
from dual_loop.data.index_build import partial_folder
from dual_loop.data.index_cache import StringTable, TreeListing, check_root, choose_capped, load_or_build, watch_files
from dual_loop.errors import ConfigError, EnvironmentProblem


class Builder:
    """Counts how often an index is built; lists ``root`` like a reader does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.num_calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.num_calls += 1
        listing = TreeListing(self.root, (".npz",))
        return {**StringTable.from_strings(listing.files).to_arrays("path"), **listing.watched_arrays()}


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


@given(st.lists(st.text(max_size=20)))
def test_string_table_round_trips(strings: list[str]) -> None:
    strings = [s for s in strings if not any(0xD800 <= ord(c) <= 0xDFFF for c in s)]
    table = StringTable.from_strings(iter(strings))
    again = StringTable.from_arrays(table.to_arrays("x"), "x")
    assert [again[i] for i in range(len(again))] == strings
    for outside in (len(strings), -1):
        with pytest.raises(IndexError):
            again[outside]


def test_names_that_are_not_utf8_survive() -> None:
    name = os.fsdecode(b"a\xff.npz")
    assert StringTable.from_strings([name])[0] == name


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


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 garbage", b"\x80\x04N."])
def test_a_damaged_index_is_built_again(tmp_path: Path, damage: bytes) -> None:
    load_or_build(tmp_path, {}, lambda: {"n": np.arange(3)})
    (stored,) = tmp_path.iterdir()
    stored.write_bytes(damage or stored.read_bytes()[:-30])
    assert load_or_build(tmp_path, {}, lambda: {"n": np.arange(4)})["n"].tolist() == [0, 1, 2, 3]
    assert load_or_build(tmp_path, {}, lambda: pytest.fail("not repaired"))["n"].size == 4


def test_an_index_that_belongs_to_another_key_is_not_used(tmp_path: Path) -> None:
    load_or_build(tmp_path, {"root": "x"}, lambda: {"n": np.array([1])})
    (stored,) = tmp_path.iterdir()
    load_or_build(tmp_path, {"root": "y"}, lambda: {"n": np.array([2])})
    (other,) = set(tmp_path.iterdir()) - {stored}
    os.replace(stored, other)
    assert load_or_build(tmp_path, {"root": "y"}, lambda: {"n": np.array([3])})["n"] == 3


def test_object_arrays_are_never_unpickled(tmp_path: Path) -> None:
    load_or_build(tmp_path, {}, lambda: {"n": np.array([1])})
    (stored,) = tmp_path.iterdir()
    with stored.open("wb") as file:
        np.savez(file, n=np.array([{}], dtype=object))
    assert load_or_build(tmp_path, {}, lambda: {"n": np.array([2])})["n"] == 2


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
    assert index_cache.default_index_dir() == tmp_path / ".cache/dual_loop/index"


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere/a.npz")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(root)
    assert TreeListing(root, (".npz",)).files == ["link/a.npz"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match="cannot be listed") as caught:
        TreeListing(tmp_path, (".npz",))
    assert str(tmp_path) in str(caught.value)


def test_watching_keeps_the_upper_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "MAX_WATCHED", 2)
    touch(tmp_path / "a/b/c/x.npz")
    arrays = TreeListing(tmp_path, (".npz",)).watched_arrays()
    table = StringTable.from_arrays(arrays, "watched")
    assert [table[i] for i in range(len(table))] == [str(tmp_path), str(tmp_path / "a")]


def test_caps_are_nested_repeatable_and_not_the_first_ones() -> None:
    small, large = choose_capped(1000, 50, "cap"), choose_capped(1000, 200, "cap")
    assert set(small) < set(large)
    assert np.array_equal(small, choose_capped(1000, 50, "cap"))
    assert np.array_equal(small, np.sort(small))
    assert small.max() > 900
    assert small.min() < 100
    assert choose_capped(5, None, "cap").tolist() == choose_capped(5, 99, "cap").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="sav_max_samples"):
        choose_capped(5, 0, "sav_max_samples")


def test_bad_roots_are_explained(tmp_path: Path) -> None:
    touch(tmp_path / "file")
    for path, seen in ((tmp_path / "absent", "nothing there"), (tmp_path / "file", "a file")):
        with pytest.raises(ConfigError, match=seen) as caught:
            check_root(path, "SA-V", "root/\n  x.npz")
        assert str(path) in str(caught.value)
        assert "root/\n  x.npz" in str(caught.value)
    assert check_root(tmp_path, "SA-V", "").is_absolute()


# --- large indexes ---------------------------------------------------------------------------------------------------


def test_arrays_are_mapped_read_only_and_take_no_memory_of_their_own(tmp_path: Path) -> None:
    names_given = [f"folder{number % 7}/file{number}.npz" for number in range(5000)]
    built = {**StringTable.from_strings(names_given).to_arrays("path"), "none": np.empty((0, 3), np.int64)}
    for _ in range(2):  # the process that builds uses the file, too
        arrays = load_or_build(tmp_path, {}, lambda: built)
        for name in ("path_bytes", "path_offsets"):
            assert isinstance(arrays[name], np.memmap)
            assert not arrays[name].flags.writeable
            assert not arrays[name].flags.owndata
        table = StringTable.from_arrays(arrays, "path")
        assert np.shares_memory(table.data, arrays["path_bytes"])
        assert table[4999] == names_given[4999]
        assert table.slice(10, 20) == names_given[10:20]
        assert table.slice(5, 5) == []
        assert arrays["none"].shape == (0, 3)


def test_pickled_arrays_are_opened_again_not_copied(tmp_path: Path) -> None:
    arrays = load_or_build(tmp_path, {}, lambda: {"n": np.arange(100_000), "m": np.arange(3)})
    pickled = pickle.dumps(arrays)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert isinstance(again["n"], np.memmap)
    assert np.array_equal(again["n"], arrays["n"])
    part = pickle.loads(pickle.dumps(arrays["n"][5:8]))
    assert (type(part), part.tolist()) == (np.ndarray, [5, 6, 7])
    (stored,) = tmp_path.iterdir()
    stored.unlink()
    load_or_build(tmp_path, {}, lambda: {"n": np.arange(100_000) + 1, "m": np.arange(3)})
    with pytest.raises(EnvironmentProblem, match="replaced while processes were starting"):
        pickle.loads(pickled)
    assert arrays["n"][7] == 7, "whoever has the old file open keeps it"


@pytest.mark.parametrize("position", [0, 3, 8, 40, 90, -1])
def test_every_kind_of_cut_or_changed_header_is_noticed(tmp_path: Path, position: int) -> None:
    load_or_build(tmp_path, {"kind": "x"}, lambda: {"n": np.arange(9), "flags": np.ones(3, bool)})
    (stored,) = tmp_path.iterdir()
    whole = stored.read_bytes()
    for damaged in (whole[:position], whole + b"x", whole[:position] + b"\xfe\xff" + whole[position:][2:]):
        if position == -1 and len(damaged) > len(whole) - 1:
            continue  # a change of the values alone is not looked for
        stored.write_bytes(damaged)
        assert load_or_build(tmp_path, {"kind": "x"}, lambda: {"n": np.arange(4)})["n"].size == 4
        stored.write_bytes(whole)


def test_a_dtype_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="name: <U3"):
        load_or_build(tmp_path, {}, lambda: {"name": np.array(["abc"])})
    assert list(tmp_path.iterdir()) == []


def grow_tree(root: Path) -> None:
    for number in range(40):
        for name in ("a.npz", "deep/b.npz", "deep/.hidden.npz", "deep/c.txt"):
            touch(root / f"part{number:02}" / name)
    touch(root / "top.npz")


def test_a_wide_tree_is_listed_in_parts_with_the_same_result(tmp_path: Path) -> None:
    root = tmp_path / "data"
    grow_tree(root)
    (root / "part05/back").symlink_to(root)
    (root / "part06/side").symlink_to(root / "part30/deep")  # as deep as its target, and before it in the order
    (root / "part07/deep/down").symlink_to(root / "part31")
    one_walk = TreeListing(root, (".npz",))
    for workers in (1, 3):
        in_parts = TreeListing(root, (".npz",), tmp_path / str(workers), {"kind": "test"}, workers)
        assert in_parts.files == one_walk.files
        assert in_parts.folders == one_walk.folders
    assert "part06/side/b.npz" in one_walk.files
    assert "part30/deep/b.npz" not in one_walk.files
    assert len(one_walk.files) == 81
    parts = list(partial_folder(tmp_path / "1", {"kind": "test"}).iterdir())
    assert 10 < len(parts) <= index_cache.NUM_GROUPS


def test_a_listing_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, key, cache = tmp_path / "data", {"kind": "test"}, tmp_path / "cache"
    grow_tree(root)
    scandir, listed = os.scandir, []

    def die_after_50(path: Path) -> object:
        listed.append(path)
        if len(listed) == 50:
            raise KeyboardInterrupt
        return scandir(path)

    monkeypatch.setattr(os, "scandir", die_after_50)
    with pytest.raises(KeyboardInterrupt):
        TreeListing(root, (".npz",), cache, key, 1)
    num_before = len(listed)
    assert len(TreeListing(root, (".npz",), cache, key, 1).files) == 81
    assert len(listed) - num_before < 81 - 30, "finished parts are not listed again"
    touch(root / "part11/deep/new.npz")
    assert "part11/deep/new.npz" in TreeListing(root, (".npz",), cache, key, 1).files


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
        files = TreeListing(tmp_path, (".npz",)).files
    assert len(files) == 200
    assert asked == [str(tmp_path)]


def test_stored_files_are_plain_safetensors(tmp_path: Path) -> None:
    arrays = {"flags": np.array([True, False, True]), "n": np.arange(6).reshape(2, 3), "half": np.ones(1, np.float16)}
    load_or_build(tmp_path, {"kind": "x"}, lambda: {**arrays, "turned": np.arange(6).reshape(2, 3).T})
    (stored,) = tmp_path.iterdir()
    loaded = load_file(stored)
    for name, values in {**arrays, "turned": np.arange(6).reshape(2, 3).T}.items():
        assert loaded[name].dtype == values.dtype
        assert np.array_equal(loaded[name], values)

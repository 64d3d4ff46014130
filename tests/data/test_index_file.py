"""Stored arrays: mapped, shared by pickle, safe against damage."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dual_loop.data.index import load_or_build
from dual_loop.data.string_table import StringTable
from dual_loop.errors import EnvironmentProblem


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 garbage", b"\x80\x04N."])
def test_a_damaged_index_is_built_again(tmp_path: Path, damage: bytes) -> None:
    load_or_build(tmp_path, {}, lambda: {"n": np.arange(3)})
    (stored,) = tmp_path.iterdir()
    stored.write_bytes(damage or stored.read_bytes()[:-30])
    assert load_or_build(tmp_path, {}, lambda: {"n": np.arange(4)})["n"].tolist() == [0, 1, 2, 3]
    assert load_or_build(tmp_path, {}, lambda: pytest.fail("not repaired"))["n"].size == 4


def test_object_arrays_are_never_unpickled(tmp_path: Path) -> None:
    load_or_build(tmp_path, {}, lambda: {"n": np.array([1])})
    (stored,) = tmp_path.iterdir()
    with stored.open("wb") as file:
        np.savez(file, n=np.array([{}], dtype=object))
    assert load_or_build(tmp_path, {}, lambda: {"n": np.array([2])})["n"] == 2


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


def test_stored_files_are_plain_safetensors(tmp_path: Path) -> None:
    arrays = {"flags": np.array([True, False, True]), "n": np.arange(6).reshape(2, 3), "half": np.ones(1, np.float16)}
    load_or_build(tmp_path, {"kind": "x"}, lambda: {**arrays, "turned": np.arange(6).reshape(2, 3).T})
    (stored,) = tmp_path.iterdir()
    loaded = load_file(stored)
    for name, values in {**arrays, "turned": np.arange(6).reshape(2, 3).T}.items():
        assert loaded[name].dtype == values.dtype
        assert np.array_equal(loaded[name], values)

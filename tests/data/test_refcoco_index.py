"""The files of RefCOCO: pickles that must not run, other structures, files that do not belong together."""

from __future__ import annotations

import copy
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refcoco_files import make_refs, source_of, write_dataset

from dual_loop.data.refcoco_index import load_refs
from dual_loop.errors import ConfigError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data/refcoco")
    return tmp_path / "data"


class Runs:
    """Pickles to a call of ``function``."""

    def __init__(self, function: Any, argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_asks_for_code_is_refused(root: Path, tmp_path: Path, protocol: int) -> None:
    proof = tmp_path / "proof"
    refs = make_refs()
    refs[5]["sentences"].append(Runs(os.mkdir, str(proof)))
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=protocol))
    with pytest.raises(ConfigError, match=rf"asks for the global {os.mkdir.__module__}\.mkdir"):
        source_of(root)
    assert not proof.exists()


@pytest.mark.parametrize(
    "harmless",
    [np.float64(1.0), np.array([1]), {1, 2}.__class__, Path("x"), complex(1, 2), bytearray(b"x")],
    ids=lambda value: type(value).__name__,
)
def test_even_harmless_globals_are_refused(tmp_path: Path, harmless: Any) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([harmless], protocol=2))
    with pytest.raises(ConfigError, match="asks for the global"):
        load_refs(path)


def test_extension_codes_and_persistent_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    for code in (b"\x80\x02\x82\x01.", b"Pid\n."):
        path.write_bytes(code)
        with pytest.raises(ConfigError, match="refs file"):
            load_refs(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps(make_refs(), protocol=protocol))
    assert load_refs(path) == make_refs()


def test_python2_byte_strings_become_text(tmp_path: Path) -> None:
    def text(value: str) -> bytes:  # BINSTRING, what Python 2's cPickle wrote for str
        return b"T" + struct.pack("<i", len(value)) + value.encode("latin1")

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    long_number = b"\x8a\x05" + (2**33).to_bytes(5, "little")  # LONG1, Python 2's long
    sentence = b"}(" + text("sent") + text("caf\xe9 man") + b"u"
    pairs = [
        *((text("ref_id"), number(7)), (text("ann_id"), long_number), (text("image_id"), number(1))),
        *((text("split"), text("train")), (text("sentences"), b"](" + sentence + b"e")),
    ]
    record = b"}(" + b"".join(key + value for key, value in pairs) + b"u"
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"\x80\x02](" + record + b"e.")
    (ref,) = load_refs(path)
    assert ref["ann_id"] == 2**33
    assert ref["sentences"] == [{"sent": "café man"}]


def test_damaged_pickles_are_refused_without_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    whole = pickle.dumps(make_refs(), protocol=2)
    for length in range(0, len(whole) - 1, 41):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="refs"):
            load_refs(path)
    path.write_bytes(b"(" * 200_000)
    with pytest.raises(ConfigError, match="refs"):
        load_refs(path)


@pytest.mark.parametrize(
    "change",
    [
        {"ref_id": "7"},
        {"image_id": True},
        {"ann_id": [1, "2"]},
        {"split": None},
        {"sentences": {}},
        {"sentences": [{}]},
    ],
)
def test_other_structures_are_refused(root: Path, change: dict[str, Any]) -> None:
    refs = copy.deepcopy(make_refs())
    refs[4].update(change)
    write_dataset(root / "refcoco", refs)
    with pytest.raises(ConfigError, match="reference 4"):
        source_of(root)


@pytest.mark.parametrize("refs", [[], {}, "abc", 5, [5]])
def test_other_top_levels_are_refused(root: Path, refs: Any) -> None:
    write_dataset(root / "refcoco", refs if refs != [] else None)
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs))
    with pytest.raises(ConfigError, match="structure"):
        source_of(root)


def test_one_reference_to_nowhere_is_left_out_and_counted(root: Path) -> None:
    refs = make_refs()
    refs[-1]["image_id"] = 999
    write_dataset(root / "refcoco", refs)
    source = source_of(root)
    assert source.load_all(0).region_ids == ("ref101", "ref102")
    assert source.left_out["references to images that instances.json does not list"] == 1
    for ref in refs:
        ref["image_id"] += 1000
    write_dataset(root / "refcoco", refs)
    with pytest.raises(ConfigError, match="no reference names an image"):
        source_of(root)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_integers_of_numpy_are_read(tmp_path: Path, protocol: int) -> None:
    refs = copy.deepcopy(make_refs())
    for kind in (np.int64, np.uint8, np.int16):
        refs[0]["ann_id"] = kind(40)
        path = tmp_path / "refs(unc).p"
        path.write_bytes(pickle.dumps(refs, protocol=protocol))
        number = load_refs(path)[0]["ann_id"]
        assert (number, type(number)) == (40, int)


def test_integers_of_numpy_are_read_as_python_2_wrote_them(tmp_path: Path) -> None:
    scalar = (
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'i8'\nI0\nI1\ntR(I3\nS'%s'\nNNNI-1\nI-1\nI0\ntbS'%s'\ntR"
    )
    for order, value in ((b"<", rb"\xff\x01\x00\x00\x00\x00\x00\x00"), (b">", rb"\x00\x00\x00\x00\x00\x00\x01\xff")):
        fields = b"S'ref_id'\nI1\nsS'ann_id'\n%ssS'image_id'\nI1\nsS'split'\nS'train'\nsS'sentences'\n(ls" % (
            scalar % (order, value)
        )
        (tmp_path / "refs(unc).p").write_bytes(b"(l(d" + fields + b"a.")
        assert load_refs(tmp_path / "refs(unc).p")[0]["ann_id"] == 511


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("stored", ["caf\u00e9 table \u732b".encode(), "caf\u00e9 table".encode("latin1")])
def test_byte_strings_of_python_2_are_utf8_else_latin1(tmp_path: Path, stored: bytes, line_end: bytes) -> None:
    raw = b"(l(dS'ref_id'\nI1\nsS'ann_id'\nL101L\nsS'image_id'\nI1\nsS'split'\nS'train'\nsS'sentences'\n(l(dS'sent'\nS"
    raw += repr(stored)[1:].encode() + b"\nsasa."
    (tmp_path / "refs(unc).p").write_bytes(raw.replace(b"\n", line_end))
    [ref] = load_refs(tmp_path / "refs(unc).p")
    assert ref["sentences"] == [{"sent": stored.decode("utf-8" if len(stored) > 12 else "latin1")}]
    assert (ref["split"], ref["ann_id"]) == ("train", 101)


SIZES = '{"images": [{"id": 1, "file_name": "a.jpg", "height": 9, "width": %s}], "annotations": []}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"images": []}',
        '{"images": [{}], "annotations": []}',
        "[" * 100_000,
        SIZES % "Infinity",
        SIZES % 2**70,
    ],
)
def test_broken_instances_are_refused(root: Path, text: str) -> None:
    (root / "refcoco/instances.json").write_text(text)
    with pytest.raises(ConfigError, match=r"instances\.json"):
        source_of(root)


def test_the_attack_of_the_tests_is_real(tmp_path: Path) -> None:
    """Without the guard the pickle of the tests does run: so the refusals above prove something."""
    proof = tmp_path / "proof"
    pickle.load(io.BytesIO(pickle.dumps(Runs(os.mkdir, str(proof)))))
    assert proof.is_dir()

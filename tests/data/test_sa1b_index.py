"""Pairs of images and JSON files, in every layout, and what has no partner."""

from __future__ import annotations

from pathlib import Path

from dual_loop.data.sa1b import entry_name
from dual_loop.data.sa1b_index import build_index
from dual_loop.data.string_table import StringTable


def test_files_pair_by_stem_and_folder_and_those_without_partner_stay(tmp_path: Path) -> None:
    names = ("img/sa_1.jpg", "js/sa_1.json", "a/sa_1.jpg", "a/sa_1.json", "sa_2.png", "b/sa_3.json", "other.jpg")
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    arrays = build_index(tmp_path / "data", tmp_path / "index", {"kind": "sa1b"}, entry_name)
    tables = [StringTable.from_arrays(arrays, name) for name in ("image", "record")]
    pairs = list(zip(*(table.slice(0, len(table)) for table in tables), strict=True))
    assert pairs == [
        ("a/sa_1.jpg", "a/sa_1.json"),
        ("", "b/sa_3.json"),
        ("img/sa_1.jpg", "js/sa_1.json"),
        ("sa_2.png", ""),
    ]
    assert arrays["image_place"].tolist() == [[-1, 0, 0]] * 4


def test_img_and_js_are_no_part_of_a_name() -> None:
    assert entry_name("img/sa_1.jpg") == entry_name("js/sa_1.json") == "sa_1"
    assert entry_name("x/img/sa_1.jpg") == "x/sa_1"

"""The leakage guard: by id, by sight, the four policies; a renamed copy of a held-out image is found."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dual_loop.config import DataConfig
from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.dataset_builder import build_sources
from dual_loop.data.leakage import (
    FINE,
    HeldOutImage,
    coco_id_of_name,
    guard,
    held_out_of,
    leaked_by_id,
    leaked_by_sight,
    prints_of_crops,
    thumbnail,
)
from dual_loop.data.reader import Reader
from dual_loop.data.string_table import StringTable
from dual_loop.errors import ConfigError
from dual_loop.testing.demo_data import write_demo_data


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("leak") / "demo"
    write_demo_data(root, 12, 3, num_val=4)
    return root


def data_of(demo: Path, **changes: object) -> DataConfig:
    data = DataConfig(
        sa1b_dir=str(demo / "sa1b"),
        sav_dir=str(demo / "sav"),
        openimage_dir=str(demo / "openimages"),
        refcoco_dir=str(demo / "ref_seg"),
        index_dir=str(demo.parent / "index"),
    )
    return dataclasses.replace(data, **changes)


def coco_like(folder: Path, picture: Image.Image, name: str) -> Path:
    """Write an SA-1B-style set of one image with one mask."""
    folder.mkdir(parents=True)
    picture.save(folder / f"{name}.jpg", quality=60)
    mask = np.zeros((picture.height, picture.width), bool)
    mask[2:-2, 2 : picture.width // 2] = True
    record = {"image": {}, "annotations": [{"id": 1, "segmentation": encode_rle(mask)}]}
    (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def test_ids_stand_alone_in_a_name() -> None:
    assert coco_id_of_name("COCO_train2014_000000581857") == 581857
    assert coco_id_of_name("part/000000000009") == 9
    assert coco_id_of_name("sa_000000000009_x") == 9
    for name in ("sa_223750", "0000000043233c82", "677c122b0eaa5d16", "a000000000009", "0000000000091"):
        assert coco_id_of_name(name) is None


def test_generated_data_does_not_leak(demo: Path) -> None:
    held_out = held_out_of(data_of(demo))
    assert len(held_out) >= 4
    for source in build_sources(data_of(demo)):
        assert leaked_by_id(source, held_out) == []
        found, looked_at = leaked_by_sight(source, list(held_out.values()))
        assert (found, looked_at) == ([], len(source))


def test_a_renamed_resized_copy_is_found_by_sight_and_by_id_when_the_name_tells(demo: Path, tmp_path: Path) -> None:
    held_out = held_out_of(data_of(demo))
    victim = next(image for image in held_out.values() if image.split.endswith("val"))
    assert victim.path is not None
    copy = Image.open(victim.path).resize((150, 130))
    renamed = data_of(demo, sa1b_dir=str(coco_like(tmp_path / "renamed", copy, "sa_77")))
    named = data_of(demo, sa1b_dir=str(coco_like(tmp_path / "named", copy, f"sa_{victim.coco_id:012d}")))
    source = next(s for s in build_sources(renamed) if s.name == "sa1b")
    assert leaked_by_id(source, held_out) == []
    [leak], _ = leaked_by_sight(source, list(held_out.values()))
    assert (leak.held_out, leak.found_by) == (victim, "sight")
    source = next(s for s in build_sources(named) if s.name == "sa1b")
    [leak] = leaked_by_id(source, held_out)
    assert f"COCO image {victim.coco_id} of refcoco val (found by id)" in str(leak)


@pytest.mark.parametrize("cut", [(0.02,) * 4, (0.05,) * 4, (0.1,) * 4, (0.1, 0, 0, 0.04), (0, 0, 0, 0)])
@pytest.mark.parametrize("turn", [None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90])
def test_cropped_mirrored_and_turned_copies_are_found_by_sight(
    demo: Path, tmp_path: Path, cut: tuple[float, ...], turn: Image.Transpose | None
) -> None:
    held_out = list(held_out_of(data_of(demo)).values())
    victim = held_out[1]
    assert victim.path is not None
    image = Image.open(victim.path).convert("RGB")
    left, above, right, below = (part * side for part, side in zip(cut, image.size * 2, strict=True))
    image = image.crop((round(left), round(above), round(image.width - right), round(image.height - below)))
    folder = coco_like(tmp_path / "copy", image if turn is None else image.transpose(turn), "sa_77")
    source = next(s for s in build_sources(data_of(demo, sa1b_dir=str(folder))) if s.name == "sa1b")
    [leak], _ = leaked_by_sight(source, held_out)
    assert (leak.held_out, leak.found_by) == (victim, "sight")


NAME_PARTS = ["", "0" * 12, "000000581857", "000000581858", "1", "99999999999", "a", "_", ".", "/", "COCO_"]


class Named:
    """A source that has names alone."""

    name = "named"

    def __init__(self, names: list[str], kept: list[int]) -> None:
        self.table, self.kept = StringTable.from_strings(names), np.array(kept, np.int64)

    def __len__(self) -> int:
        return len(self.kept)

    def entry_id(self, index: int) -> str:
        return self.table[int(self.kept[index])]

    def named_rows(self) -> tuple[list[StringTable], np.ndarray]:
        return [], self.kept


class Searchable(Named):
    def named_rows(self) -> tuple[list[StringTable], np.ndarray]:
        return [self.table], self.kept


@given(
    st.lists(st.lists(st.sampled_from(NAME_PARTS), max_size=4).map("".join), max_size=12),
    st.sets(st.integers(0, 11)),
)
def test_a_search_over_all_names_finds_what_one_by_one_finds(names: list[str], kept: set[int]) -> None:
    rows = sorted(row for row in kept if row < len(names))
    held_out = {number: HeldOutImage(number, "refcoco val", None) for number in (581857, 0)}
    assert leaked_by_id(Searchable(names, rows), held_out) == leaked_by_id(Named(names, rows), held_out)
    assert leaked_by_id(Searchable(names, rows), {}) == []


def test_only_suspects_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"part/{number:012d}" for number in range(1000)] + [f"sa_{number}" for number in range(1000)]
    source = Searchable(names, list(range(0, 2000, 2)))
    looked_at: list[int] = []
    monkeypatch.setattr(source, "entry_id", lambda index: looked_at.append(index) or names[2 * index])
    leaks = leaked_by_id(source, {44: HeldOutImage(44, "refcoco val", None), 45: HeldOutImage(45, "x", None)})
    assert [(leak.entry, leak.entry_id) for leak in leaks] == [(22, "part/000000000044")]
    assert looked_at == [22]


def test_all_readers_of_names_can_be_searched(demo: Path) -> None:
    searched = [source for source in build_sources(data_of(demo)) if source.named_rows()[0]]
    assert sorted(source.name for source in searched) == ["openimages", "sa1b", "sav"]
    for source in searched:
        tables, rows = source.named_rows()
        assert len(rows) == len(source)
        for index, row in enumerate(rows.tolist()):
            stem = source.entry_id(index).rsplit("/", 1)[-1]
            assert any(stem in table[row] for table in tables)


def guarded(data: DataConfig) -> list[Reader]:
    return guard(build_sources(data), data)


def test_policies(demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held_out = held_out_of(data_of(demo))
    victim = next(iter(held_out.values()))
    assert victim.path is not None
    folder = coco_like(tmp_path / "named", Image.open(victim.path), f"sa_{victim.coco_id:012d}")
    for extra in sorted((demo / "sa1b").rglob("sa_*"))[:4]:
        (folder / extra.name).write_bytes(extra.read_bytes())
    lengths = {}
    for policy in ("off", "warn", "drop"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dual_loop"):
            sources = guarded(data_of(demo, sa1b_dir=str(folder), leakage_guard=policy))
        sa1b = next(source for source in sources if source.name == "sa1b")
        lengths[policy] = (len(sa1b), sum("held out" in record.message for record in caplog.records))
    assert lengths == {"off": (3, 0), "warn": (3, 1), "drop": (2, 1)}
    names = [sa1b.entry_id(index) for index in range(2)]
    assert all(coco_id_of_name(name) is None for name in names)
    assert sa1b.load(0, np.random.default_rng(0)).sample_id == names[0]
    assert sa1b.image_path(1).is_file()
    with pytest.raises(ConfigError, match="1 of 3 entries"):
        guarded(data_of(demo, sa1b_dir=str(folder), leakage_guard="error"))


def test_dropping_everything_is_an_error(demo: Path) -> None:
    data = data_of(demo, refcoco_split="val", leakage_guard="drop")
    with pytest.raises(ConfigError, match="held out for evaluation"):
        guarded(data)


def test_fingerprints_ignore_size_and_brightness_but_not_content(demo: Path) -> None:
    images = sorted((demo / "sa1b").rglob("*.jpg"))
    first = Image.open(images[0]).convert("RGB")
    changed = np.clip(np.asarray(first.resize((97, 61))).astype(np.int64) * 0.8 + 20, 0, 255).astype(np.uint8)
    smalls = [thumbnail(image) for image in (images[0], changed, images[1])]
    whole = np.zeros((1, 4))
    own, same, other = (prints_of_crops(small, whole, FINE)[0] for small in smalls if small is not None)
    assert float(own @ same) > 0.98
    assert float(own @ other) < 0.9
    assert thumbnail(np.full((9, 9, 3), 7, np.uint8)) is None
    assert thumbnail(demo / "demo.json") is None


def test_real_photographs(real_samples: Path, tmp_path: Path) -> None:
    """The SA-1B-style set there holds both COCO photographs of the reference sets under other names."""
    data = DataConfig(
        sa1b_dir=str(real_samples / "sa1b_flat"),
        refcoco_dir=str(real_samples / "ref_seg"),
        index_dir=str(tmp_path),
    )
    held_out = held_out_of(data)
    source = build_sources(data)[0]
    assert leaked_by_id(source, held_out) == []
    found, _ = leaked_by_sight(source, list(held_out.values()))
    assert {(leak.entry_id, leak.held_out.coco_id) for leak in found} == {("sa_142238", 142238), ("sa_439180", 439180)}

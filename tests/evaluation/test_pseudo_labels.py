"""Pseudo-labels: what is kept and why not, and files that the reader of captioned masks takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dual_loop.data.masks import decode_rle
from dual_loop.data.masks_dir import MasksDir
from dual_loop.data.sa1b import Sa1b
from dual_loop.data.sav import SavPairs
from dual_loop.evaluation.measure import MeasuredRegion, SegmentedCaption, blank_regions
from dual_loop.evaluation.pseudo_labels import choose_labels, write_labels
from dual_loop.evaluation.runner import MeasuredData
from dual_loop.testing.demo_data import write_demo_data


def region(caption: str, *ious: float, image: str = "a", rejected: str | None = None) -> MeasuredRegion:
    cycle = SegmentedCaption(round(100 * ious[0]), 100, list(ious))
    return MeasuredRegion(f"{image}#0", image, caption=caption, rejected=rejected, cycle=cycle)


def test_the_first_reason_that_applies() -> None:
    regions = [
        region("a red star", 0.9, 0.1),
        region("", 0.9, 0.1, rejected="empty"),
        region("coordinates 1 2", 0.9),
        region("a blue star", 0.6),
        region("a grey star", 0.9, 0.85),
        region("alone", 0.9),
        region("Twice.", 0.9, image="b"),
        region("twice", 0.9, image="b"),
        region("twice", 0.9, image="c"),
    ]

    def gate(text: str) -> str | None:
        return "coordinates" if "1" in text else None

    kept, left_out = choose_labels(regions, gate)
    assert [one.caption for one in kept] == ["a red star", "alone", "twice"]
    assert left_out == {"empty": 1, "coordinates": 1, "low_iou": 1, "ambiguous": 1, "same_caption_twice": 2}
    regions[0].trust, regions[5].trust = 0.79, 0.8
    kept, left_out = choose_labels(regions, gate, min_trust=0.8)
    assert [one.caption for one in kept] == ["alone", "twice"], "captions that nobody read again pass"
    assert left_out["unlikely"] == 1
    kept, _ = choose_labels(regions, gate, min_iou=0.5, min_uniqueness=0.0, keep_repeated=True)
    assert len(kept) == 7


@pytest.mark.parametrize("copy_images", [True, False])
def test_labels_are_a_captioned_data_set(tmp_path: Path, copy_images: bool) -> None:
    write_demo_data(tmp_path / "demo", 2, 5, sources=("sav", "sa1b"))
    index = tmp_path / "index"
    data = [
        MeasuredData("sa1b", Sa1b(tmp_path / "demo/sa1b", regions_per_image=9, index_dir=index)),
        MeasuredData("sav", SavPairs(tmp_path / "demo/sav", index_dir=index)),
    ]
    kept = {}
    for one in data:
        found = [own for entry in (1, 0) for own in measured(one, entry)]
        kept[one.name] = found
    out = tmp_path / "labels"
    assert write_labels(out, data, kept, 0, copy_images) == sum(map(len, kept.values()))
    rows = [json.loads(line) for line in (out / "labels.jsonl").read_text().splitlines()]
    assert list(rows[0]) == ["image", "segmentation", "caption", "id", "iou", "uniqueness", "data"]
    assert {row["data"] for row in rows} == {"sa1b", "sav"}
    for row in rows:
        image = Image.open(out / row["image"])
        assert decode_rle(row["segmentation"], "row").shape == image.size[::-1]
        assert (out / row["image"]).is_symlink() == (not copy_images and row["data"] == "sa1b")
    source = MasksDir(out, index_dir=index, regions_per_image=9)
    samples = [source.load(number, np.random.default_rng(0)) for number in range(len(source))]
    assert {text for s in samples for own in s.captions for text in own} == {row["caption"] for row in rows}


def measured(data: MeasuredData, entry: int) -> list[MeasuredRegion]:
    regions = blank_regions(data.load(entry, 0), data.name)
    for one in regions:
        ious = [0.9 if place == one.own else 0.0 for place in range(len(regions))]
        one.entry, one.caption, one.cycle = entry, f"thing {one.own} of {one.image}", SegmentedCaption(9, 10, ious)
    return regions

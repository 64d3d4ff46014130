"""Figures by hand: empty masks, precision, intervals, tables; training's figures equal those of evaluate."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from squares import square

from dual_loop.data.coco_masks import encode_rle
from dual_loop.evaluation.figures import (
    captioning_figures,
    figures_of,
    loop_figures,
    markdown_table,
    no_target_figures,
    referring_figures,
    summarise,
)
from dual_loop.evaluation.measure import MeasuredRegion, SegmentedCaption, SegmentedSentence
from dual_loop.metrics import mask_overlap


def region(image: str, *ious: float, own: int = 0, **values: object) -> MeasuredRegion:
    """A region whose caption led to a mask with these IoUs with the regions of its image."""
    cycle = SegmentedCaption(round(100 * ious[own]), 100, list(ious)) if ious else None
    return MeasuredRegion(f"{image}#{own}", image, cycle=cycle, own=own, **values)


@pytest.mark.parametrize(
    ("predicted", "target", "iou"),
    [
        (square(), square(), 1.0),
        (square(), square((0, 0, 10, 10)), 0.0),
        (square((0, 0, 10, 10)), square(), 0.0),
        (square((0, 0, 10, 5)), square((0, 0, 10, 10)), 0.5),
    ],
)
def test_empty_and_full(predicted: np.ndarray, target: np.ndarray, iou: float) -> None:
    intersection, union = (int(area[0]) for area in mask_overlap(predicted[None], target[None]))
    sentence = SegmentedSentence("x", 1, intersection, union)
    figures = referring_figures([MeasuredRegion("a#0", "a", sentences=[sentence])])
    assert figures["gIoU"]["value"] == iou
    assert figures["cIoU"]["value"] == iou


def test_accuracy_without_a_target() -> None:
    def one(image: str, area: int, *masks: np.ndarray) -> MeasuredRegion:
        sentences = [SegmentedSentence("x", 1, 0, 9, encode_rle(mask)) for mask in masks]
        absent = SegmentedSentence("y", 1, 0, area)
        return MeasuredRegion(f"{image}#0", image, sentences=sentences, no_target=absent)

    some, nothing = square((0, 0, 2, 2)), square()
    regions = [one("a", 0, some, nothing), one("b", 7, some), one("c", 0, some), MeasuredRegion("d#0", "d")]
    figures = no_target_figures(regions)
    assert figures["expressions"] == 3
    assert figures["N_acc"]["value"] == pytest.approx(2 / 3)
    assert figures["T_acc"]["value"] == 0.75
    assert figures["N_acc"]["ci95_low"] < 2 / 3 < figures["N_acc"]["ci95_high"]
    assert "T_acc" not in no_target_figures([one("a", 0)])
    assert no_target_figures(regions[-1:]) == {"expressions": 0}
    assert "N_acc" in markdown_table({"val": figures_of(regions, ["no_target"])})


def test_figures_of_several_targets_and_none_are_those_of_gres() -> None:
    """By hand: IoU 1/2 and 0 of two expressions with a target, 1 and 0 of two without."""
    some, nothing = encode_rle(square((0, 0, 2, 2))), encode_rle(square())
    shown = [SegmentedSentence("both", 1, 4, 8, some), SegmentedSentence("the bar", 0, 0, 6, nothing)]
    absent = [SegmentedSentence("a zebra", 1, 0, 0, nothing), SegmentedSentence("a bus", 1, 0, 10, some)]
    regions = [MeasuredRegion("a#0", "a", sentences=shown, without_target=absent), MeasuredRegion("a#1", "a", own=1)]
    figures = referring_figures(regions)
    values = {name: figure["value"] for name, figure in figures.items() if isinstance(figure, dict)}
    expected = {"gIoU": 1.5 / 4, "cIoU": 4 / 24, "Pr@0.5": 0.5, "without_mask": 0.5, "N_acc": 0.5, "T_acc": 0.5}
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert figures["sentences"] == 4
    again = [MeasuredRegion.from_json(json.loads(json.dumps(region.to_json()))) for region in regions]
    assert referring_figures(again) == figures
    flat = [MeasuredRegion.from_flat({**region.flat(), "cycle_intersection": 0, "cycle_union": 1}) for region in again]
    for region in regions:
        region.cycle = SegmentedCaption(0, 1)
    for name in ("gIoU", "cIoU"):
        assert summarise(flat)[name] == summarise(regions)[name] == pytest.approx(expected[name])
    alone = referring_figures([MeasuredRegion("a#0", "a", without_target=absent)])
    assert (alone["gIoU"]["value"], alone["N_acc"]["value"]) == (0.5, 0.5)
    assert not {"T_acc", "Pr@0.5"} & alone.keys()
    assert "N_acc" not in referring_figures([MeasuredRegion("a#0", "a", sentences=shown)])


def test_loop_figures() -> None:
    figures = loop_figures([region("a", 0.8, 0.1), region("a", 0.6, 0.2, own=1), region("b", 0.5)])
    assert figures["cycle_gIoU"]["value"] == pytest.approx(0.5)
    assert figures["cycle_cIoU"]["value"] == pytest.approx((80 + 20 + 50) / 300)
    assert figures["uniqueness"]["value"] == pytest.approx((0.7 - 0.4) / 2)
    assert figures["picks_own"]["value"] == 0.5
    assert (figures["captions"], figures["in_company"]) == (3, 2)


def test_figures_of_nothing_and_tables() -> None:
    assert referring_figures([]) == {"sentences": 0}
    assert loop_figures([region("a")]) == {"captions": 0}
    one = region("a", caption="x y")
    figures = captioning_figures([one])
    assert (figures["captions"], figures["with_references"], figures["words"]["value"]) == (1, 0, 2.0)
    table = markdown_table({"masks": figures_of([one], ["captioning"])})
    assert "**masks**: 1 regions, 1 images" in table
    assert "| words | 2.00 | 2.00 to 2.00 |" in table
    assert "| rejected | 0.0 | 0.0 to 0.0 |" in table
    assert "| distinct_1 | 100.0 | - |" in table


def test_the_figures_of_training_are_those_of_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)  # scores of Java's programs are not compared
    generator = np.random.default_rng(0)
    regions = []
    for number in range(30):
        ious = generator.uniform(size=1 + number % 3).round(2).tolist()
        one = region(f"image {number // 3}", *ious, own=number % len(ious), caption=f"word {number % 7}")
        one.references = ["word 3"][: number % 2]
        one.sentences = [SegmentedSentence("x", 1, int(generator.integers(50)), 50) for _ in range(number % 3)]
        regions.append(one)
    short, full = summarise(regions), figures_of(regions, ["referring", "captioning", "loop"])
    pairs = {
        "gIoU": full["referring"]["gIoU"],
        "cIoU": full["referring"]["cIoU"],
        "cycle_gIoU": full["loop"]["cycle_gIoU"],
        "uniqueness": full["loop"]["uniqueness"],
        "caption_exact": full["captioning"]["exact"],
        "caption_words": full["captioning"]["words"],
        "distinct_2": full["captioning"]["distinct_2"],
    }
    for name, figure in pairs.items():
        assert short[name] == pytest.approx(figure["value"], abs=1e-12), name
    assert full["regions"] == 30
    assert short["vocabulary"] == 8
    assert np.isnan(short["cycle_gIoU_frozen"])

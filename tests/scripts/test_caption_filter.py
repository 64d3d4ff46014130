"""The measure of caption filters: areas under the curve and what choosing does, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from experiments.caption_filter import Region, area, areas, choices, scores_of

from dual_loop.types import WrittenCaption


def region(image: str, truth: str, texts: list[str], own: list[float], heard: list[float], ious: list[float]) -> Region:
    written = [WrittenCaption(text, (1, 2), None, False) for text in texts]
    found = Region(image, truth, written, likelihoods={"own": own, "apart": heard}, others=[-3.0])
    found.ious = {who: [(iou, 0.1) for iou in ious] for who in ("own", "apart")}
    return found


def test_the_area_counts_pairs_and_a_tie_half() -> None:
    right, score = np.array([True, True, False, False]), np.array([0.9, 0.5, 0.5, 0.1])
    assert area(right, score) == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_scores_and_choices() -> None:
    regions = [
        region("a", "the red star", ["the red star", "the blue star"], [-0.1, -2.0], [-0.1, -2.0], [0.5, 0.9]),
        region("b", "the red moon", ["the red star", "the red moon"], [-0.9, -0.5], [-2.0, -0.2], [0.5, 0.6]),
        region("c", "the blue flag", ["the blue flag", "the blue flag"], [-0.2, -0.2], [-0.2, -0.2], [0.1, 0.1]),
    ]
    found = areas(regions, scores_of(["apart"]))
    assert found["own likelihood"]["area"] == found["samples that agree"]["area"] + 0.25 == 1.0
    assert found["own IoU"]["area"] == 0.25
    assert found["own likelihood"]["best_half_right"] == 1.0
    rows = {(row["listener"], row["by"], row["margin"], row["floor"]): row for row in choices(regions, ["apart"])}

    def counts(*rule) -> tuple:
        return tuple(rows[rule][key] for key in ("right_to_wrong", "wrong_to_right", "replaced"))

    assert counts("apart", "likelihood", 0.1, 0.0) == (0, 1, 1)
    assert counts("own", "IoU", 0.0, 0.0) == (1, 1, 2)
    assert counts("own", "IoU", 0.3, 0.0) == (1, 0, 1)
    assert counts("own", "IoU", 0.0, 0.6) == (0, 1, 1), "the floor shuts the sample that the captioner does not believe"

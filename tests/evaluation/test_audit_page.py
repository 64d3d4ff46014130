"""The page of an audit: ranked regions, the histogram, what was left out; everything from data is escaped."""

from __future__ import annotations

import numpy as np

from dual_loop.data.coco_masks import encode_rle
from dual_loop.evaluation.audit_page import audit_page
from dual_loop.evaluation.figures import figures_of
from dual_loop.evaluation.measure import MeasuredRegion, SegmentedCaption, blank_regions

from small_model import scene_samples


def test_what_the_page_shows() -> None:
    [sample] = scene_samples(1)
    regions = blank_regions(sample, "sa1b")
    count = len(regions)
    assert count > 1
    for number, region in enumerate(regions):
        ious = [0.25] * count
        ious[number] = 0.2 + 0.75 * number / (count - 1)
        region.caption = f"<i>{number}</i>"
        region.cycle = SegmentedCaption(
            round(1000 * ious[number]), 1000, ious, encode_rle(np.asarray(sample.masks[number]))
        )
    regions[-1].rejected = "special_token"
    skipped = [{"data": "sa1b", "entry": "e7", "reason": "truncated_file", "message": "cut off"}]
    loaded: list[MeasuredRegion] = []

    def load(region: MeasuredRegion):
        loaded.append(region)
        return sample

    page = audit_page(
        regions,
        load,
        lead="sa1b; weights: none",
        figures={"sa1b": figures_of(regions, ["loop"])},
        kept=1,
        left_out={"low_iou": 2},
        skipped=skipped,
        examples=1,
    )
    assert [region.own for region in loaded] == [0, 0, count - 1]  # worst, ambiguous, best
    assert "Worst masks (1)" in page
    assert "Ambiguous captions (1)" in page
    assert "Best pairs (1)" in page
    assert page.count("data:image/jpeg") == 6
    assert "“&lt;i&gt;0&lt;/i&gt;”" in page
    assert "(rejected: special_token)" in page
    assert "IoU 0.200, uniqueness -0.050" in page
    assert f"reference: {sample.captions[0][0]}" in page
    assert "<td>sa1b</td><td>cycle_gIoU</td>" in page
    assert "<td>low_iou</td><td>2</td>" in page
    assert "<td>e7</td><td>truncated_file</td><td>cut off</td>" in page
    assert "<td>0.9 to 1.0</td><td>1</td>" in page

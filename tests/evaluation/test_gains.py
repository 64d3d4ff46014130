"""What ``summary.json`` says of the held-out set before and after training."""

from __future__ import annotations

import numpy as np
import pytest

from dual_loop.errors import ConfigError
from dual_loop.evaluation.gains import evaluation_summary, gain
from dual_loop.evaluation.measure import MeasuredRegion, SegmentedCaption, SegmentedSentence


def _result(name: str, image: str, *ious: float) -> MeasuredRegion:
    sentences = [SegmentedSentence("x", 1, iou * 10, 10.0) for iou in ious]
    return MeasuredRegion(name, image, caption="x", sentences=sentences, cycle=SegmentedCaption(5.0, 10.0))


def test_gain_pairs_regions_and_sentences() -> None:
    before = [_result("a", "i", 0.1, 0.2), _result("b", "j", 0.3)]
    after = [_result("a", "i", 0.2, 0.4), _result("b", "j", 0.6)]
    assert gain(before, after)["mean"] == pytest.approx(np.mean([0.1, 0.2, 0.3]))
    with pytest.raises(ConfigError, match="different regions"):
        gain(before, after[::-1])
    with pytest.raises(ConfigError, match="different regions"):
        gain(before, after[:1])


def test_summary_has_what_was_measured_and_no_nan() -> None:
    results = [_result("a", "i", 0.5)]
    assert evaluation_summary(None, None) == {}
    assert set(evaluation_summary(None, results)) == {"after"}
    summary = evaluation_summary(results, results)
    expected = {"gIoU": 0.5, "cIoU": 0.5, "cycle_gIoU": 0.5, "caption_exact": None, "cycle_gIoU_frozen": None}
    assert {name: summary["before"][name] for name in expected} == expected
    assert summary["flags"] == []

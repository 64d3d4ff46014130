"""The ledger of skipped samples: counts, logs each once, stops past a fraction, goes on after a resume."""

from __future__ import annotations

import json
import logging

import pytest

from dual_loop.data.dataset_builder import (
    SkipLedger,
    TooManyBadSamples,
)
from dual_loop.types import SkippedSample


def bad(number: int, source: str = "sav", reason: str = "broken") -> SkippedSample:
    return SkippedSample(source, f"id{number}", reason, f"message {number}")


def test_the_ledger_counts_events_and_different_samples_and_logs_each_once(caplog: pytest.LogCaptureFixture) -> None:
    ledger = SkipLedger(0.5, 10)
    with caplog.at_level(logging.WARNING):
        ledger.record([bad(1), bad(2, reason="empty_mask")], {"sav": 8, "sa1b": 8})
        ledger.record([bad(1), bad(1, source="sa1b")], {"sav": 8, "sa1b": 8})
    assert ledger.as_counters() == {
        "data/bad_samples": 4,
        "data/bad_samples_distinct": 3,
        "data/bad_samples/sa1b/broken": 1,
        "data/bad_samples/sav/broken": 2,
        "data/bad_samples/sav/empty_mask": 1,
    }
    assert [record.getMessage() for record in caplog.records] == [
        "Warning: skipped sav/id1 (broken): message 1",
        "Warning: skipped sav/id2 (empty_mask): message 2",
        "Warning: skipped sa1b/id1 (broken): message 1",
    ]


def test_without_bad_samples_the_counters_are_zero() -> None:
    ledger = SkipLedger(0.0, 0)
    ledger.record([], {"sav": 100})
    assert ledger.as_counters() == {"data/bad_samples": 0, "data/bad_samples_distinct": 0}


def test_the_ledger_stops_past_the_fraction_but_not_within_the_grace() -> None:
    ledger = SkipLedger(0.1, 50)
    ledger.record([bad(n) for n in range(30)], {"sav": 19, "sa1b": 1000})  # 49 tried
    with pytest.raises(TooManyBadSamples, match=r"sav \(30 different samples\).*30 of 51 tried: broken x 30.*0\.1"):
        ledger.record([], {"sav": 2})


def test_the_fraction_is_of_each_source_and_inclusive() -> None:
    ledger = SkipLedger(0.1, 50)
    ledger.record([bad(n) for n in range(10)], {"sav": 90, "sa1b": 0})  # exactly a tenth
    with pytest.raises(TooManyBadSamples, match="sav"):
        ledger.record([bad(10)], {"sa1b": 100_000})
    lenient = SkipLedger(1.0, 0)
    lenient.record([bad(n) for n in range(100)], {"sav": 1})


def test_the_ledger_goes_on_after_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    ledger = SkipLedger(0.1, 20)
    ledger.record([bad(1)], {"sav": 17})
    resumed = SkipLedger(0.1, 20)
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert resumed.as_counters() == ledger.as_counters()
    caplog.clear()
    resumed.record([bad(1)], {"sav": 0})
    assert not caplog.records  # met and logged before the stop
    assert resumed.num_distinct == 1
    with pytest.raises(TooManyBadSamples, match="3 of 20"):
        resumed.record([bad(2)], {"sav": 0})

"""The data set: bad samples are replaced and counted, other failures surface with their sample."""

from __future__ import annotations

import json
import logging
import pickle

import numpy as np
import pytest
from fake_source import CrashingSource, FakeSource, entry_of, first_batch, make_dataset, take

from dual_loop.data.dataset import SkipLedger, TooManyBadSamples
from dual_loop.data.dataset_builder import build_loader
from dual_loop.data.mixture import DrawKey, WindowedBatchSampler
from dual_loop.data.prepare import region_seed
from dual_loop.errors import DualLoopError, SampleError
from dual_loop.types import RegionSample, SkippedSample


def test_a_bad_sample_is_replaced_by_the_next_in_its_order_and_reported() -> None:
    good, bad = make_dataset(FakeSource("mine", 12)), make_dataset(FakeSource("mine", 12, bad=(3, 7)))
    replaced = 0
    for slot in range(12):
        key = good.stream[slot]
        prepared = bad[key]
        expected, attempt = key, 0
        while expected.entry in (3, 7):
            attempt += 1
            expected = bad.stream.substitute(key, attempt)
        replaced += attempt > 0
        assert prepared.region_names == [f"mine/mine_{expected.entry}#r"]
        assert len(prepared.skipped) == attempt
        if not attempt:  # else slot and attempt decide, so that a bad draw does not repeat itself
            assert prepared.captions == good[key].captions
        assert prepared.region_seeds.tolist() == good[key].region_seeds.tolist() == [region_seed(1, slot, 0)]
        if attempt:
            assert prepared.skipped[0] == SkippedSample(
                "mine", f"mine_{key.entry}", "broken_rle", f"entry {key.entry} is broken"
            )
    assert replaced == 2


def test_a_sample_that_cannot_be_prepared_is_skipped_too() -> None:
    dataset = make_dataset(FakeSource("mine", 3, vanishing=(0, 2)))
    for slot in range(3):
        prepared = dataset[dataset.stream[slot]]
        assert prepared.region_names == ["mine/mine_1#r"]
        assert all(skip.reason == "target_vanished" for skip in prepared.skipped)
        assert dataset.sample(dataset.stream[slot]).sample_id == "mine_1"


def test_replacements_draw_other_regions() -> None:
    class OneBadRegion(FakeSource):
        def load(self, index: int, rng: np.random.Generator) -> RegionSample:
            if rng.permutation(4)[0] == 3:
                raise SampleError("bad_polygon", "the last region has no polygon")
            return super().load(index, rng)

    dataset = make_dataset(OneBadRegion("mine", 40))
    tries = [len(dataset[dataset.stream[slot]].skipped) for slot in range(200)]
    assert 20 < sum(tries) < 120
    assert max(tries) < 8


def test_bad_regions_are_counted_shown_once_and_kept_over_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    region = SkippedSample("mine", "a", "bad_polygon", "too few points", "7")
    ledger = SkipLedger(0.0, 0)
    ledger.record([region, region], {"mine": 2})
    expected = {"data/bad_regions": 2, "data/bad_regions_distinct": 1, "data/bad_regions/mine/bad_polygon": 2}
    assert ledger.as_counters() == {"data/bad_samples": 0, "data/bad_samples_distinct": 0, **expected}
    resumed = SkipLedger(0.0, 0)
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    resumed.record([region], {"mine": 1})
    assert resumed.as_counters()["data/bad_regions"] == 3
    assert [record.getMessage() for record in caplog.records] == [
        "Warning: passed over a region mine/a#7 (bad_polygon): too few points"
    ]


@pytest.mark.parametrize(("length", "num_tries"), [(5, 5), (100, 32)])
def test_a_source_without_good_samples_stops_the_run(length: int, num_tries: int) -> None:
    source = FakeSource("mine", length, bad=tuple(range(length)))
    dataset = make_dataset(source)
    with pytest.raises(TooManyBadSamples, match=rf"{num_tries} samples in a row.*broken_rle x {num_tries}") as caught:
        dataset[dataset.stream[0]]
    assert not isinstance(caught.value, SampleError), "it ends a run, and is never skipped as one sample"
    assert len(set(source.loads)) == len(source.loads) == num_tries
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy)) == (TooManyBadSamples, str(caught.value))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_another_exception_surfaces_with_the_name_of_the_sample(num_workers: int) -> None:
    dataset = make_dataset(CrashingSource("mine", 1))
    loader = build_loader(dataset, WindowedBatchSampler(dataset.stream, 1), num_workers)
    with pytest.raises(DualLoopError, match=r"where: mine/mine_0; seen: ZeroDivisionError: oh no"):
        first_batch(loader)


def test_too_many_bad_samples_keep_their_type_on_the_way_from_a_worker() -> None:
    dataset = make_dataset(FakeSource("mine", 2, bad=(0, 1)))
    with pytest.raises(TooManyBadSamples, match="2 samples in a row"):
        first_batch(build_loader(dataset, WindowedBatchSampler(dataset.stream, 1), 1))


def test_an_epoch_shows_every_entry_once() -> None:
    dataset = make_dataset(FakeSource("one", 24))
    batches = take(iter(build_loader(dataset, WindowedBatchSampler(dataset.stream, 4))), 6)
    assert sorted(entry for batch in batches for entry in entry_of(batch)) == list(range(24))


def test_another_seed_is_another_order_and_other_choices() -> None:
    first, second = (make_dataset(FakeSource("one", 30), seed=seed) for seed in (1, 2))
    key = DrawKey(0, 5, 0, 0)
    assert first[key].region_seeds.tolist() != second[key].region_seeds.tolist()
    assert [first.stream[slot] for slot in range(30)] != [second.stream[slot] for slot in range(30)]


# --- the ledger: counts, logs each once, stops past a fraction, goes on after a resume --------------------------------


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
    assert resumed.as_counters()["data/bad_samples_distinct"] == 1
    with pytest.raises(TooManyBadSamples, match="3 of 20"):
        resumed.record([bad(2)], {"sav": 0})

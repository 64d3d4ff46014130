"""The data set: bad samples are replaced and reported, other failures surface with their sample."""

from __future__ import annotations

import pickle

import pytest
from fake_source import CrashingSource, FakeSource, entry_of, first_batch, make_dataset, take

from dual_loop.data.dataset_builder import (
    TooManyBadSamples,
    build_loader,
)
from dual_loop.data.mixture import DrawKey, WindowedBatchSampler
from dual_loop.data.prepare import region_seed
from dual_loop.errors import DualLoopError
from dual_loop.types import SkippedSample


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
        # Random choices come from the slot, not from the entry that was found.
        assert prepared.captions == good[key].captions
        assert prepared.region_seeds == good[key].region_seeds == [region_seed(1, slot, 0)]
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


@pytest.mark.parametrize(("length", "num_tries"), [(5, 5), (100, 32)])
def test_a_source_without_good_samples_stops_the_run(length: int, num_tries: int) -> None:
    source = FakeSource("mine", length, bad=tuple(range(length)))
    dataset = make_dataset(source)
    with pytest.raises(TooManyBadSamples, match=rf"{num_tries} samples in a row.*broken_rle x {num_tries}") as caught:
        dataset[dataset.stream[0]]
    assert caught.value.reason == "too_many_bad_samples"
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
    assert all(batch.samples == [] for batch in batches)


def test_another_seed_is_another_order_and_other_choices() -> None:
    first, second = (make_dataset(FakeSource("one", 30), seed=seed) for seed in (1, 2))
    key = DrawKey(0, 5, 0, 0)
    assert first[key].region_seeds != second[key].region_seeds
    assert [first.stream[slot] for slot in range(30)] != [second.stream[slot] for slot in range(30)]

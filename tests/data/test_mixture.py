"""The stream of draws: coverage, shares, the same samples for any split, and exact continuation."""

from __future__ import annotations

import itertools
import json
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dual_loop.data.mixture import (
    MAX_LENGTH,
    DrawKey,
    DrawStream,
    Permutation,
    WindowedBatchSampler,
    stable_hash,
)
from dual_loop.data.shares import SourceShare
from dual_loop.errors import CheckpointError


def make_stream(*lengths: int, repeats: float = 1.0, seed: int = 3) -> DrawStream:
    return DrawStream([SourceShare(f"s{i}", length, repeats) for i, length in enumerate(lengths)], seed)


def entries(keys: list[DrawKey], source_index: int) -> Counter[int]:
    return Counter(key.entry for key in keys if key.source_index == source_index)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    repeats=st.lists(st.sampled_from([0.5, 1.0, 1.7, 3.0]), min_size=4, max_size=4),
    num_epochs=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_entries_are_drawn_equally_often(lengths: list[int], repeats: list[float], num_epochs: int, seed: int) -> None:
    shares = [SourceShare(f"s{i}", n, max(r, 1 / n)) for i, (n, r) in enumerate(zip(lengths, repeats, strict=False))]
    stream = DrawStream(shares, seed)
    keys = [stream[slot] for slot in range(num_epochs * stream.epoch_length)]
    assert [key.slot for key in keys] == list(range(len(keys)))
    for index, (share, quota) in enumerate(zip(shares, stream.quotas, strict=True)):
        own = [key for key in keys if key.source_index == index]
        assert sorted(key.draw for key in own) == list(range(num_epochs * quota))
        for first in range(0, len(own) - share.length + 1, share.length):  # every whole pass sees every entry once
            one_pass = [key.entry for key in own if first <= key.draw < first + share.length]
            assert sorted(one_pass) == list(range(share.length))
        counts = [entries(keys, index)[entry] for entry in range(share.length)]
        assert max(counts) - min(counts) <= 1


def test_epochs_sources_and_seeds_have_orders_of_their_own() -> None:
    stream = make_stream(50, 50)
    first, second = ([stream[slot] for slot in range(e * 100, e * 100 + 100)] for e in (0, 1))
    orders = [
        [k.entry for k in sorted(keys, key=lambda k: k.draw) if k.source_index == i]
        for keys in (first, second)
        for i in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert [k.source_index for k in first] != [k.source_index for k in second]
    assert [make_stream(50, 50, seed=4)[slot] for slot in range(100)] != first
    assert [make_stream(50, 50)[slot] for slot in range(100)] == first


def test_sources_are_mixed_in_time() -> None:
    stream = make_stream(4000, 1000)
    for start in range(0, 5000, 500):
        num_small = sum(stream[slot].source_index for slot in range(start, start + 500))
        assert 60 <= num_small <= 140  # 100 expected, deviation about 9


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 40), slot=st.integers(0, 500))
def test_substitutes_walk_over_the_whole_source_once(length: int, slot: int) -> None:
    stream = make_stream(length, 5)
    key = stream[slot]
    size = stream.shares[key.source_index].length
    walked = [key, *(stream.substitute(key, attempt) for attempt in range(1, size))]
    assert sorted(k.entry for k in walked) == list(range(size))
    assert {(k.source_index, k.draw, k.slot) for k in walked} == {(key.source_index, key.draw, key.slot)}


def test_a_stream_survives_pickling() -> None:
    stream = make_stream(7, 9)
    copy = pickle.loads(pickle.dumps(stream))
    assert [copy[slot] for slot in range(40)] == [stream[slot] for slot in range(40)]


def test_slots_count_from_zero() -> None:
    with pytest.raises(IndexError, match="-1"):
        make_stream(3)[-1]


def take(sampler: WindowedBatchSampler, num_batches: int) -> list[list[DrawKey]]:
    return list(itertools.islice(sampler, num_batches))


@pytest.mark.parametrize(
    ("world_size", "batch_size", "accumulation"), [(1, 4, 1), (4, 1, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
)
def test_an_optimiser_step_has_the_same_samples_for_any_split(
    world_size: int, batch_size: int, accumulation: int
) -> None:
    stream = make_stream(10, 7)
    steps: list[list[DrawKey]] = [[] for _ in range(6)]
    for rank in range(world_size):
        sampler = WindowedBatchSampler(stream, batch_size, world_size, rank, accumulation)
        for number, batch in enumerate(take(sampler, 6 * accumulation)):
            assert len(batch) == batch_size
            steps[number // accumulation] += batch
    expected = take(WindowedBatchSampler(stream, 4), 6)
    assert [sorted(step, key=lambda k: k.slot) for step in steps] == expected


def test_coverage_is_exact_on_64_ranks_with_8_workers() -> None:
    stream = make_stream(1500, 500, 48)  # 2048 slots: 4 optimiser steps of 64 x 2 x 4
    drawn: list[DrawKey] = []
    for rank in range(64):
        batches = take(WindowedBatchSampler(stream, 2, 64, rank, 4), 4 * 4)
        for worker in range(8):  # a loader gives batch b to worker b mod 8
            drawn += [key for batch in batches[worker::8] for key in batch]
    assert sorted(key.slot for key in drawn) == list(range(2048))
    for index, length in enumerate((1500, 500, 48)):
        assert entries(drawn, index) == Counter(range(length))


@settings(max_examples=40, deadline=None)
@given(
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    step=st.integers(0, 30),
    data=st.data(),
)
def test_resuming_anywhere_equals_the_straight_stream(
    world_size: int, batch_size: int, accumulation: int, step: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world_size - 1))
    geometry = (batch_size, world_size, rank, accumulation)
    straight = WindowedBatchSampler(make_stream(11, 6, repeats=1.5), *geometry)
    state = json.loads(json.dumps(straight.state_dict(step)))
    resumed = WindowedBatchSampler(make_stream(11, 6, repeats=1.5), *geometry)
    resumed.load_state_dict(state)
    expected = take(straight, (step + 4) * accumulation)[step * accumulation :]
    assert take(resumed, 4 * accumulation) == expected
    assert [straight.keys(step, micro) for micro in range(accumulation)] == expected[:accumulation]
    straight.start_step = step
    assert take(straight, 1) == expected[:1]


def test_resuming_with_another_split_of_the_same_effective_batch_is_allowed() -> None:
    state = WindowedBatchSampler(make_stream(11), 2, 1, 0, 4).state_dict(5)
    other = WindowedBatchSampler(make_stream(11), 1, 4, 3, 2)
    other.load_state_dict(state)
    assert other.start_step == 5


@pytest.mark.parametrize(
    ("stream", "batch_size"),
    [
        (make_stream(11, 6), 3),
        (make_stream(11, 7), 2),
        (make_stream(11, 6, seed=9), 2),
        (make_stream(11, 6, repeats=2), 2),
        (DrawStream([SourceShare("s0", 11), SourceShare("other", 6)], 3), 2),
        (DrawStream([SourceShare("s0", 11, probe=("x",)), SourceShare("s1", 6)], 3), 2),
    ],
)
def test_resuming_on_other_data_is_refused(stream: DrawStream, batch_size: int) -> None:
    state = WindowedBatchSampler(make_stream(11, 6), 2).state_dict(5)
    with pytest.raises(CheckpointError, match=r"other samples here.*to do: resume with the same data"):
        WindowedBatchSampler(stream, batch_size).load_state_dict(state)


@pytest.mark.parametrize("step", [None, -1, "5"])
def test_a_state_without_a_step_is_refused(step: object) -> None:
    sampler = WindowedBatchSampler(make_stream(11), 2)
    with pytest.raises(CheckpointError, match="step"):
        sampler.load_state_dict({**sampler.state_dict(0), "step": step})


@pytest.mark.parametrize(("length", "expected"), [(1, 1), (24, 1), (25, 2), (48, 2)])
def test_steps_per_epoch_round_up(length: int, expected: int) -> None:
    assert WindowedBatchSampler(make_stream(length), 2, 3, 0, 4).steps_per_epoch == expected


def test_impossible_geometry_is_refused() -> None:
    for arguments in [(0,), (1, 0), (1, 2, 2), (1, 2, -1), (1, 1, 0, 0)]:
        with pytest.raises(ValueError, match="1 or more"):
            WindowedBatchSampler(make_stream(3), *arguments)
    with pytest.raises(IndexError, match="accumulation of 2"):
        WindowedBatchSampler(make_stream(3), 1, 1, 0, 2).keys(0, 2)


def test_every_length_up_to_300_and_some_longer_ones_are_bijections() -> None:
    for length in [*range(1, 301), 511, 512, 513, 2000, 4096, 4097]:
        assert sorted(Permutation(length, 7)) == list(range(length)), length


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, MAX_LENGTH), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_values_stay_in_range_and_differ(length: int, seed: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20))
    permutation = Permutation(length, seed, "stream", 3)
    values = [permutation[index] for index in indices]
    assert all(type(value) is int and 0 <= value < length for value in values)
    assert len(set(values)) == len(set(indices))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_another_seed_or_stream_is_another_order(first: int, second: int) -> None:
    orders = [Permutation(64, first), Permutation(64, first, 0), Permutation(64, first, "0"), Permutation(64, first, 1)]
    if first != second:
        orders.append(Permutation(64, second))
    mapped = [tuple(order) for order in orders]
    assert len(set(mapped)) == len(mapped)
    assert mapped[0] == tuple(Permutation(64, first))


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_order_of_a_short_length_is_about_equally_likely(length: int) -> None:
    num_orders = len(list(itertools.permutations(range(length))))
    trials = 60 * num_orders
    counts = Counter(tuple(Permutation(length, seed)) for seed in range(trials))
    assert len(counts) == num_orders
    chi_square = sum((count - 60) ** 2 / 60 for count in counts.values())
    freedom = num_orders - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("length", [16, 17, 1000, 65536])
def test_values_look_uniform_over_seeds_and_neighbours_are_not_kept_together(length: int) -> None:
    num_bins, trials = 16, 2000
    indices = (0, 1, length // 2, length - 1)
    drawn = np.array([[Permutation(length, seed)[index] for index in indices] for seed in range(trials)])
    for column in range(len(indices)):
        counts = np.bincount(drawn[:, column] * num_bins // length, minlength=num_bins)
        chance = np.bincount(np.arange(length) * num_bins // length, minlength=num_bins) / length
        chi_square = float(((counts - trials * chance) ** 2 / (trials * chance)).sum())
        assert chi_square < 15 + 5 * 30**0.5, (length, column)
    correlation = np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]
    assert abs(correlation + 1 / (length - 1)) < 0.1  # two draws without replacement repel by 1 / (n - 1)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match="length 10"):
        Permutation(10, 0)[index]


@pytest.mark.parametrize("length", [0, -3, MAX_LENGTH + 1])
def test_an_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="2\\*\\*62"):
        Permutation(length, 0)


def test_known_values_do_not_drift_between_versions_or_machines() -> None:
    # A changed order would make a resumed run repeat and miss samples without a word.
    assert stable_hash("region", 42, 7, 0) == 2547506584914111966
    assert [Permutation(10, 42)[index] for index in range(10)] == [8, 5, 4, 0, 7, 1, 3, 6, 2, 9]


def test_hash_tells_parts_apart_and_is_not_salted() -> None:
    assert stable_hash("a", "b") != stable_hash("ab")
    assert stable_hash(1) != stable_hash("1")
    assert stable_hash(1, 23) != stable_hash(12, 3)
    code = "from dual_loop.data.mixture import stable_hash; print(stable_hash('x', 1))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == stable_hash("x", 1)
    assert 0 <= stable_hash("x", 1) < 2**63

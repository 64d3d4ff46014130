"""The computed permutation: a bijection for every length, keyed by the seed, fair, and alike for one and for many."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dual_loop.data.permutation import MAX_LENGTH, Permutation, stable_hash


def test_every_length_up_to_2000_is_a_bijection() -> None:
    for length in range(1, 2001):
        values = Permutation(length, 7).map(np.arange(length))
        assert np.array_equal(np.sort(values), np.arange(length)), length


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, MAX_LENGTH), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_single_values_equal_mapped_values_and_stay_in_range(length: int, seed: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20))
    permutation = Permutation(length, seed, "stream", 3)
    mapped = permutation.map(np.array(indices))
    assert mapped.dtype == np.int64
    assert mapped.tolist() == [permutation[index] for index in indices]
    assert all(0 <= value < length for value in mapped)
    assert len(set(mapped.tolist())) == len(set(indices))


def test_map_keeps_the_shape_and_takes_nothing() -> None:
    permutation = Permutation(100, 0)
    assert permutation.map(np.arange(6).reshape(2, 3)).shape == (2, 3)
    assert permutation.map(np.array([], dtype=np.int64)).shape == (0,)
    assert len(permutation) == 100
    assert sorted(permutation) == list(range(100))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_another_seed_or_stream_is_another_order(first: int, second: int) -> None:
    indices = np.arange(64)
    orders = [Permutation(64, first), Permutation(64, first, 0), Permutation(64, first, "0"), Permutation(64, first, 1)]
    if first != second:
        orders.append(Permutation(64, second))
    mapped = [tuple(order.map(indices).tolist()) for order in orders]
    assert len(set(mapped)) == len(mapped)
    assert mapped[0] == tuple(Permutation(64, first).map(indices).tolist())


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
    indices = np.array([0, 1, length // 2, length - 1])
    drawn = np.stack([Permutation(length, seed).map(indices) for seed in range(trials)])
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
    with pytest.raises(IndexError, match="length 10"):
        Permutation(10, 0).map(np.array([0, index]))


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
    code = "from dual_loop.data.permutation import stable_hash; print(stable_hash('x', 1))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == stable_hash("x", 1)
    assert 0 <= stable_hash("x", 1) < 2**63

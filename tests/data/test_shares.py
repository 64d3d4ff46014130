"""Draws an epoch by repeats and weights; caps."""

from __future__ import annotations

import numpy as np
import pytest

from dual_loop.data.mixture import DrawStream
from dual_loop.data.shares import SourceShare, choose_capped, compute_quotas
from dual_loop.errors import ConfigError


def test_repeats_give_quotas() -> None:
    shares = [SourceShare("a", 10, 1.0), SourceShare("b", 10, 2.5), SourceShare("c", 10, 0.3), SourceShare("d", 9, 0)]
    assert compute_quotas(shares) == [10, 25, 3, 0]


def test_weights_share_the_draws_of_all_sources() -> None:
    shares = [SourceShare("a", 900, 1.0, 3.0), SourceShare("b", 50, 2.0, 1.0)]
    assert compute_quotas(shares) == [750, 250]


def test_sources_without_weight_keep_their_draws() -> None:
    shares = [SourceShare("a", 900, 1.0, 0.5), SourceShare("b", 100, 1.0, 0.5), SourceShare("c", 70, 2.0)]
    assert compute_quotas(shares) == [500, 500, 140]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([], "no source is given"),
        ([SourceShare("a", 0)], "a: the source is empty"),
        ([SourceShare("a", 5, -1.0)], "repeats is -1"),
        ([SourceShare("a", 5, float("nan"))], "repeats is nan"),
        ([SourceShare("a", 5, 1.0, float("inf"))], "weight is inf"),
        ([SourceShare("a", 5), SourceShare("a", 6)], "two sources have this name"),
        ([SourceShare("a", 5, 1.0, 2.0), SourceShare("b", 6)], "one source alone has a weight"),
        ([SourceShare("a", 5, 1.0, 0.0), SourceShare("b", 6, 1.0, 0.0)], "all weights are 0"),
        ([SourceShare("a", 5, 0.01), SourceShare("b", 6)], "gets no draw.*a"),
        ([SourceShare("a", 5, 0)], "no draw"),
    ],
)
def test_impossible_shares_are_refused(shares: list[SourceShare], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DrawStream(shares, 0)


def test_caps_are_nested_repeatable_and_not_the_first_ones() -> None:
    small, large = choose_capped(1000, 50, "cap"), choose_capped(1000, 200, "cap")
    assert set(small) < set(large)
    assert np.array_equal(small, choose_capped(1000, 50, "cap"))
    assert np.array_equal(small, np.sort(small))
    assert small.max() > 900
    assert small.min() < 100
    assert choose_capped(5, None, "cap").tolist() == choose_capped(5, 99, "cap").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="sav_max_samples"):
        choose_capped(5, 0, "sav_max_samples")

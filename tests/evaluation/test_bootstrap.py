"""Intervals by the bootstrap: against theory, by hand, and bad scores."""

from __future__ import annotations

import numpy as np
import pytest

from dual_loop.evaluation.bootstrap import bootstrap_ratio, paired_bootstrap


def test_a_constant_difference_has_an_interval_without_width():
    result = paired_bootstrap([0.25, 0.5, 0.0], [0.5, 0.75, 0.25], num_resamples=100)
    assert result == {"mean": 0.25, "ci95_low": 0.25, "ci95_high": 0.25}


def test_the_interval_matches_the_normal_theory():
    generator = np.random.default_rng(0)
    before = generator.normal(size=400)
    after = before + generator.normal(0.1, 0.5, size=400)
    result = paired_bootstrap(before, after)
    difference = after - before
    half_width = 1.96 * difference.std() / np.sqrt(400)
    assert result["mean"] == pytest.approx(difference.mean(), rel=1e-12)
    assert result["ci95_low"] == pytest.approx(difference.mean() - half_width, abs=0.1 * half_width)
    assert result["ci95_high"] == pytest.approx(difference.mean() + half_width, abs=0.1 * half_width)


def test_pairing_matters_and_the_seed_fixes_the_result():
    generator = np.random.default_rng(1)
    before, change = generator.normal(size=50), generator.normal(0.1, 0.01, size=50)
    result = paired_bootstrap(before, before + change)
    assert 0.09 < result["ci95_low"] <= result["mean"] <= result["ci95_high"] < 0.11
    assert result == paired_bootstrap(before, before + change)
    assert result != paired_bootstrap(before, before + change, seed=1)


def test_copies_inside_a_group_do_not_narrow_the_interval():
    generator = np.random.default_rng(2)
    single = generator.normal(size=40)
    copied = np.repeat(single, 9)
    names = [f"image_{i}" for i in range(40) for _ in range(9)]
    zeros = np.zeros_like(copied)
    reference = paired_bootstrap(np.zeros(40), single)
    assert paired_bootstrap(zeros, copied, groups=names) == pytest.approx(reference, rel=1e-9)
    naive = paired_bootstrap(zeros, copied)
    assert naive["ci95_high"] - naive["ci95_low"] < 0.5 * (reference["ci95_high"] - reference["ci95_low"])


def test_uneven_groups_are_averaged_over_items():
    # Groups a (values 1, 1, 1) and b (value 0): drawing aa, ab, ba, bb gives means 1, 3/4, 3/4, 0.
    result = paired_bootstrap([0, 0, 0, 0], [1, 1, 1, 0], groups=["a", "a", "a", "b"], num_resamples=2000)
    assert result == {"mean": 0.75, "ci95_low": 0.0, "ci95_high": 1.0}


def test_the_memory_bound_does_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(3)
    before, after = generator.normal(size=(2, 30))
    result = paired_bootstrap(before, after, num_resamples=100)
    monkeypatch.setattr("dual_loop.evaluation.bootstrap._MAX_DRAWS_AT_ONCE", 70)
    assert paired_bootstrap(before, after, num_resamples=100) == result


@pytest.mark.parametrize(
    ("before", "after", "options"),
    [
        ([1.0], [1.0, 2.0], {}),
        ([], [], {}),
        ([[1.0]], [[1.0]], {}),
        ([1.0, float("nan")], [1.0, 2.0], {}),
        ([1.0], [2.0], {"groups": ["a", "b"]}),
        ([1.0], [2.0], {"num_resamples": 0}),
    ],
)
def test_bad_scores_are_refused(before: list, after: list, options: dict):
    with pytest.raises(ValueError, match=r"cannot be paired|cannot be resampled.*finite"):
        paired_bootstrap(before, after, **options)


def test_bootstrap_ratio() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(0.5, 0.2, 400)
    low, high = bootstrap_ratio(values, np.ones(400), list(range(400)))
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.003)
    assert high == pytest.approx(values.mean() + error, abs=0.003)
    grouped = bootstrap_ratio(values, np.ones(400), [k // 100 for k in range(400)])
    assert grouped[1] - grouped[0] != high - low
    assert bootstrap_ratio([0.0, 0.0], [0.0, 0.0], ["a", "b"]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="cannot be resampled"):
        bootstrap_ratio([1.0], [1.0, 2.0], ["a"])

"""Measures: values by hand (with empty masks), merging, caption comparison, bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_loop.metrics import (
    PRECISION_THRESHOLDS,
    bootstrap_ratio,
    caption_exact,
    iou,
    mask_overlap,
    normalise_caption,
    paired_bootstrap,
)


def _six_pairs() -> tuple[np.ndarray, np.ndarray]:
    """Masks of 2 x 5: equal, 3/5, disjoint, empty/empty, empty/full, full/half."""
    pred, target = np.zeros((2, 6, 2, 5), dtype=bool)
    pred[0, 0, :4] = target[0, 0, :4] = True
    pred[1, 0, :3] = target[1, 0, :5] = True
    pred[2, 0], target[2, 1] = True, True
    target[4] = True
    pred[5], target[5, 0] = True, True
    return pred, target


# --- masks ----------------------------------------------------------------------------------------------------------


def test_intersection_and_union_by_hand():
    intersection, union = mask_overlap(*_six_pairs())
    assert intersection.tolist() == [4, 3, 0, 0, 0, 5]
    assert union.tolist() == [4, 5, 10, 0, 10, 10]


def test_torch_and_numpy_agree():
    pred, target = _six_pairs()
    for array, tensor in zip(
        mask_overlap(pred, target), mask_overlap(torch.from_numpy(pred), torch.from_numpy(target)), strict=True
    ):
        assert isinstance(tensor, torch.Tensor)
        assert array.tolist() == tensor.tolist()


def test_no_pairs_are_allowed():
    intersection, union = mask_overlap(np.zeros((0, 3, 3), bool), np.zeros((0, 3, 3), bool))
    assert intersection.shape == union.shape == (0,)
    assert iou(intersection, union).shape == (0,)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_masks_that_are_not_boolean_are_refused(dtype: type):
    masks = np.zeros((1, 2, 2), dtype)
    with pytest.raises(ValueError, match="not boolean"):
        mask_overlap(masks, masks)
    with pytest.raises(ValueError, match="not boolean"):
        mask_overlap(torch.from_numpy(masks), torch.zeros(1, 2, 2, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 2)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="cannot be compared"):
        mask_overlap(np.zeros(shape, bool), np.zeros((1, 2, 2) if len(shape) == 3 else shape, bool))


def test_ious_by_hand_with_empty_masks():
    # The fourth pair has two empty masks.
    assert iou(*mask_overlap(*_six_pairs())).tolist() == [1.0, 0.6, 0.0, 1.0, 0.0, 0.5]


@pytest.mark.parametrize("threshold", PRECISION_THRESHOLDS)
def test_an_iou_on_the_threshold_is_a_hit_and_just_below_is_not(threshold: float):
    tenths = round(10 * threshold)
    for scale in (1, 7, 12_345):
        assert iou([tenths * scale], [10 * scale]) >= threshold
        assert iou([tenths * scale * 100 - 1], [10 * scale * 100]) < threshold


# --- captions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Red\tcircle. ", "the red circle"),
        ("a dog .", "a dog"),
        ("a dog...", "a dog"),
        ("no. 5 bus", "no. 5 bus"),
        ("left, no comma lost", "left, no comma lost"),
        (" . ", ""),
    ],
)
def test_normalising_captions(text: str, expected: str):
    assert normalise_caption(text) == expected


@given(st.text(alphabet=st.sampled_from("aB .\t\nÉß,"), max_size=20))
def test_normalising_twice_changes_nothing(text: str):
    once = normalise_caption(text)
    assert normalise_caption(once) == once


def test_exact_captions():
    assert caption_exact("The red circle.", ["a blue square", "the red  circle"])
    assert not caption_exact("the red circles", ["the red circle"])
    with pytest.raises(ValueError, match="captions are needed"):
        caption_exact("the red circle", [])
    with pytest.raises(ValueError, match="captions are needed"):
        caption_exact("a", "abc")  # a string is a sequence of letters; "a" would be among them


# --- bootstrap ------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("dual_loop.metrics._MAX_DRAWS_AT_ONCE", 70)
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
    with pytest.raises(ValueError, match=r"cannot be paired|finite scores"):
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

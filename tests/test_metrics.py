"""Measures of masks: values by hand, with empty masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dual_loop.metrics import PRECISION_THRESHOLDS, iou, mask_overlap, ratio


def _six_pairs() -> tuple[np.ndarray, np.ndarray]:
    """Masks of 2 x 5: equal, 3/5, disjoint, empty/empty, empty/full, full/half."""
    pred, target = np.zeros((2, 6, 2, 5), dtype=bool)
    pred[0, 0, :4] = target[0, 0, :4] = True
    pred[1, 0, :3] = target[1, 0, :5] = True
    pred[2, 0], target[2, 1] = True, True
    target[4] = True
    pred[5], target[5, 0] = True, True
    return pred, target


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


def test_the_two_halves_of_an_average():
    assert ratio("a", []) == {"a/sum": 0.0, "a/count": 0.0}
    assert ratio("a", [1, 2.5]) == {"a/sum": 3.5, "a/count": 2.0}

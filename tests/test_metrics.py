"""Measures of masks: values by hand, with empty masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dual_loop.metrics import PRECISION_THRESHOLDS, boundary_f, iou, mask_overlap, ratio


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


def _public_f(pred: np.ndarray, target: np.ndarray) -> float:
    """F as DAVIS's public code defines it, pixel by pixel: boundary maps, dilation with a disk, matches."""
    height, width = target.shape
    radius = int(np.ceil(0.008 * np.linalg.norm((height, width))))
    disk = [
        (y, x) for y in range(-radius, radius + 1) for x in range(-radius, radius + 1) if y * y + x * x <= radius**2
    ]

    def boundary(mask: np.ndarray) -> np.ndarray:
        found = np.zeros(mask.shape, bool)
        for y in range(height):
            for x in range(width):
                below, right = y + 1 < height, x + 1 < width
                found[y, x] |= right and mask[y, x] != mask[y, x + 1]
                found[y, x] |= below and mask[y, x] != mask[y + 1, x]
                found[y, x] |= below and right and mask[y, x] != mask[y + 1, x + 1]
        return found

    def dilated(edge: np.ndarray) -> np.ndarray:
        wide = np.zeros(edge.shape, bool)
        for y, x in zip(*edge.nonzero(), strict=True):
            for dy, dx in disk:
                if 0 <= y + dy < height and 0 <= x + dx < width:
                    wide[y + dy, x + dx] = True
        return wide

    own, other = boundary(pred), boundary(target)
    if not own.any() or not other.any():
        return float(own.any() == other.any())
    precision = (own & dilated(other)).sum() / own.sum()
    recall = (other & dilated(own)).sum() / other.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("size", [(24, 31), (30, 140), (20, 260)], ids=["1_pixel", "2_pixels", "3_pixels"])
def test_f_equals_the_public_definition(size):
    rng = np.random.default_rng(size[0])
    y, x = np.indices(size)
    for case in range(4):
        centres = rng.uniform(0.1, 0.9, (2, 2)) * size
        pred, target = ((y - cy) ** 2 + (x - cx) ** 2 < (size[0] / 3) ** 2 for cy, cx in centres)
        if case == 3:
            pred, target = rng.random((2, *size)) < 0.05
        assert boundary_f(pred, target) == pytest.approx(_public_f(pred, target), abs=1e-6)


def test_f_by_hand():
    """A square of 10 x 10 in 60 x 60: the tolerance is 1 pixel, its boundary map a ring of 11 x 11, 40 pixels."""
    square = np.zeros((60, 60), bool)
    square[20:30, 20:30] = True
    one, three = np.roll(square, 1, axis=1), np.roll(square, 3, axis=1)
    assert boundary_f(square, square) == 1
    assert boundary_f(one, square) == 1
    # Near the other ring: 9 of the 11 pixels of either horizontal edge, and the ends of one vertical edge.
    assert boundary_f(three, square) == pytest.approx(20 / 40, abs=1e-12)
    assert boundary_f(np.roll(square, 25, axis=0), square) == 0


def test_j_and_f_of_empty_masks():
    nothing, something = np.zeros((2, 20, 20), bool)
    something[5:9, 5:9] = True
    assert boundary_f(nothing, nothing) == 1
    assert boundary_f(something, nothing) == boundary_f(nothing, something) == 0
    assert iou(*mask_overlap(nothing[None], nothing[None])) == 1
    # The whole image has no boundary; the public definition says 1 against an empty mask, though J is 0.
    assert boundary_f(~nothing, nothing) == _public_f(~nothing, nothing) == 1

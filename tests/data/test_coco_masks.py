"""Polygons and codes of pycocotools."""

from __future__ import annotations

import numpy as np
import pytest

from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.masks import decode_rle, decode_segmentation
from dual_loop.errors import SampleError


def reason_of(call) -> str:
    with pytest.raises(SampleError) as caught:
        call()
    return caught.value.reason


def test_encode_refuses_a_stack() -> None:
    with pytest.raises(ValueError, match="wrong shape"):
        encode_rle(np.zeros((1, 2, 2), bool))


def test_overlapping_polygons_are_united_not_summed() -> None:
    first, second = [2, 2, 12, 2, 12, 12, 2, 12], [8, 8, 18, 8, 18, 18, 8, 18]
    united = decode_segmentation([first, second], 20, 20, "here")
    alone = [decode_segmentation([polygon], 20, 20, "here") for polygon in (first, second)]
    assert np.array_equal(united, alone[0] | alone[1])
    assert (alone[0] & alone[1]).sum() > 0
    assert alone[0].sum() == 100
    assert np.array_equal(decode_rle(encode_rle(united), "here"), united)


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        None,
        "abc",
        [[1, 1, 2, 2]],
        [[0, 0, 3, 0, 3, 3], [1, 1, 2, 2]],
        [[0, 0, 3, 0, 3, 3, 1]],
        [[0, 0, 3, 0, float("nan"), 3]],
        [[0, 0, 3, 0, 1e9, 3]],
        [[0, 0, 3, 0, "x", 3]],
        [[[0, 0], [3, 0], [3, 3]]],
    ],
)
def test_bad_polygons_are_refused(segmentation: object) -> None:
    assert reason_of(lambda: decode_segmentation(segmentation, 10, 10, "here")) == "bad_polygon"

"""The predictor on the tiny checkpoint: arrays and PIL, one and many, boxes and points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dual_loop.errors import CheckpointError, PromptError, SampleError
from dual_loop.metrics import iou_table
from dual_loop.serve.predictor import Predictor, region_sample
from dual_loop.testing.scenes import generate_scene

SCENE = generate_scene(1003)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.load(device="cpu")


def test_caption_segment_and_loop_agree(predictor: Predictor) -> None:
    masks = np.asarray(SCENE.masks)
    captions = predictor.caption(SCENE.image, masks)
    assert captions == list(SCENE.captions), "the tiny checkpoint knows this scene"
    assert predictor.caption(Image.fromarray(SCENE.image), masks[0]) == captions[:1]
    found = predictor.segment(SCENE.image, captions)
    assert [one.text for one in found] == captions
    result = predictor.loop(SCENE.image, masks)
    assert result.captions == captions
    assert result.rejected == [None] * len(captions)
    for number, one in enumerate(found):
        assert np.array_equal(one.mask, result.masks[number])
        assert 0.5 < one.confidence <= 1
        assert result.ious[number] > 0.5
    assert np.array_equal(result.matrix.diagonal(), result.ious)
    assert result.matrix[0, 1] < 0.2


def test_many_equal_one_by_one(predictor: Predictor) -> None:
    scenes = [generate_scene(1000 + k) for k in range(10)]
    items = [(scene.image, np.asarray(scene.masks)) for scene in scenes]
    assert predictor.caption_many(items) == [predictor.caption(*item) for item in items]
    many = predictor.segment_many([(scene.image, list(scene.captions)) for scene in scenes])
    single = predictor.segment(scenes[9].image, list(scenes[9].captions))
    for first, second in zip(many[9], single, strict=True):
        assert np.mean(first.mask != second.mask) < 1e-3
    assert predictor.segment_many([(scenes[0].image, [])]) == [[]]


def test_written_answers_hold_seg(predictor: Predictor) -> None:
    [one] = predictor.segment(SCENE.image, SCENE.captions[0], generated=True)
    assert one.num_masks == 1
    assert one.mask.any()


def test_points_and_boxes(predictor: Predictor) -> None:
    mask = np.asarray(SCENE.masks[1])
    rows, columns = np.nonzero(mask)
    drawn = predictor.region_from_point(SCENE.image, (columns.mean(), rows.mean()))
    assert iou_table(torch.from_numpy(drawn[None]), torch.from_numpy(mask[None]))[0, 0] > 0.5
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    area = predictor.region_from_box(SCENE.image, box)
    assert area.sum() == (box[2] - box[0]) * (box[3] - box[1])
    with pytest.raises(SampleError, match="does not fit its image"):
        predictor.region_from_box(SCENE.image, (5, 5, 5, 9))
    with pytest.raises(SampleError, match="outside its image"):
        predictor.region_from_point(SCENE.image, (-1, 5))


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        (np.ones((3, 3)), "size_mismatch"),
        (np.zeros(SCENE.image.shape[:2]), "empty_mask"),
        (np.ones((0, *SCENE.image.shape[:2])), "size_mismatch"),
    ],
)
def test_masks_that_do_not_fit(masks: np.ndarray, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        region_sample(SCENE.image, masks)
    assert caught.value.reason == reason


def test_refused_inputs(predictor: Predictor) -> None:
    with pytest.raises(SampleError, match="not an RGB image"):
        predictor.segment(SCENE.image[:, :, 0], "x")
    with pytest.raises(PromptError, match="special token"):
        predictor.segment(SCENE.image, "the [SEG] thing")
    with pytest.raises(CheckpointError, match="no such run or weights"):
        Predictor.load("nowhere")


@pytest.mark.parametrize("image", ["cat.jpg", Path("cat.jpg"), None, SCENE.image.tolist(), b"x"])
def test_what_is_no_image_is_refused(predictor: Predictor, image: object) -> None:
    mask = np.asarray(SCENE.masks[0])
    for call in (
        lambda: predictor.caption(image, mask),
        lambda: predictor.segment(image, "a"),
        lambda: predictor.loop(image, mask),
        lambda: predictor.region_from_box(image, (1, 1, 9, 9)),
    ):
        with pytest.raises(SampleError, match="not an image"):
            call()


@pytest.mark.parametrize("texts", [None, [None], 7, ["a", Path("b")], "half \ud83d of a pair", ["a", "\udcff"], b"a"])
def test_what_is_no_text_is_refused(predictor: Predictor, texts: object) -> None:
    with pytest.raises(PromptError, match="not a text"):
        predictor.segment(SCENE.image, texts)


@pytest.mark.parametrize("masks", [None, "cat.png", Path("cat.png"), [None], [np.ones((2, 2)), np.ones((3, 3))]])
def test_what_is_no_mask_is_refused(masks: object) -> None:
    with pytest.raises(SampleError) as caught:
        region_sample(SCENE.image, masks)
    assert caught.value.reason == "not_a_mask"


def test_bad_numbers_and_damaged_images_are_refused(predictor: Predictor, tmp_path: Path) -> None:
    for box in (None, "1,2,3,4", (1, 2, 3), (1, 2, 3, None), 5):
        with pytest.raises(SampleError, match="not the right numbers"):
            predictor.region_from_box(SCENE.image, box)
    with pytest.raises(SampleError, match="not the right numbers"):
        predictor.region_from_point(SCENE.image, None)
    Image.fromarray(SCENE.image).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(SampleError) as caught:
        predictor.segment(Image.open(tmp_path / "cut.jpg"), "a")
    assert caught.value.reason == "truncated_file"

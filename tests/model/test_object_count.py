"""Every image brought to the same number of objects: Sa2VA's five-object rule as an option of the loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dual_loop.config import LoopConfig, LossConfig, load_config
from dual_loop.errors import ConfigError, PromptError
from dual_loop.loop.segmentation_loss import compute_segmentation_loss
from dual_loop.loop.task import DualLoopTask
from dual_loop.model.object_count import object_multiplicity, object_order
from dual_loop.model.sa2va_api import original_mask_losses
from dual_loop.types import RegionCaption

from small_model import scene_samples, small_batch, small_config, small_model


def test_fewer_objects_are_repeated_cyclically():
    owners = torch.tensor([0, 0, 1, 1, 1])
    order = object_order(owners, 2, 5, torch.arange(5))
    assert order.tolist() == [0, 1, 0, 1, 0, 2, 3, 4, 2, 3]
    assert object_multiplicity(owners, 2, 5, torch.arange(5)).tolist() == [3, 2, 2, 2, 1]


@settings(deadline=None, max_examples=50)
@given(owners=st.lists(st.integers(0, 3), min_size=1, max_size=20), num_objects=st.integers(1, 6), seed=st.integers(0))
def test_every_image_gets_its_own_objects_as_evenly_as_possible(owners, num_objects, seed):
    owners += range(max(owners) + 1)  # every image has an object
    index, num_images = torch.tensor(owners), max(owners) + 1
    seeds = torch.arange(len(owners)) + seed % 1000
    order = object_order(index, num_images, num_objects, seeds)
    assert torch.equal(order, object_order(index, num_images, num_objects, seeds))
    assert torch.equal(index[order], torch.arange(num_images).repeat_interleave(num_objects))
    for image, chosen in enumerate(order.view(num_images, num_objects).tolist()):
        counts = [chosen.count(k) for k in range(len(owners)) if owners[k] == image]
        assert max(counts) - min(counts) <= 1


def test_more_objects_are_drawn_by_the_seed():
    owners = torch.zeros(9, dtype=torch.long)
    drawn = {tuple(object_order(owners, 1, 5, torch.full((9,), seed)).tolist()) for seed in range(20)}
    assert all(len(set(order)) == 5 for order in drawn)
    assert len(drawn) > 15


def test_an_image_without_objects_is_refused():
    with pytest.raises(PromptError, match="image 1 of the batch"):
        object_order(torch.tensor([0, 2]), 3, 5, torch.arange(2))


def test_the_option_is_checked(tmp_path):
    assert load_config(None, {"loss.num_objects": "none"}).loss.num_objects is None
    with pytest.raises(ConfigError, match="num_objects"):
        load_config(None, {"loss.num_objects": 0})


def batch_data(prompter, batch):
    """All captions of a batch of one-tile images as plain, right-padded rows, as the original is fed."""
    rows = []
    for image in range(len(batch.sources)):
        ids = prompter.image_prefix(1)
        for caption, owner in zip(batch.captions, batch.region_image.tolist(), strict=True):
            if owner == image:
                ids = [*ids, *prompter.segment_turn(caption, "segment").input_ids]
        rows.append(ids)
    length = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.where(mask, ids, -100),
        "pixel_values": batch.pixel_values,
        "g_pixel_values": batch.g_pixel_values,
        "masks": batch.target_masks,
        "region_seeds": batch.region_seeds,
    }


def test_the_loss_of_repeated_objects():
    model, prompter, config = small_model()
    data = batch_data(prompter, small_batch(config, scene_samples(2)))
    with torch.no_grad():
        model.loss_config = LossConfig(num_points=0, num_objects=5)
        losses = model(data, mode="loss")
        rows = (data["input_ids"] == model.seg_id).nonzero()[:, 0]
        order = object_order(rows, 2, 5, data["region_seeds"])
        logits = model(data, mode="predict")["segmentation"].mask_logits
        expected = original_mask_losses(logits[order], data["masks"][order], model.loss_config)
        points = torch.rand(10, 30, 2, generator=torch.Generator().manual_seed(0))
        at_points = model({**data, "point_coords": points}, mode="loss")
        backwards = model({**data, "object_order": order.flip(0), "point_coords": points.flip(0)}, mode="loss")
        model.loss_config = LossConfig(num_points=30, num_objects=5)
        sampled = [model(data, mode="loss")["loss_mask"] for _ in range(2)]
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(at_points[name], backwards[name], atol=1e-6, rtol=1e-5)
    assert sampled[0] == sampled[1]
    assert sampled[0] != pytest.approx(float(losses["loss_mask"]))


def test_training_weighs_objects_as_the_repetition_would():
    model, prompter, config = small_model()
    batch = small_batch(config, scene_samples(2))
    captions = [RegionCaption(caption, is_reference=True) for caption in batch.captions]
    counts = torch.bincount(batch.region_image).tolist()
    repeats = object_multiplicity(batch.region_image, 2, 4, batch.region_seeds)
    loss = dataclasses.replace(config.loss, num_objects=4)
    with torch.no_grad():
        output = compute_segmentation_loss(model, batch, captions, prompter, LoopConfig(), loss)
        logits = output.masks.mask_logits
        order = object_order(batch.region_image, 2, 4, batch.region_seeds)
        expected = original_mask_losses(logits[order], batch.target_masks[order], loss)
    assert len(logits) == sum(counts)
    assert float(repeats.sum()) == output.terms["mask_loss"].count == 8.0
    torch.testing.assert_close(output.terms["mask_loss"].mean, expected["loss_mask"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output.terms["dice_loss"].mean, expected["loss_dice"], atol=1e-6, rtol=1e-5)
    task = DualLoopTask(model, prompter, dataclasses.replace(config, loop=LoopConfig(), loss=loss))
    [packed] = task.prepare([batch])
    assert packed.counts["mask_loss"] == 8.0
    assert torch.equal(packed.region_weights, repeats)


def test_weights_of_regions_are_no_part_of_the_originals_loss():
    model, prompter, config = small_model(small_config())
    batch = small_batch(config, scene_samples(1))
    data = {**batch_data(prompter, batch), "region_weights": torch.ones(len(batch.captions))}
    with pytest.raises(PromptError, match="region_weights"):
        model(data, mode="loss")

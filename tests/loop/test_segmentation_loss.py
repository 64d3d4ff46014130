"""Steps 2 and 3 on their own are those of the task."""

from __future__ import annotations

import pytest
import torch

from dual_loop.config import LossConfig
from dual_loop.loop.segmentation_loss import compute_segmentation_loss
from dual_loop.losses import dice_loss, mask_cross_entropy
from dual_loop.points import mask_sample, point_sample, sample_points
from dual_loop.types import RegionCaption

from loop_settings import build, setting
from small_model import pair_samples, scene_samples, small_batch

pytestmark = pytest.mark.usefixtures("precision")


@pytest.mark.parametrize("num_points", [0, 64])
def test_terms_masks_and_gradient_are_those_of_the_task(num_points):
    config = setting(loss=LossConfig(num_points=num_points))
    model, task = build(config)
    batch = small_batch(config, [*scene_samples(1), *pair_samples(1)])
    (packed,) = task.prepare([batch])

    def gradient(output):
        model.zero_grad()
        sum(term.total for term in output.terms.values()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    inside = task(packed)
    alone = compute_segmentation_loss(model, batch, packed.captions, task.prompter, config.loop, config.loss)
    assert {name: term.count for name, term in alone.terms.items()} == packed.counts
    torch.testing.assert_close(alone.masks.mask_logits, inside.masks.mask_logits)
    for name, term in inside.terms.items():
        torch.testing.assert_close(alone.terms[name].total, term.total)
    torch.testing.assert_close(gradient(alone), gradient(inside))


def test_points_are_read_from_the_whole_masks_where_that_is_asked_for():
    config = setting(loss=LossConfig(num_points=64, points_from="full"))
    _, task = build(config)
    batch = small_batch(config, [*scene_samples(2), *pair_samples(1)])
    (packed,) = task.prepare([batch])
    output = task(packed)
    terms, logits = output.terms, output.masks.mask_logits
    points = sample_points(logits, batch.region_seeds, 64, 3.0, 0.75)
    read = point_sample(logits, points)
    whole = [mask[None] for own in batch.full_masks for mask in own]
    wanted = mask_sample(whole, points)
    assert whole[0].shape != batch.target_masks[:1].shape
    torch.testing.assert_close(terms["mask_loss"].total, 2.0 * mask_cross_entropy(read, wanted).sum())
    torch.testing.assert_close(terms["dice_loss"].total, 0.5 * dice_loss(read, wanted).sum())
    assert not torch.allclose(wanted, point_sample(batch.target_masks, points), atol=0.1)


def test_captions_that_are_left_out_count_for_nothing():
    config = setting()
    model, task = build(config)
    batch = small_batch(config, scene_samples(1, captions=False))
    captions = [RegionCaption("a star", is_kept=n > 0) for n in range(batch.num_regions)]
    output = compute_segmentation_loss(model, batch, captions, task.prompter, config.loop, config.loss)
    assert output.terms["mask_loss"].count == batch.num_regions - 1 > 0
    assert len(output.masks.mask_logits) == batch.num_regions

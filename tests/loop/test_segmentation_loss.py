"""Steps 2 and 3 on their own are those of the task."""

from __future__ import annotations

import pytest
import torch

from dual_loop.config import LossConfig
from dual_loop.loop.segmentation_loss import compute_segmentation_loss
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


def test_captions_that_are_left_out_count_for_nothing():
    config = setting()
    model, task = build(config)
    batch = small_batch(config, scene_samples(1, captions=False))
    captions = [RegionCaption("a star", is_kept=n > 0) for n in range(batch.num_regions)]
    output = compute_segmentation_loss(model, batch, captions, task.prompter, config.loop, config.loss)
    assert output.terms["mask_loss"].count == batch.num_regions - 1 > 0
    assert len(output.masks.mask_logits) == batch.num_regions

"""The cycle filter: captions weigh by how well their mask comes back."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dual_loop.metrics import iou_table

from loop_settings import build, masks_only, setting
from small_model import scene_samples, small_batch


def test_the_cycle_filter_weighs_captions():
    config = setting("none")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, cycle_keep=0.9, cycle_drop=0.0))
    _, task = build(config)
    batch = small_batch(config, [*masks_only(), *scene_samples(1)])
    (packed,) = task.prepare([batch])
    weights = packed.region_weights
    given = torch.tensor([caption.is_reference for caption in packed.captions])
    assert torch.equal(weights[given], torch.ones(int(given.sum())))
    with torch.no_grad():
        logits = task(packed).masks.mask_logits
    ious = iou_table(logits > 0, batch.binary_targets).diagonal()
    torch.testing.assert_close(weights[~given], (ious / 0.9).clamp(0, 1)[~given])
    assert packed.counts["mask_loss"] == pytest.approx(float(weights.sum()))


def test_captions_below_the_drop_teach_nothing():
    config = setting("none")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, cycle_keep=1.0, cycle_drop=0.999))
    _, task = build(config)
    batch = small_batch(config, [*masks_only(), *scene_samples(1)])
    (packed,) = task.prepare([batch])
    num_written = sum(not caption.is_reference for caption in packed.captions)
    assert packed.metrics["caption/filtered"] == num_written > 0
    assert packed.counts["mask_loss"] == batch.num_regions - num_written > 0

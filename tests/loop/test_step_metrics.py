"""What a step adds to the records: sums that fit their counts, and captions by where they are from."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dual_loop.loop.step_metrics import ratio, step_metrics
from dual_loop.types import RegionCaption, WrittenCaption

from loop_settings import build, setting
from small_model import scene_samples, small_batch


def test_step_reports_sums_and_counts():
    config = setting()
    _, task = build(config)
    batch = small_batch(config, [*scene_samples(1), *scene_samples(1, source="sa1b", captions=False)])
    (packed,) = task.prepare([batch])
    output = task(packed)
    metrics = step_metrics(packed, output.masks)
    assert metrics["regions"] == batch.num_regions
    assert metrics["cycle_iou/count"] + metrics["reference_iou/count"] == batch.num_regions
    assert {name: term.count for name, term in output.terms.items()} == packed.counts


def test_a_rejected_caption_is_an_empty_mask_whatever_step_two_read():
    config = setting()
    _, task = build(config)
    batch = small_batch(config, scene_samples(1))
    (packed,) = task.prepare([batch])
    masks = task(packed).masks
    perfect = dataclasses.replace(masks, mask_logits=batch.target_masks.float() - 0.5)
    assert step_metrics(packed, perfect)["reference_iou/sum"] == pytest.approx(batch.num_regions)
    packed.captions[0] = RegionCaption("the object", rejected="empty")
    metrics = step_metrics(packed, perfect)
    assert (metrics["cycle_iou/sum"], metrics["cycle_iou/count"]) == (0.0, 1.0)
    assert metrics["reference_iou/sum"] == pytest.approx(batch.num_regions - 1)
    assert metrics["caption/rejected"] == 1.0
    assert torch.equal(packed.batch.target_masks, batch.target_masks)


def test_every_written_caption_is_counted_by_its_gate():
    def written(gate, truncated=False):
        return WrittenCaption("x", (1,), gate, truncated)

    _, task = build(setting())
    (packed,) = task.prepare([small_batch(setting(), scene_samples(1))])
    masks = task(packed).masks
    packed.captions[:] = [RegionCaption("z", is_reference=True)] * len(packed.captions)
    packed.captions[:2] = [
        RegionCaption("x", greedy=written("empty"), samples=(written(None), written("truncated", True))),
        RegionCaption("y", is_reference=True),
    ]
    metrics = step_metrics(packed, masks)
    assert (metrics["gate/empty"], metrics["gate/truncated"], metrics["gate/script"]) == (1.0, 1.0, 0.0)
    assert (metrics["gated/sum"], metrics["gated/count"]) == (2.0, 3.0)
    assert (metrics["truncated/sum"], metrics["truncated/count"]) == (1.0, 3.0)
    assert ratio("a", []) == {"a/sum": 0.0, "a/count": 0.0}

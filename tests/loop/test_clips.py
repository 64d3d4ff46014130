"""Clips of several frames that share one [SEG]."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dual_loop.config import LossConfig
from dual_loop.data.prepare import collate
from dual_loop.loop.task import DualLoopTask
from dual_loop.losses import mask_cross_entropy
from dual_loop.testing.scenes import generate_pair
from dual_loop.training.metrics_log import step_metrics
from dual_loop.types import RegionSample

from loop_settings import build, gradients, half_average, setting
from small_model import pair_samples, scene_samples, small_batch, small_model

pytestmark = pytest.mark.usefixtures("precision")


def clip_samples(count: int, frames: int = 4) -> list[RegionSample]:
    """Pairs whose later frames are those of other pairs, mirrored: another image, another place of the object."""
    samples = []
    for number, pair in enumerate(pair_samples(count)):
        others = [generate_pair(2100 + 10 * number + k)[1] for k in range(frames - 2)]
        later = [(one.image[:, ::-1].copy(), np.asarray(one.masks)[:1, :, ::-1].copy()) for one in others]
        samples.append(dataclasses.replace(pair, later_targets=tuple(later)))
    return samples


def packed_step(samples, config=None):
    model, task = build(config or setting())
    batch = small_batch(config or setting(), samples)
    (packed,) = task.prepare([batch])
    return model, task, batch, packed


def test_a_clip_of_two_frames_is_a_pair() -> None:
    ours, _ = gradients(setting(), [clip_samples(2, frames=2)])
    pairs, _ = gradients(setting(), [pair_samples(2)])
    grads = [(a.grad, b.grad) for a, b in zip(ours.parameters(), pairs.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b in grads if a is not None)


def test_every_frame_is_segmented_from_the_one_seg() -> None:
    samples = [*clip_samples(1), *scene_samples(1), *clip_samples(2)[1:]]
    model, task, batch, packed = packed_step(samples)
    own, later = batch.num_regions, 4
    assert [frame.image for frame in batch.later_frames] == [0, 0, 2, 2]
    assert packed.seg_positions.shape[1] == own + later
    assert (packed.input_ids[tuple(packed.seg_positions)] == task.prompter.seg_id).all()
    assert packed.input_ids[0].tolist().count(task.prompter.seg_id) == 1
    with torch.no_grad():
        hidden = model.read(model.embed(packed), packed)
        masks = task(packed).masks.mask_logits
        rows, columns = packed.seg_positions
        for number, frame in enumerate(batch.later_frames):
            region = batch.region_image.tolist().index(frame.image)
            embeds = model.seg_embeds(hidden[rows[region : region + 1], columns[region : region + 1]])
            levels = model.encode_grounding(frame.g_pixel_values[None])
            alone = model.decode_masks(embeds, levels, torch.zeros(1, dtype=torch.long)).mask_logits[0]
            torch.testing.assert_close(masks[own + number], alone, atol=2e-2, rtol=2e-2)
            assert torch.equal(packed.batch.target_masks[own + number], frame.target_masks[0])
    assert not torch.allclose(masks[0], masks[own], atol=1e-2)


def test_the_language_model_reads_all_frames_that_are_segmented() -> None:
    _, task, batch, packed = packed_step(clip_samples(1))
    ids, tokens = packed.input_ids[0].tolist(), task.prompter.image_tokens_per_tile
    assert packed.row_tiles[0] == [1, 2, 3]
    assert ids.count(task.prompter.image_context_id) == 3 * tokens
    decoded = task.prompter.tokenizer.decode(ids).replace("<IMG_CONTEXT>", "")
    assert "<img></img>\n<img></img>\n<img></img>" in decoded
    assert batch.caption_view == [0]


def test_losses_average_over_objects_and_frames() -> None:
    _, task, batch, packed = packed_step([*clip_samples(1), *scene_samples(1)])
    objects = batch.num_regions + 2
    assert packed.counts["mask_loss"] == packed.counts["dice_loss"] == objects
    with torch.no_grad():
        output = task(packed)
    each = mask_cross_entropy(output.masks.mask_logits, packed.batch.target_masks)
    assert len(each) == output.terms["mask_loss"].count == objects
    torch.testing.assert_close(output.terms["mask_loss"].total, each.sum() * setting().loss.mask_weight)
    metrics = step_metrics(packed, output.masks.mask_logits)
    assert metrics["regions"] == metrics["cycle_iou/count"] + metrics["reference_iou/count"] == batch.num_regions


@pytest.mark.parametrize("points", [0, 64])
def test_a_clip_trains_whole_or_split(points: int, precision: str) -> None:
    samples = [*clip_samples(2), *scene_samples(1), *pair_samples(1)]
    config = setting(loss=LossConfig(num_points=points, align_weight=0.5))
    whole, counts = gradients(config, [samples])
    split, other = gradients(config, [[sample] for sample in samples])
    assert counts == pytest.approx(other)
    pairs = [
        (a.grad, b.grad) for a, b in zip(whole.parameters(), split.parameters(), strict=True) if a.grad is not None
    ]
    scale = max(float(a.abs().max()) for a, _ in pairs)
    assert scale > 0
    tolerance = 2e-4 if precision == "float32" else 2e-2
    assert max(float((a - b).abs().max()) for a, b in pairs) <= tolerance * scale


def test_later_frames_change_the_gradient() -> None:
    clip = clip_samples(1)
    ours, _ = gradients(setting(), [clip], ("mask_loss", "dice_loss"))
    wrong = dataclasses.replace(clip[0], later_targets=tuple((i, m[:, ::-1].copy()) for i, m in clip[0].later_targets))
    theirs, _ = gradients(setting(), [[wrong]], ("mask_loss", "dice_loss"))
    both = zip(ours.text_hidden_fcs.parameters(), theirs.text_hidden_fcs.parameters(), strict=True)
    assert any(not torch.allclose(a.grad, b.grad, rtol=1e-2) for a, b in both)


def test_every_signal_runs_on_a_clip() -> None:
    config = setting("gumbel+grpo", LossConfig(num_points=0, align_weight=0.5, distill_weight=0.5), kl_weight=0.1)
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, cycle_keep=0.9, cycle_drop=0.0))
    model, prompter, _ = small_model(config)
    task = DualLoopTask(model, prompter, config, half_average(model))
    (packed,) = task.prepare([small_batch(config, [*clip_samples(1), *scene_samples(1)])], audit=True)
    output = task(packed)
    assert all(term.total.isfinite() for term in output.terms.values())
    sum(term.mean for term in output.terms.values()).backward()


def test_batches_of_clips_are_joined_cut_and_moved() -> None:
    batch = small_batch(setting(), [*scene_samples(1), *clip_samples(2)])
    alone = small_batch(setting(), clip_samples(2)[1:])
    part = batch.images(2, 3)
    assert [(frame.image, frame.view) for frame in part.later_frames] == [(0, 2), (0, 3)]
    assert part.views_read == alone.views_read == [[1, 2, 3]]
    assert torch.equal(part.pixel_values, alone.pixel_values)
    joined = collate([batch.images(0, 1), batch.images(1, 2), part])
    assert joined.views_read == batch.views_read
    assert all(
        torch.equal(a.target_masks, b.target_masks)
        for a, b in zip(joined.later_frames, batch.later_frames, strict=True)
    )
    moved = batch.to("meta")
    assert {frame.g_pixel_values.device.type for frame in moved.later_frames} == {"meta"}

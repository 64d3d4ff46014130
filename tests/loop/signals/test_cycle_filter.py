"""The cycle filter: captions weigh by how well their mask comes back."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dual_loop.loop.spoken import log_likelihoods
from dual_loop.loop.task import DualLoopTask
from dual_loop.metrics import iou_table
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.stored_weights import weights

from loop_settings import build, masks_only, setting
from small_model import scene_samples, small_batch, small_model


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


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("listener", ["own", "apart"])
def test_captions_weigh_by_how_likely_captioner_and_listener_find_them(listener):
    config = setting("none")
    loop = dataclasses.replace(config.loop, cycle_keep=0.01, cycle_drop=0.0, cycle_score="likelihood")
    reward = dataclasses.replace(config.reward, listener=listener)
    config = dataclasses.replace(config, loop=loop, reward=reward)
    model, prompter, _ = small_model(config)
    other = trainable_parameters(small_model(config, seed=1)[0])
    task = DualLoopTask(model, prompter, config, listeners={"apart": other})
    batch = small_batch(config, [*masks_only(), *scene_samples(1)])
    (packed,) = task.prepare([batch])
    spoken = [(n, one.token_ids) for n, one in enumerate(packed.captions) if not one.is_reference]
    parts = (model, prompter, batch, model.see(batch), spoken, loop.caption_question)
    own, regions = log_likelihoods(*parts), [n for n, _ in spoken]
    expected = torch.ones(batch.num_regions)
    expected[regions] = (own.exp() / 0.01).clamp(0, 1)
    if listener == "apart":
        with weights(task.listeners["apart"]):
            heard = log_likelihoods(*parts)
            table = task.scorer.score(batch, model.see(batch), [(n, packed.captions[n].text) for n in regions])
        ious = table[range(len(regions)), regions]
        expected[regions] = (((own + heard) / 2 - 0.05 * (1 - ious)).exp() / 0.01).clamp(0, 1)
    torch.testing.assert_close(packed.region_weights.float(), expected)
    assert 0 < float(packed.region_weights[spoken[0][0]]) < 1


def test_captions_below_the_drop_teach_nothing():
    config = setting("none")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, cycle_keep=1.0, cycle_drop=0.999))
    _, task = build(config)
    batch = small_batch(config, [*masks_only(), *scene_samples(1)])
    (packed,) = task.prepare([batch])
    num_written = sum(not caption.is_reference for caption in packed.captions)
    assert packed.metrics["caption/filtered"] == num_written > 0
    assert packed.counts["mask_loss"] == batch.num_regions - num_written > 0

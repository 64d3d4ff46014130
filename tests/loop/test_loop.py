"""The loop: roll-outs, rejection policies, counts, and that splitting a batch changes nothing."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from dual_loop.config import LoopConfig
from dual_loop.loop.captioner import Captioner, CaptionRejected, clean_caption
from dual_loop.loop.dual_loop import DualLoop
from dual_loop.loop.segmenter import mask_ious, segmentation_inputs

from small_model import pair_samples, scene_samples, small_batch, small_model

LOOP = LoopConfig(max_new_tokens=4, max_rejected_fraction=1.0)


@pytest.fixture(scope="module")
def parts():
    return small_model()


def roll(parts, batches, config=LOOP, **options):
    model, prompter, _ = parts
    features = [model.encode_vision(batch.pixel_values) for batch in batches]
    return Captioner(model, prompter, config).roll_out(batches, features, **options)


def test_window_roll_out_equals_one_by_one(parts):
    config = parts[2]
    samples = [*scene_samples(2, captions=False), *pair_samples(2), *scene_samples(1)]
    batches = [small_batch(config, [sample]) for sample in samples]
    together = roll(parts, batches)
    for batch, rollout in zip(batches, together, strict=True):
        assert roll(parts, [batch])[0].captions == rollout.captions
    joined = roll(parts, [small_batch(config, samples)])[0]
    assert joined.captions == [caption for rollout in together for caption in rollout.captions]


def test_references_are_taken_as_they_are(parts):
    batch = small_batch(parts[2], scene_samples(2))
    rollout = roll(parts, [batch])[0]
    assert rollout.captions == batch.captions
    assert all(rollout.from_reference)
    generated = roll(parts, [batch], use_references=False)[0]
    assert not any(generated.from_reference)
    assert all(len(ids) > 0 for ids in generated.token_ids)


def test_sampling_belongs_to_the_region_not_to_the_batch(parts):
    sampled = dataclasses.replace(LOOP, temperature=1.0)
    batch = small_batch(parts[2], scene_samples(3, captions=False))
    first = roll(parts, [batch], sampled)[0]
    again = roll(parts, [batch], dataclasses.replace(sampled, rollout_batch_size=2))[0]
    greedy = roll(parts, [batch])[0]
    assert first.captions == again.captions
    assert first.token_ids != greedy.token_ids


class Mute(Captioner):
    """A captioner whose model writes nothing."""

    def _generate(self, batches, images, requests, vision_features):
        return [(request, []) for request in requests]


def mute(parts, config):
    batch = small_batch(parts[2], scene_samples(2, captions=False))
    features = [parts[0].encode_vision(batch.pixel_values)]
    return batch, Mute(parts[0], parts[1], config).roll_out([batch], features)[0]


def test_rejected_captions_follow_the_policy(parts, caplog):
    with caplog.at_level(logging.WARNING, logger="dual_loop"):
        batch, rollout = mute(parts, LOOP)
    assert "Warning: Caption generation failed" in caplog.text
    assert rollout.captions == ["the object"] * batch.num_regions
    assert rollout.num_rejected == batch.num_regions
    assert all(rollout.keep)
    batch, dropped = mute(parts, dataclasses.replace(LOOP, on_rejected="drop"))
    assert not any(dropped.keep)
    model, prompter, _ = parts
    inputs = segmentation_inputs(batch, dropped, model.encode_vision(batch.pixel_values), prompter, LOOP)
    assert inputs.counts == {"mask_loss": 0.0, "dice_loss": 0.0, "llm_loss": 0.0}
    terms = model(inputs.data, mode="terms")["terms"]
    assert all(float(term.total) == 0.0 and term.total.requires_grad for term in terms.values())
    with pytest.raises(CaptionRejected, match="empty"):
        mute(parts, dataclasses.replace(LOOP, on_rejected="error"))


def test_too_many_rejections_stop_the_run(parts):
    config = dataclasses.replace(LOOP, max_rejected_fraction=0.5, max_rejected_grace=3)
    with pytest.raises(CaptionRejected, match="fails too often"):
        mute(parts, config)


def test_split_of_the_batch_does_not_change_the_gradient(parts):
    model, prompter, config = parts
    samples = [*scene_samples(2), *pair_samples(1), *scene_samples(1, source="sa1b", captions=False)]

    def gradients(groups):
        loop = DualLoop(model, prompter, LOOP)
        micros = loop.begin_window([small_batch(config, group) for group in groups])
        counts = {k: sum(m.inputs.counts[k] for m in micros) for k in micros[0].inputs.counts}
        model.zero_grad()
        for micro in micros:
            terms = loop.step(model, micro).terms
            sum(term.total / counts[name] for name, term in terms.items()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    whole, split = gradients([samples]), gradients([[sample] for sample in samples])
    largest = max(float((whole[n] - split[n]).abs().max()) for n in whole)
    scale = max(float(g.abs().max()) for g in whole.values())
    assert largest <= 2e-5 * scale


def test_the_frozen_tower_runs_once_an_image(parts, monkeypatch):
    model, prompter, config = parts
    calls = []
    original = type(model).encode_vision
    monkeypatch.setattr(type(model), "encode_vision", lambda self, x: calls.append(len(x)) or original(self, x))
    loop = DualLoop(model, prompter, LOOP)
    micros = loop.begin_window([small_batch(config, scene_samples(2, captions=False))])
    loop.step(model, micros[0])
    assert calls == [2]


def test_pairs_are_captioned_on_frame_one_and_segmented_on_frame_two(parts):
    model, prompter, config = parts
    batch = small_batch(config, pair_samples(1))
    features = model.encode_vision(batch.pixel_values)
    assert len(features) == 2
    rollout = roll(parts, [batch])[0]
    inputs = segmentation_inputs(batch, rollout, features, prompter, LOOP)
    assert torch.equal(inputs.data["vision_features"], features[1:])
    expected = torch.from_numpy(batch.samples[0].target_masks).float()[None]
    side = batch.target_masks.shape[-1]
    assert torch.equal(
        batch.target_masks[0].float(), torch.nn.functional.interpolate(expected, size=(side, side))[0, 0]
    )


def test_step_reports_sums_and_counts(parts):
    model, prompter, config = parts
    loop = DualLoop(model, prompter, LOOP)
    batch = small_batch(config, [*scene_samples(1), *scene_samples(1, source="sa1b", captions=False)])
    micro = loop.begin_window([batch])[0]
    output = loop.step(model, micro)
    assert output.metrics["regions"] == batch.num_regions
    assert output.metrics["cycle_iou/count"] + output.metrics["reference_iou/count"] == batch.num_regions
    assert {name: term.count for name, term in output.terms.items()} == micro.inputs.counts


def test_mask_ious_by_hand():
    logits = torch.tensor([[[1.0, -1.0]], [[-1.0, -1.0]]])
    targets = torch.tensor([[[1, 1]], [[0, 0]]])
    assert mask_ious(logits, targets).tolist() == [0.5, 1.0]


@pytest.mark.parametrize(("text", "caption"), [(' "A  red\nstar." ', "A red star"), ("...", ""), ("x", "x")])
def test_clean_caption(text, caption):
    assert clean_caption(text) == caption

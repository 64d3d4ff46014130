"""Step 1: one caption a region, the same however regions are batched, and what happens to captions of no use."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from dual_loop.config import LoopConfig, RewardConfig
from dual_loop.loop.captioner import Captioner, CaptionRejected, generate_caption_from_mask
from dual_loop.loop.task import DualLoopTask
from dual_loop.model.prompts import clean_caption

from loop_settings import MASK_TERMS, build, captioner_rows, setting, write_ids
from small_model import pair_samples, scene_samples, small_batch, small_model

pytestmark = pytest.mark.usefixtures("precision")

LOOP = LoopConfig(max_new_tokens=4, max_rejected_fraction=1.0)


@pytest.fixture(scope="module")
def parts():
    return small_model()


def write(parts, batches, config=LOOP, **options):
    model, prompter, _ = parts
    return Captioner(model, prompter, config).write([model.see(batch) for batch in batches], batches, **options)


def texts(captions):
    return [caption.text for caption in captions]


def test_a_window_equals_one_by_one(parts):
    config = parts[2]
    samples = [*scene_samples(2, captions=False), *pair_samples(2), *scene_samples(1)]
    batches = [small_batch(config, [sample]) for sample in samples]
    together = write(parts, batches)
    for batch, captions in zip(batches, together, strict=True):
        assert texts(write(parts, [batch])[0]) == texts(captions)
    joined = write(parts, [small_batch(config, samples)])[0]
    assert texts(joined) == [caption.text for captions in together for caption in captions]


def test_references_are_taken_as_they_are(parts):
    batch = small_batch(parts[2], scene_samples(2))
    captions = write(parts, [batch])[0]
    assert texts(captions) == batch.captions
    assert all(caption.is_reference for caption in captions)
    generated = write(parts, [batch], use_references=False)[0]
    assert not any(caption.is_reference for caption in generated)
    assert all(len(caption.token_ids) > 0 for caption in generated)
    assert texts(generate_caption_from_mask(parts[0], parts[1], batch, LOOP)) == texts(generated)


def test_sampling_belongs_to_the_region_not_to_the_batch(parts):
    sampled = dataclasses.replace(LOOP, temperature=1.0)
    batch = small_batch(parts[2], scene_samples(3, captions=False))
    first = write(parts, [batch], sampled)[0]
    again = write(parts, [batch], dataclasses.replace(sampled, rollout_batch_size=2))[0]
    greedy = write(parts, [batch])[0]
    assert texts(first) == texts(again)
    assert [caption.token_ids for caption in first] != [caption.token_ids for caption in greedy]


@pytest.fixture
def mute(parts, monkeypatch):
    """A model that writes nothing."""
    write_ids(monkeypatch, lambda request: [])
    batch = small_batch(parts[2], scene_samples(2, captions=False))
    return batch, lambda config: write(parts, [batch], config)[0]


def test_rejected_captions_follow_the_policy(parts, mute, caplog):
    batch, captions_of = mute
    with caplog.at_level(logging.WARNING, logger="dual_loop"):
        captions = captions_of(LOOP)
    assert "Warning: Caption generation failed" in caplog.text
    assert texts(captions) == ["the object"] * batch.num_regions
    batch.fallbacks = ["star", *[None] * (batch.num_regions - 1)]
    assert texts(captions_of(LOOP)) == ["star", *["the object"] * (batch.num_regions - 1)]
    assert sum(caption.rejected is not None for caption in captions) == batch.num_regions
    assert all(caption.is_kept for caption in captions)
    dropping = dataclasses.replace(LOOP, on_rejected="drop")
    assert not any(caption.is_kept for caption in captions_of(dropping))
    model, prompter, config = parts
    task = DualLoopTask(model, prompter, dataclasses.replace(config, loop=dropping))
    (packed,) = task.prepare([batch])
    assert packed.counts == {"mask_loss": 0.0, "dice_loss": 0.0, "llm_loss": 0.0}
    terms = task(packed).terms
    assert all(float(term.total.detach()) == 0.0 and term.total.requires_grad for term in terms.values())
    with pytest.raises(CaptionRejected, match="empty"):
        captions_of(dataclasses.replace(LOOP, on_rejected="error"))


@pytest.mark.parametrize("gradient", ["none", "gumbel"])
def test_a_gated_caption_is_not_read_by_step_two(gradient, monkeypatch):
    """Coordinates would teach step 2 to follow them, and with gumbel carry the mask loss to the captioner."""
    config = dataclasses.replace(setting(gradient), reward=RewardConfig())
    model, task = build(config)
    ids = task.prompter.encode("the thing at 12, 40" + task.prompter.template.answer_end)
    write_ids(monkeypatch, lambda request: ids)
    batch = small_batch(config, scene_samples(2, captions=False))
    (packed,) = task.prepare([batch])
    assert texts(packed.captions) == ["the object"] * batch.num_regions
    assert {caption.rejected for caption in packed.captions} == {"coordinates"}
    sum(task(packed).terms[name].total for name in MASK_TERMS).backward()
    assert captioner_rows(model).tolist() == [0.0, 0.0]
    dropping = dataclasses.replace(config.loop, on_rejected="drop")
    (dropped,) = DualLoopTask(model, task.prompter, dataclasses.replace(config, loop=dropping)).prepare([batch])
    assert dropped.counts["mask_loss"] == 0.0


def test_too_many_rejections_stop_the_run(mute):
    with pytest.raises(CaptionRejected, match="fails too often"):
        mute[1](dataclasses.replace(LOOP, max_rejected_fraction=0.5, max_rejected_grace=3))


@pytest.mark.parametrize(("text", "caption"), [(' "A  red\nstar." ', "A red star"), ("...", ""), ("x", "x")])
def test_clean_caption(text, caption):
    assert clean_caption(text) == caption

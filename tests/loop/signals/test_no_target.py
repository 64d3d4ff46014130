"""No target: a caption of another image is to give an empty mask."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dual_loop.caption_metrics import may_hold
from dual_loop.config import LossConfig
from dual_loop.losses import dice_loss, mask_cross_entropy

from loop_settings import build, gradients, masks_only, setting
from small_model import pair_samples, scene_samples, small_batch

pytestmark = pytest.mark.usefixtures("precision")
ON = LossConfig(num_points=0, no_target_weight=0.7)


def asked(task, packed) -> list[str]:
    """Return the texts of the extra turns, by image."""
    rows, columns = packed.lessons["no_target"]
    texts = []
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        text = task.prompter.tokenizer.decode(packed.input_ids[row, :column].tolist())
        texts.append(text.rpartition("Please segment ")[2].split(" in this image.")[0])
    return texts


def test_each_image_is_asked_for_a_caption_that_does_not_hold_there() -> None:
    _, task = build(setting(loss=ON))
    first, second = (small_batch(setting(), scene_samples(4)[part]) for part in (slice(2), slice(2, 4)))
    window = task.prepare([first, second])
    known = {text for batch in (first, second) for text in batch.captions}
    for packed in window:
        assert packed.lessons["no_target"][0].tolist() == [0, 1]
        assert packed.counts["no_target_loss"] == 2
        for image, text in enumerate(asked(task, packed)):
            owners = packed.batch.region_image.tolist()
            own = [one for one, owner in zip(packed.batch.captions, owners, strict=True) if owner == image]
            assert text in known
            assert not may_hold(text, own)
        # The regions' own [SEG] are what they were.
        assert packed.seg_positions.shape[1] == packed.batch.num_regions
        marks = (packed.input_ids == task.prompter.seg_id).nonzero().T
        assert marks.shape[1] == packed.batch.num_regions + 2
    assert len(set(asked(task, window[0]) + asked(task, window[1]))) > 1


def test_what_the_data_set_says_is_not_there_is_asked_first() -> None:
    _, task = build(setting(loss=ON))
    samples = scene_samples(3)
    samples[1] = dataclasses.replace(samples[1], no_target=("a pink zebra", "a bus"))
    [packed] = task.prepare([small_batch(setting(), samples)])
    first, second, third = asked(task, packed)
    assert second in ("a pink zebra", "a bus")
    assert not {first, third} & {"a pink zebra", "a bus"}
    one, two = packed.batch.images(1, 2), packed.batch.images(2, 3)
    assert (one.no_target, two.no_target) == ([("a pink zebra", "a bus")], [()])


@pytest.mark.parametrize("known", ["nowhere", "undrawn", "reference"])
def test_all_that_is_said_of_an_image_is_known(known: str) -> None:
    _, task = build(setting(loss=ON))
    first, second = scene_samples(2, captions=False)
    first = dataclasses.replace(first, captions=(("the red flag",), *first.captions[1:]))
    second = dataclasses.replace(second, undrawn_captions=("the red flag",) if known == "undrawn" else ())
    batch = small_batch(setting(), [first, second])
    batch.references[-1] = ("the red flag",) if known == "reference" else ()
    [packed] = task.prepare([batch])
    assert asked(task, packed) == (["the red flag"] if known == "nowhere" else [])


def test_the_loss_is_that_of_an_empty_mask_and_comes_back_at_its_place() -> None:
    model, task = build(setting(loss=ON))
    (packed,) = task.prepare([small_batch(setting(), scene_samples(3))])
    with torch.no_grad():
        output = task(packed)
        hidden = model.read(model.embed(packed), packed)
        logits = model.segment(hidden, packed, packed.lessons["no_target"]).mask_logits
    empty = torch.zeros_like(logits)
    expected = (2.0 * mask_cross_entropy(logits, empty) + 0.5 * dice_loss(logits, empty)).sum() * 0.7
    term = output.terms["no_target_loss"]
    torch.testing.assert_close(term.total, expected)
    assert term.count == packed.counts["no_target_loss"] == 3
    found = (logits <= 0).flatten(1).all(1).sum()
    assert packed.metrics["no_target_empty/sum"] == found
    assert packed.metrics["no_target_empty/count"] == 3


def test_other_losses_stay_what_they_are(precision) -> None:
    samples = scene_samples(3)
    _, plain = build(setting())
    _, task = build(setting(loss=ON))
    with torch.no_grad():
        one, two = (t(t.prepare([small_batch(setting(), samples)])[0]).terms for t in (plain, task))
    tolerance = 1e-4 if precision == "float32" else 2e-2
    for name, term in one.items():
        torch.testing.assert_close(term.total, two[name].total, rtol=tolerance, atol=tolerance)
        assert float(term.count) == float(two[name].count)
    assert {*two} - {*one} == {"no_target_loss"}


def test_split_of_a_window_does_not_change_what_is_asked_or_taught(precision) -> None:
    samples = [*scene_samples(3), *pair_samples(1)]
    whole, counts = gradients(setting(loss=ON), [samples], ("no_target_loss",))
    split, other = gradients(setting(loss=ON), [[sample] for sample in samples], ("no_target_loss",))
    assert counts == pytest.approx(other)
    both = zip(whole.parameters(), split.parameters(), strict=True)
    pairs = [(a.grad, b.grad) for a, b in both if a.grad is not None and b.grad is not None]
    scale = max(float(a.abs().max()) for a, _ in pairs)
    assert scale > 0
    assert max(float((a - b).abs().max()) for a, b in pairs) <= (2e-4 if precision == "float32" else 2e-2) * scale


def test_without_a_caption_of_another_image_nothing_is_asked() -> None:
    for samples in (masks_only(2), scene_samples(1)):
        _, task = build(setting(loss=ON))
        (packed,) = task.prepare([small_batch(setting(), samples)])
        term = task(packed).terms["no_target_loss"]
        assert (float(term.total.detach()), term.count) == (0.0, 0.0)
        term.total.backward()


def test_it_learns_to_give_an_empty_mask() -> None:
    config = setting(loss=dataclasses.replace(ON, no_target_weight=1.0))
    model, task = build(config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    batch, losses = small_batch(config, scene_samples(3)), []
    for _ in range(12):
        (packed,) = task.prepare([batch])
        loss = task(packed).terms["no_target_loss"].mean
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_turns_of_one_conversation_do_not_mix_with_it() -> None:
    config = setting(loss=ON)
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, segment_form="turns"))
    _, task = build(config)
    (packed,) = task.prepare([small_batch(config, scene_samples(2))])
    _, without = build(dataclasses.replace(config, loss=LossConfig(num_points=0)))
    (plain,) = without.prepare([small_batch(config, scene_samples(2))])
    with torch.no_grad():
        torch.testing.assert_close(
            task(packed).masks.mask_logits, without(plain).masks.mask_logits, atol=3e-2, rtol=3e-2
        )

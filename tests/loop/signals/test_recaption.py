"""The other direction: a data set's caption again, for the mask that it led to."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import pytest
import torch

from dual_loop.config import LossConfig
from dual_loop.data.masks import pool_mask_to_grid
from dual_loop.loop.scorer import Scorer
from dual_loop.loop.signals import recaption
from dual_loop.metrics import iou_table
from dual_loop.types import Batch

from loop_settings import build, captioner_rows, gradients, masks_only, setting
from small_model import scene_samples, small_batch

pytestmark = pytest.mark.usefixtures("precision")
ON = LossConfig(num_points=0, recaption_weight=0.7)


def lead_near(monkeypatch: pytest.MonkeyPatch, wrong: Collection[int] = ()) -> None:
    """Let every text lead to its region's target and the pixels right of it; of the regions ``wrong`` to the rest."""

    def segment(self, batch, seen, texts):
        masks = [(grown(batch)[region] ^ (region in wrong)).float() - 0.5 for region, _ in texts]
        return [mask[None] for mask in masks]

    monkeypatch.setattr(Scorer, "segment", segment)


def grown(batch: Batch) -> torch.Tensor:
    return batch.binary_targets | batch.binary_targets.roll(1, dims=2)


def test_the_caption_is_asked_for_where_its_mask_lies(monkeypatch) -> None:
    lead_near(monkeypatch, wrong=[1])
    model, task = build(setting(loss=ON))
    batch = small_batch(setting(), scene_samples(2))
    (packed,) = task.prepare([batch])
    right = [n for n in range(batch.num_regions) if n != 1]
    row, column, label = packed.lessons["recaption"]
    end = task.prompter.template.answer_end
    expected = [token for n in right for token in task.prompter.encode(batch.captions[n] + end)]
    assert label.tolist() == packed.input_ids[row, column + 1].tolist() == expected
    assert packed.counts["recaption_loss"] == len(expected)
    assert packed.metrics["recaption_kept/sum"] == len(right)
    assert packed.metrics["recaption_kept/count"] == batch.num_regions
    grids, _ = pool_mask_to_grid(grown(batch), batch.prompt_masks.shape[-1])
    prompts = sorted(prompt.flatten().tolist() for prompt in (*grids[right], *batch.prompt_masks))
    assert sorted(prompt.flatten().tolist() for prompt in packed.prompt_masks) == prompts
    with torch.no_grad():
        output = task(packed)
        hidden = model.read(model.embed(packed), packed)
        loss = model.token_loss(hidden[row, column], label) * 0.7
    torch.testing.assert_close(output.terms["recaption_loss"].total, loss)


def test_with_the_cells_of_the_mask_it_is_the_loss_of_the_caption(monkeypatch, precision) -> None:
    lead_near(monkeypatch)
    config = setting(loss=ON)
    _, task = build(config)
    _, silent = build(dataclasses.replace(config, loop=dataclasses.replace(config.loop, caption_supervision=False)))
    batch = small_batch(config, scene_samples(2))
    cells = [iter(batch.prompt_masks), iter(batch.prompt_masks)]
    found = []
    for one, own in zip((task, silent), cells, strict=True):
        monkeypatch.setattr(recaption, "pool_mask_to_grid", lambda *a, own=own, **k: (next(own)[None], None))
        with torch.no_grad():
            found.append(one(one.prepare([batch])[0]).terms)
    supervised = found[0]["llm_loss"].total - found[1]["llm_loss"].total
    tolerance = 1e-4 if precision == "float32" else 2e-2
    torch.testing.assert_close(found[0]["recaption_loss"].total / 0.7, supervised, rtol=tolerance, atol=tolerance)


def test_it_reaches_the_captioner_and_is_the_same_however_a_window_is_split(monkeypatch, precision) -> None:
    lead_near(monkeypatch)
    samples = [*scene_samples(3), *masks_only(1)]
    whole, counts = gradients(setting(loss=ON), [samples], ("recaption_loss",))
    split, other = gradients(setting(loss=ON), [[sample] for sample in samples], ("recaption_loss",))
    assert counts == pytest.approx(other)
    assert (captioner_rows(whole) > 0).all()
    both = zip(whole.parameters(), split.parameters(), strict=True)
    pairs = [(a.grad, b.grad) for a, b in both if a.grad is not None and b.grad is not None]
    scale = max(float(a.abs().max()) for a, _ in pairs)
    assert max(float((a - b).abs().max()) for a, b in pairs) <= (2e-4 if precision == "float32" else 2e-2) * scale


def test_without_captions_or_right_masks_there_is_nothing_to_learn(monkeypatch) -> None:
    _, task = build(setting(loss=ON))
    (packed,) = task.prepare([small_batch(setting(), masks_only(2))])
    assert packed.counts["recaption_loss"] == packed.metrics["recaption_kept/count"] == 0
    assert float(task(packed).terms["recaption_loss"].total.detach()) == 0
    lead_near(monkeypatch, wrong=range(99))
    (packed,) = task.prepare([small_batch(setting(), scene_samples(1))])
    assert packed.counts["recaption_loss"] == packed.metrics["recaption_kept/sum"] == 0
    task(packed).terms["recaption_loss"].total.backward()


def test_the_masks_are_those_of_step_two() -> None:
    _, task = build(setting(loss=ON))
    batch = small_batch(setting(), scene_samples(2))
    (packed,) = task.prepare([batch])
    with torch.no_grad():
        ious = iou_table(task(packed).masks.mask_logits > 0, batch.binary_targets).diagonal()
    assert packed.metrics["recaption_kept/sum"] == float((ious >= 0.5).sum())

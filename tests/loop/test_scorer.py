"""What texts lead to: IoU tables against a plain loop, masks given and written, and texts that have none."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dual_loop.loop.packing import RowPlan, pack_turns, step_turns
from dual_loop.loop.scorer import Scorer, join_masks
from dual_loop.metrics import iou_table, own_and_margin, own_image_only
from dual_loop.types import RegionCaption

from small_model import pair_samples, scene_samples, small_batch, small_model

pytestmark = pytest.mark.usefixtures("precision")


@pytest.fixture(scope="module")
def parts():
    model, prompter, config = small_model()
    batch = small_batch(config, [*scene_samples(1, captions=False), *pair_samples(1)])
    return Scorer(model, prompter, config.loop), batch, model.see(batch)


def test_own_iou_and_margin_by_hand():
    nan = float("nan")
    matrix = torch.tensor([[0.8, 0.3, nan], [0.6, 0.5, nan], [nan, nan, 0.9], [0.4, 0.4, nan]])
    regions = torch.tensor([0, 1, 2, 0])
    own, found = own_and_margin(matrix, regions)
    assert own.tolist() == pytest.approx([0.8, 0.5, 0.9, 0.4])
    assert found[[0, 1, 3]].tolist() == pytest.approx([0.5, -0.1, 0.0])
    assert math.isnan(float(found[2]))
    assert (found > 0)[[0, 1, 3]].tolist() == [True, False, False]


def test_iou_table_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(5, 9, 9, generator=generator) > 0.6
    logits = torch.randn(130, 9, 9, generator=generator)
    caption_region = torch.randint(0, 5, (130,), generator=generator)
    region_image = torch.tensor([0, 0, 1, 1, 1])
    table = own_image_only(iou_table(logits > 0, targets > 0), caption_region, region_image)
    for row in range(130):
        for region in range(5):
            value = float(table[row, region])
            if region_image[caption_region[row]] != region_image[region]:
                assert math.isnan(value)
                continue
            mask = logits[row] > 0
            expected = float((mask & targets[region]).sum()) / float((mask | targets[region]).sum())
            assert value == pytest.approx(expected, abs=1e-6)


def test_empty_masks():
    nothing = torch.zeros(1, 4, 4)
    region = torch.tensor([0])
    assert float(own_image_only(iou_table(nothing - 1 > 0, nothing > 0), region, region)) == 1.0
    no_region = torch.zeros(0, dtype=torch.long)
    assert own_image_only(iou_table(torch.zeros(0, 4, 4) > 0, nothing > 0), no_region, region).shape == (0, 1)


def test_ious_of_pairs_by_hand():
    logits = torch.tensor([[[1.0, -1.0]], [[-1.0, -1.0]]])
    targets = torch.tensor([[[1, 1]], [[0, 0]]])
    assert iou_table(logits > 0, targets > 0).diagonal().tolist() == [0.5, 1.0]


def test_a_text_has_the_mask_that_step_two_gives_it(parts):
    scorer, batch, seen = parts
    texts = [f"the red star {region}" for region in range(batch.num_regions)]
    captions = [RegionCaption(text) for text in texts]
    turns = step_turns(batch, captions, RowPlan(torch.ones(len(texts))), scorer.prompter, scorer.config)
    packed = pack_turns(batch, captions, turns, scorer.prompter, vision=seen.vision, levels=seen.levels)
    expected = scorer.model.predict(packed).mask_logits
    # In any order, one of them twice.
    order = [*range(batch.num_regions - 1, -1, -1), 0]
    found = scorer.segment(batch, seen, [(region, texts[region]) for region in order])
    torch.testing.assert_close(torch.cat(found), expected[order], atol=1e-4, rtol=1e-4)


def test_a_rejected_text_is_an_empty_mask(parts):
    scorer, batch, seen = parts
    kept, rejected = scorer.segment(batch, seen, [(0, "the red star"), (0, None)])
    assert (len(kept), len(rejected)) == (1, 0)
    table = scorer.score(batch, seen, [(0, "the red star"), (0, None)])
    on_image = batch.region_image == batch.region_image[0]
    assert table[1][on_image].tolist() == [0.0] * int(on_image.sum())
    assert table[:, ~on_image].isnan().all()
    assert scorer.score(batch, seen, []).shape == (0, batch.num_regions)


def test_soft_ious_are_those_of_probabilities(parts):
    scorer, batch, seen = parts
    texts = [(0, "a star"), (batch.num_regions - 1, "the moon"), (0, None)]
    logits = join_masks(scorer.segment(batch, seen, texts), scorer.model.mask_size)
    found = scorer.score(batch, seen, texts, soft=True)
    for row, (region, _) in enumerate(texts):
        chance, target = logits[row].double().sigmoid(), batch.target_masks[region].double()
        expected = (chance * target).sum() / (chance + target - chance * target).sum()
        assert float(found[row, region]) == pytest.approx(float(expected), abs=1e-5)
    hard = scorer.score(batch, seen, texts)
    assert torch.equal(found.isnan(), hard.isnan())
    assert not torch.allclose(found[:2].nan_to_num(), hard[:2].nan_to_num())


def test_a_written_answer_has_as_many_masks_as_seg_tokens(parts, monkeypatch):
    scorer, batch, seen = parts
    seg, word = scorer.prompter.seg_id, scorer.prompter.encode(" red")[0]
    answers = [[word], [word, seg], [seg, word, seg]]
    monkeypatch.setattr("dual_loop.loop.scorer.Decoder.write", lambda self, rows: [answers[row] for row in rows])
    masks = scorer.segment(batch, seen, [(0, "a"), (0, "b"), (0, "c")], generated=True)
    assert [len(own) for own in masks] == [0, 1, 2]
    joined = join_masks(masks, scorer.model.mask_size)
    assert not (joined[0] > 0).any()
    assert torch.equal(joined[2] > 0, (masks[2] > 0).any(0))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_asked_is_an_empty_table_wherever_the_masks_lie(parts, device):
    scorer, batch, seen = parts
    elsewhere = replace(batch, target_masks=batch.target_masks.to(device))
    assert scorer.score(elsewhere, seen, []).shape == (0, batch.num_regions)

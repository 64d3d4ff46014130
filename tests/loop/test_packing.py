"""Rows of steps 2 and 3: each turn computes what it computes alone, and every place is where its token stands."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dual_loop.config import LoopConfig
from dual_loop.data.prepare import resize_targets
from dual_loop.loop.packing import RowPlan, conversation_mask, pack_turns, silent, step_turns
from dual_loop.loop.task import DualLoopTask
from dual_loop.types import RegionCaption, RegionTurn, Turn

from loop_settings import setting
from small_model import pair_samples, scene_samples, small_batch, small_model


@pytest.fixture(scope="module")
def parts():
    return small_model()


def packed_rows(parts, samples, **options):
    """Return the batch, its turns and their rows, each caption its region's number."""
    model, prompter, config = parts
    batch = small_batch(config, samples)
    captions = [RegionCaption(f"the object {n}", is_reference=True) for n in range(batch.num_regions)]
    turns = step_turns(batch, captions, RowPlan.for_captions(captions), prompter, LoopConfig(caption_supervision=True))
    seen = model.see(batch)
    return turns, pack_turns(batch, captions, turns, prompter, vision=seen.vision, levels=seen.levels, **options)


def packed_of(batch, turns, prompter, **options):
    captions = [RegionCaption("a star")] * batch.num_regions
    return pack_turns(batch, captions, turns, prompter, **{"vision": None, **options})


def test_a_token_sees_the_prefix_and_its_own_conversation_only():
    mask = conversation_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0]
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    # The padded position may see the prefix too; what counts is that nobody sees it and it sees itself.
    assert mask[:5].int().tolist() == expected[:5]
    assert bool(mask[5, 5])
    assert not mask[:5, 5].any()


def test_places_are_those_of_the_tokens(parts):
    turns, packed = packed_rows(parts, [*scene_samples(2), *pair_samples(1)])
    prefix = len(parts[1].image_prefix(1))
    for turn in turns:
        end = turn.start + len(turn.turn.input_ids)
        assert packed.input_ids[turn.row, turn.start : end].tolist() == list(turn.turn.input_ids)
        assert packed.position_ids[turn.row, turn.start : end].tolist() == list(
            range(prefix, prefix + end - turn.start)
        )
    rows, columns = packed.seg_positions
    assert (packed.input_ids[rows, columns] == parts[1].seg_id).all()
    assert rows.tolist() == packed.batch.region_image.tolist()
    rows, columns = packed.answer_positions
    assert torch.equal(packed.input_ids[rows, columns + 1], packed.answer_ids)
    labels = [label for turn in turns for label in turn.turn.labels if label != -100]
    assert sorted(packed.answer_ids.tolist()) == sorted(labels)
    assert packed.counts["llm_loss"] == len(labels)


def test_positions_restart_in_every_conversation(parts):
    _, prompter, config = parts
    batch = small_batch(config, scene_samples(1))
    turns = [RegionTurn(0, Turn((1, 2), (-100, 2))), RegionTurn(1, Turn((3,), (-100,)))]
    packed = packed_of(batch, turns, prompter)
    start = len(prompter.image_prefix(1))
    assert packed.input_ids[0, start:].tolist() == [1, 2, 3]
    assert packed.position_ids.tolist() == [[*range(start), start, start + 1, start]]
    assert [(turn.row, turn.start) for turn in turns] == [(0, start), (0, start + 2)]
    # The token with loss is predicted one place before its own.
    assert packed.answer_positions.tolist() == [[0], [start]]
    assert packed.answer_ids.tolist() == [2]
    assert packed.counts["llm_loss"] == 1.0
    assert packed.read_from == start - 1
    assert packed.row_lengths == [start + 3]


def test_a_later_turn_of_a_conversation_goes_on_where_the_first_ended_and_sees_it(parts):
    _, prompter, config = parts
    batch = small_batch(config, scene_samples(1))
    turns = [RegionTurn(0, Turn((1, 2), (-100, 2))), RegionTurn(1, Turn((3,), (-100,)), continues=True)]
    turns.append(RegionTurn(1, Turn((4,), (-100,))))
    packed = packed_of(batch, turns, prompter)
    start = len(prompter.image_prefix(1))
    assert packed.position_ids[0, start:].tolist() == [start, start + 1, start + 2, start]
    seen = packed.attention_mask[0, 0, start:, start:].int().tolist()
    assert seen == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert packed.attention_mask[0, 0, start:, :start].all()


def test_packed_turns_equal_rows_of_their_own(parts):
    model, prompter, _ = parts
    turns, packed = packed_rows(parts, scene_samples(1))
    asked = [turn for turn in turns if not turn.is_caption]
    assert len(asked) > 1
    none, nothing = torch.zeros(0, 8, 8, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    with torch.no_grad():
        hidden = model.read(model.embed(packed), packed)
        features = model.project_vision(packed.vision)
        for turn in asked:
            ids = torch.tensor([[*prompter.image_prefix(1), *turn.turn.input_ids]])
            embeds = model.embed_prompt(ids, features, nothing, none)
            alone = model.run_language(embeds, torch.ones_like(ids), None)[0]
            length = len(turn.turn.input_ids)
            own = hidden[turn.row, turn.start : turn.start + length]
            torch.testing.assert_close(own, alone[-length:], atol=2e-5, rtol=1e-4)


def test_pairs_are_captioned_on_frame_one_and_segmented_on_frame_two(parts):
    model, _, _ = parts
    turns, packed = packed_rows(parts, pair_samples(1))
    batch = packed.batch
    features = model.encode_vision(batch.pixel_values)
    assert len(features) == 2
    assert [(turn.is_caption, turn.row) for turn in turns] == [(False, 0), (True, 1)]
    assert packed.row_tiles == [[1], [0]]
    assert torch.equal(packed.vision[:1], features[1:])
    assert torch.equal(packed.vision[1:], features[:1])
    side = batch.target_masks.shape[-1]
    assert torch.equal(batch.target_masks, resize_targets(pair_samples(1)[0].target_masks, side))


def test_captioning_turns_of_frame_pairs_have_rows_of_their_own_behind_those_that_segment(parts):
    _, prompter, config = parts
    batch = small_batch(config, pair_samples(2))
    cells = batch.prompt_masks.flatten(1).sum(1).tolist()
    asked = [RegionTurn(n, prompter.caption_turn(cells[n], "a star", "short"), is_caption=True) for n in range(2)]
    segment = [RegionTurn(n, prompter.segment_turn("a star", "segment")) for n in range(2)]
    packed = packed_of(batch, [*asked, *segment], prompter)
    assert [turn.row for turn in (*segment, *asked)] == [0, 1, 2, 3]
    views = [*batch.target_view, *batch.caption_view]
    offsets, counts = batch.tile_offsets, batch.tiles_per_view
    assert packed.row_tiles == [list(range(offsets[view], offsets[view] + counts[view])) for view in views]
    assert packed.seg_positions[0].tolist() == [0, 1]
    assert (packed.input_ids[tuple(packed.seg_positions)] == prompter.seg_id).all()
    assert torch.equal(packed.prompt_masks, batch.prompt_masks)
    without = packed_of(batch, [dataclasses.replace(turn) for turn in asked], prompter, segments=False)
    assert len(without.row_tiles) == 2


def test_a_plan_begins_with_the_captions_that_are_kept():
    plan = RowPlan.for_captions([RegionCaption("a"), RegionCaption("b", rejected="empty", is_kept=False)])
    assert plan.weights.tolist() == [1.0, 0.0]
    assert plan.turns == []
    assert plan.segmentation == {}
    assert RowPlan.for_captions([]).turns is not plan.turns


def test_a_region_of_weight_zero_stays_and_teaches_nothing(parts):
    _, prompter, config = parts
    batch = small_batch(config, scene_samples(1))
    captions = [RegionCaption("a star")] * batch.num_regions
    weights = torch.tensor([0.0, *[1.0] * (batch.num_regions - 1)])
    turns = step_turns(batch, captions, RowPlan(weights), prompter, LoopConfig())
    assert turns[0].turn == silent(turns[0].turn.input_ids)
    assert turns[1].turn != silent(turns[1].turn.input_ids)
    packed = pack_turns(batch, captions, turns, prompter, vision=None, weights=weights)
    assert packed.seg_positions.shape[1] == batch.num_regions
    assert packed.counts["mask_loss"] == batch.num_regions - 1


def test_several_seg_in_one_conversation():
    config = setting("none")
    model, prompter, _ = small_model(config)
    sample = scene_samples(1)[0]
    one = dataclasses.replace(
        sample, masks=sample.masks[:1], region_ids=sample.region_ids[:1], captions=sample.captions[:1]
    )

    def run(form, samples):
        loop = dataclasses.replace(config.loop, segment_form=form, caption_supervision=False)
        task = DualLoopTask(model, prompter, dataclasses.replace(config, loop=loop))
        (packed,) = task.prepare([small_batch(config, samples)])
        with torch.no_grad():
            return packed, task(packed).masks.mask_logits

    # One region: the same row. Several: the same number of masks and counts, the first region's mask unchanged.
    (_, apart), (_, joined) = run("branches", [one]), run("turns", [one])
    torch.testing.assert_close(apart, joined)
    (first, apart), (second, joined) = run("branches", [sample]), run("turns", [sample])
    assert first.counts == second.counts
    torch.testing.assert_close(apart[0], joined[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(apart[1], joined[1], atol=1e-4)
    expected = prompter.conversation(
        [(f"Please segment {c} in this image.", "Sure, [SEG].") for c in first.batch.captions]
    )
    assert second.input_ids[0].tolist() == list(expected.input_ids)

"""Packed rows compute what separate rows compute: masks, positions, and hidden states of every turn."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dual_loop.errors import PromptError
from dual_loop.loop.packing import conversation_mask, pack_turns
from dual_loop.model.visual_prompt import insert_image_tokens
from dual_loop.types import RegionCaption, RegionTurn, Turn

from small_model import pair_samples, scene_samples, small_batch, small_model


def packed_of(batch, turns, prompter, **options):
    captions = [RegionCaption("a star")] * batch.num_regions
    return pack_turns(batch, captions, turns, prompter, **{"vision": None, **options})


def test_attention_mask_shows_prefix_and_own_conversation_only():
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


def test_positions_restart_in_every_conversation():
    _, prompter, config = small_model()
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


def test_a_later_turn_of_a_conversation_goes_on_where_the_first_ended_and_sees_it():
    _, prompter, config = small_model()
    batch = small_batch(config, scene_samples(1))
    turns = [RegionTurn(0, Turn((1, 2), (-100, 2))), RegionTurn(1, Turn((3,), (-100,)), continues=True)]
    turns.append(RegionTurn(1, Turn((4,), (-100,))))
    packed = packed_of(batch, turns, prompter)
    start = len(prompter.image_prefix(1))
    assert packed.position_ids[0, start:].tolist() == [start, start + 1, start + 2, start]
    seen = packed.attention_mask[0, 0, start:, start:].int().tolist()
    assert seen == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert packed.attention_mask[0, 0, start:, :start].all()


def test_packed_turns_equal_rows_of_their_own():
    model, prompter, config = small_model()
    batch = small_batch(config, scene_samples(1))
    features = model.project_vision(model.encode_vision(batch.pixel_values))
    texts = ["the red star", "the big blue heart on the left", "a cloud"]
    turns = [prompter.segment_turn(text, "segment") for text in texts]
    packed = packed_of(batch, [RegionTurn(0, turn) for turn in turns], prompter)
    hidden = model.run_language(model.embed(packed), packed.attention_mask, packed.position_ids)[0]
    none = torch.zeros(0, 8, 8, dtype=torch.bool)
    nothing = torch.zeros(0, dtype=torch.long)
    start = len(prompter.image_prefix(1))
    for turn in turns:
        ids = torch.tensor([[*prompter.image_prefix(1), *turn.input_ids]])
        alone = model.run_language(model.embed_prompt(ids, features, nothing, none), torch.ones_like(ids), None)[0]
        length = len(turn.input_ids)
        torch.testing.assert_close(hidden[start : start + length], alone[-length:], atol=2e-5, rtol=1e-4)
        start += length


def test_captioning_turns_of_frame_pairs_have_rows_of_their_own_behind_those_that_segment():
    _, prompter, config = small_model()
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


def test_region_tokens_are_copies_of_image_tokens_in_row_major_order():
    features = torch.arange(2 * 4 * 3, dtype=torch.float32).reshape(2, 4, 3)
    mask = torch.tensor([[[0, 1], [1, 1]]], dtype=torch.bool)
    embedded = torch.full((2, 8, 3), -1.0)
    placeholder = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    out = insert_image_tokens(embedded, placeholder, features, torch.tensor([1]), mask)
    assert torch.equal(out[0, 1:5], features[0])
    assert torch.equal(out[1, :4], features[1])
    assert torch.equal(out[1, 5:], features[1, 1:])
    assert torch.equal(out[0, 0], torch.full((3,), -1.0))


def test_a_wrong_number_of_placeholders_is_refused():
    features, mask = torch.zeros(1, 4, 3), torch.ones(1, 2, 2, dtype=torch.bool)
    with pytest.raises(PromptError, match="differ in number"):
        insert_image_tokens(torch.zeros(1, 5, 3), torch.ones(1, 5, dtype=torch.bool), features, torch.tensor([0]), mask)

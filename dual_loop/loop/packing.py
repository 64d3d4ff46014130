"""Rows of steps 2 and 3: an image prefix a row, and side by side the turns that ask about the image.

A token attends to the prefix and to the earlier tokens of its own conversation, and positions start again after the
prefix in every conversation. So each turn computes exactly what it would compute in a row of its own (up to rounding),
while the image tokens, most of the row, are paid for once. The same idea is described as Prefix Grouper (2506.05433).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dual_loop.config import LoopConfig
from dual_loop.loop.clips import add_later_frames
from dual_loop.model.hardware import round_columns, send
from dual_loop.model.object_count import object_multiplicity
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import Batch, PackedBatch, RegionCaption, RegionTurn, Seen, Turn

IGNORED = -100


@dataclass
class RowPlan:
    """What the rows of one micro-batch are made of; signals change it before they are packed.

    Attributes:
        weights: (N,) float32 weight of each region's caption in step 2; to begin with 1, and 0 where it is left out.
        turns: further turns, packed before all others.
        segmentation: turns with [SEG] that stand in for the caption's own, by region.
        metrics: sums and counts for the records.
    """

    weights: Tensor
    turns: list[RegionTurn] = field(default_factory=list)
    segmentation: dict[int, RegionTurn] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def for_captions(cls, captions: Sequence[RegionCaption]) -> RowPlan:
        """Return the plan that a micro-batch begins with."""
        return cls(torch.tensor([caption.is_kept for caption in captions], dtype=torch.float32))


def step_turns(
    batch: Batch, captions: Sequence[RegionCaption], plan: RowPlan, prompter: Prompter, config: LoopConfig
) -> list[RegionTurn]:
    """Return the turns of steps 2 and 3: what signals add, [SEG] of every region, supervised captions.

    ``segment_form = turns`` puts the regions of an image into one conversation. A region of weight 0 stays in the row,
    so that every rank runs the same graph, but its answer teaches nothing. A region's own caption also trains step 1
    under ``caption_supervision``.
    """
    names, seeds = (config.segment_question, config.segment_answer), batch.region_seeds.tolist()
    turns, is_seen = list(plan.turns), set[int]()
    for region, (image, weight) in enumerate(zip(batch.region_image.tolist(), plan.weights.tolist(), strict=True)):
        continues = config.segment_form == "turns" and image in is_seen
        is_seen.add(image)
        turn = plan.segmentation.get(region)
        if turn is None:
            own = prompter.segment_turn(captions[region].text, *names, seeds[region], not continues)
            turn = RegionTurn(region, own, continues=continues)
        if weight == 0.0:
            turn.turn = silent(turn.turn.input_ids)
        turns.append(turn)
    if config.caption_supervision:
        cells = batch.prompt_masks.flatten(1).sum(1).tolist()
        for region, caption in enumerate(captions):
            if caption.is_reference:
                place = (cells[region], caption.text, config.caption_question, seeds[region])
                turns.append(RegionTurn(region, prompter.caption_turn(*place), is_caption=True))
    return turns


def pack_step(
    model: Sa2VA,
    batch: Batch,
    seen: Seen,
    captions: list[RegionCaption],
    plan: RowPlan,
    prompter: Prompter,
    loop: LoopConfig,
    num_objects: int | None,
) -> PackedBatch:
    """Pack :func:`step_turns`; with ``num_objects`` every image counts with so many objects in the mask losses."""
    turns, weights = step_turns(batch, captions, plan, prompter, loop), plan.weights
    if num_objects is not None:
        weights = weights * object_multiplicity(batch.region_image, batch.num_images, num_objects, batch.region_seeds)
    vision = None if model.trains_vision else seen.vision
    packed = pack_turns(batch, captions, turns, prompter, vision=vision, levels=seen.levels, weights=weights)
    packed.metrics = {**plan.metrics}
    if batch.later_frames:
        add_later_frames(packed, model)
    return packed


def silent(input_ids: tuple[int, ...]) -> Turn:
    """Return a turn of these ids without language loss."""
    return Turn(input_ids, (IGNORED,) * len(input_ids))


def pack_turns(
    batch: Batch,
    captions: Sequence[RegionCaption],
    turns: Sequence[RegionTurn],
    prompter: Prompter,
    *,
    vision: Tensor | None,
    levels: list[Tensor] | None = None,
    weights: Tensor | None = None,
    segments: bool = True,
) -> PackedBatch:
    """Pack turns into rows, in the order given; set where each of them stands.

    Args:
        turns: those with [SEG] in ascending order of their regions.
        vision: (T, M, D_vision) of all views; None lets the model run its tower on the rows.
        levels: SAM 2's features of the B images, where they are at hand.
        weights: (N,) weight of each region in the mask losses, 1 where not given.
        segments: begin with a row for each of the B images, in order; else rows are made as turns need them.
    """
    images = batch.region_image.tolist()
    views = batch.views_read if segments else []
    row_of_views = {tuple(own): row for row, own in enumerate(views)}
    rows: list[list[RegionTurn]] = [[] for _ in views]
    for turn in turns:
        row = images[turn.region]
        if turn.is_caption:
            view = batch.caption_view[row]
            row = row_of_views.setdefault((view,), len(rows))
            if row == len(rows):
                views.append([view])
                rows.append([])
        turn.row = row
        rows[row].append(turn)
    device, offsets, counts = batch.pixel_values.device, batch.tile_offsets, batch.tiles_per_view
    tiles = [[offsets[view] + tile for view in own for tile in range(counts[view])] for own in views]
    prefixes = [prompter.image_prefix(*(counts[view] for view in own)) for own in views]
    columns = [row_columns(*row) for row in zip(prefixes, rows, strict=True)]
    fills = (prompter.tokenizer.pad_token_id or 0, 0, -1, IGNORED)
    input_ids, position_ids, conversation, label_ids = (
        _right_pad(parts, fill, device) for parts, fill in zip(zip(*columns, strict=True), fills, strict=True)
    )
    answers = (label_ids[:, 1:] != IGNORED).nonzero().T
    # A region prompt refers to the last tile of its row: the thumbnail, or the only tile.
    last_tile = [number - 1 for number in accumulate(len(group) for group in tiles)]
    prompted = [turn for own in rows for turn in own if turn.is_caption]
    prompts = [batch.prompt_masks[turn.region] if turn.prompt is None else turn.prompt for turn in prompted]
    marks = [place for turn in turns if not turn.is_extra for place in turn.places(prompter.seg_id)]
    weights = torch.ones(batch.num_regions) if weights is None else weights
    objects, flat_tiles = float(weights.sum()), [tile for group in tiles for tile in group]
    return PackedBatch(
        batch=batch,
        captions=list(captions),
        input_ids=input_ids,
        position_ids=send(position_ids, device),
        attention_mask=conversation_mask(send(conversation, device)),
        row_lengths=[len(ids) for ids, *_ in columns],
        read_from=max(0, min(len(prefix) for prefix in prefixes) - 1),
        row_tiles=tiles,
        region_tile=torch.tensor([last_tile[turn.row] for turn in prompted], dtype=torch.long),
        prompt_masks=torch.stack(prompts) if prompts else batch.prompt_masks[:0],
        seg_positions=send(torch.tensor(marks, dtype=torch.long).reshape(-1, 2).T, device),
        answer_positions=send(answers, device),
        answer_ids=send(label_ids[answers[0], answers[1] + 1], device),
        region_weights=send(weights, device),
        vision=None if vision is None else vision[send(torch.tensor(flat_tiles), device)],
        levels=levels,
        counts={"mask_loss": objects, "dice_loss": objects, "llm_loss": float(answers.shape[1])},
    )


def row_columns(
    prefix: Sequence[int], turns: Sequence[RegionTurn]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return ids, positions, numbers of conversations (0 prefix) and labels of a row; set where its turns start."""
    count = len(prefix)
    ids, places, conversations, labels = list(prefix), list(range(count)), [0] * count, [IGNORED] * count
    for turn in turns:
        turn.start, count = len(ids), len(turn.turn.input_ids)
        first = places[-1] + 1 if turn.continues else len(prefix)
        ids += turn.turn.input_ids
        places += range(first, first + count)
        conversations += [conversations[-1] + (not turn.continues)] * count
        labels += turn.turn.labels
    return ids, places, conversations, labels


def _right_pad(rows: Sequence[list[int]], fill: int, device: torch.device) -> Tensor:
    """Return (R, L) int64 on the host; L is a length that suits ``device``."""
    padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)
    return F.pad(padded, (0, round_columns(padded.shape[1], device) - padded.shape[1]), value=fill)


def conversation_mask(conversation: Tensor) -> Tensor:
    """Return who sees whom: (R, L) numbers of conversations (0 prefix, -1 padding) -> (R, 1, L, L) bool.

    Padded positions see themselves alone: a row of the softmax without any true entry would give NaN.
    """
    length = conversation.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=conversation.device).tril()
    seen, seer = conversation[:, None, :], conversation[:, :, None]
    allowed = causal & (seen >= 0) & ((seen == 0) | (seen == seer))
    return (allowed | torch.eye(length, dtype=torch.bool, device=conversation.device))[:, None]

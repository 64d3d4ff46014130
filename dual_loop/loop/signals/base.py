"""What every option that teaches something is made of, so that the task loops over signals and branches on none.

One optimiser step calls, in this order: :meth:`Signal.asks` (captions to be scored), :meth:`Signal.plan` (turns and
weights of the rows), :meth:`Signal.lessons` (what the terms need, once rows are packed), and in each micro-batch's
forward pass :meth:`Signal.edit` and :meth:`Signal.terms`.

Those that learn from generated ids read them again in :func:`spoken_turns`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dual_loop.loop.packing import RowPlan, silent
from dual_loop.loop.scorer import RegionText
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import Batch, LossTerm, PackedBatch, RegionCaption, RegionTurn, Seen, Segmentation


@dataclass
class MicroBatch:
    """One micro-batch of an accumulation window, as step 1 leaves it.

    Attributes:
        batch, seen, captions: images, their features, and one caption a region.
        plan: what goes into its rows.
        scores: the IoU (N,) of a text's mask with every region, by region and text.
        rows: what steps 2 and 3 read; set once they are packed.
    """

    batch: Batch
    seen: Seen
    captions: list[RegionCaption]
    plan: RowPlan
    scores: dict[RegionText, Tensor] = field(default_factory=dict)
    rows: PackedBatch = field(init=False)


class Signal:
    """A source of further lessons; as it stands here it teaches nothing.

    Attributes:
        name: key of what it keeps in ``PackedBatch.lessons``.
        num_samples: K, captions that step 1 samples for each region.
        needs_greedy: whether it compares with a greedy caption.
        reads_samples: whether step 2 may read the first sample in place of a greedy caption.
    """

    name = ""
    num_samples = 0
    needs_greedy = False
    reads_samples = False

    def asks(self, micro: MicroBatch) -> Iterable[RegionText]:
        """Return the texts of a micro-batch whose masks it wants to be compared with the regions."""
        return ()

    def plan(self, window: Sequence[MicroBatch]) -> None:
        """Change the plans of all micro-batches before rows are packed; every rank calls this once a step."""

    def lessons(self, window: Sequence[MicroBatch], progress: float) -> None:
        """Keep in ``rows.lessons`` what :meth:`terms` needs, and count its items in ``rows.counts``.

        ``progress``: share of the run that is done, 0..1, for schedules.
        """

    def edit(self, model: Sa2VA, embeds: Tensor, packed: PackedBatch) -> Tensor:
        """Change what enters the language model, (R, L, D)."""
        return embeds

    def terms(self, model: Sa2VA, hidden: Tensor, masks: Segmentation, packed: PackedBatch) -> dict[str, LossTerm]:
        """Return loss terms by name."""
        return {}


def spoken_turns(
    batch: Batch, spoken: Sequence[tuple[int, Sequence[int]]], prompter: Prompter, question: str
) -> list[RegionTurn]:
    """Return captioning turns whose answers are generated ids, given as (region, ids), verbatim; nothing carries loss.

    The last id is left out: every id is predicted at the place before its own, and a special token, which can only be
    the last (``Prompter.answer_length``), would be taken for an image token or a request for a mask.
    """
    cells, seeds = batch.prompt_masks.flatten(1).sum(1).tolist(), batch.region_seeds.tolist()
    turns = []
    for region, ids in spoken:
        asked = prompter.caption_question(cells[region], question, seeds[region])
        turns.append(RegionTurn(region, silent((*asked, *ids[:-1])), is_caption=True))
    return turns


def predicting_positions(turns: Sequence[RegionTurn], spoken: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Return rows and columns of the hidden states that predict the generated ids of packed turns: (2, P) int64.

    A turn leaves its last id out, and the state before an id predicts it.
    """
    index = [
        (turn.row, turn.start + len(turn.turn.input_ids) - len(ids) + number)
        for turn, (_, ids) in zip(turns, spoken, strict=True)
        for number in range(len(ids))
    ]
    return torch.tensor(index, dtype=torch.long).reshape(-1, 2).T

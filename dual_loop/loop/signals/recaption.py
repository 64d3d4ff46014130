"""The loop in the other direction, for captioned data: caption -> mask' -> caption' against the caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from dual_loop.config import Config
from dual_loop.data.masks import pool_mask_to_grid
from dual_loop.loop.packing import IGNORED, silent
from dual_loop.loop.scorer import Scorer, join_masks
from dual_loop.loop.signals.base import MicroBatch, Signal
from dual_loop.metrics import iou_table, ratio
from dual_loop.model.hardware import send
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import LossTerm, PackedBatch, RegionTurn, Segmentation, Turn

LEAST_IOU = 0.5
"""Of mask' and mask, below which mask' may show another object, of which the caption would be false."""


class Recaption(Signal):
    """Language loss of a data set's caption where the region prompt is the mask that this very caption led to.

    The captioner learns to describe regions whose cells are partly wrong, as those of a segmenter or of a user are. No
    gradient passes through the cells. Regions of frame pairs are left out: mask' is not on the frame that is captioned.
    """

    name = "recaption"

    def __init__(self, model: Sa2VA, prompter: Prompter, config: Config) -> None:
        self.model, self.prompter, self.scorer = model, prompter, Scorer(model, prompter, config.loop)
        self.question, self.weight = config.loop.caption_question, config.loss.recaption_weight
        self.grid_pooling = config.data.grid_pooling
        self.turns: list[list[tuple[RegionTurn, Turn]]] = []

    def plan(self, window: Sequence[MicroBatch]) -> None:
        self.turns = [self._turns(micro) for micro in window]
        for micro, turns in zip(window, self.turns, strict=True):
            micro.plan.turns += [turn for turn, _ in turns]

    def _turns(self, micro: MicroBatch) -> list[tuple[RegionTurn, Turn]]:
        """Return for each mask' that will do a turn without loss of its own, and the same with its labels."""
        batch, owners = micro.batch, micro.batch.region_image.tolist()
        is_pair = [view != other for view, other in zip(batch.caption_view, batch.target_view, strict=True)]
        texts = [(n, one.text) for n, one in enumerate(micro.captions) if one.is_reference and not is_pair[owners[n]]]
        found, seeds = list[tuple[RegionTurn, Turn]](), batch.region_seeds.tolist()
        if texts:
            masks = join_masks(self.scorer.segment(batch, micro.seen, texts), self.model.mask_size) > 0
            regions = [region for region, _ in texts]
            ious = iou_table(masks, batch.binary_targets[regions]).diagonal().tolist()
            for (region, text), mask, iou in zip(texts, masks, ious, strict=True):
                if iou >= LEAST_IOU:
                    grid = pool_mask_to_grid(mask[None].cpu(), batch.prompt_masks.shape[-1], mode=self.grid_pooling)[0][
                        0
                    ]
                    turn = self.prompter.caption_turn(int(grid.sum()), text, self.question, seeds[region])
                    found.append((RegionTurn(region, silent(turn.input_ids), is_caption=True, prompt=grid), turn))
        micro.plan.metrics |= ratio("recaption_kept", [1.0] * len(found) + [0.0] * (len(texts) - len(found)))
        return found

    def lessons(self, window: Sequence[MicroBatch], progress: float) -> None:
        for rows, turns in zip((micro.rows for micro in window), self.turns, strict=True):
            taught = [
                (turn.row, turn.start + place - 1, label)
                for turn, answered in turns
                for place, label in enumerate(answered.labels)
                if label != IGNORED
            ]
            rows.lessons[self.name] = send(torch.tensor(taught, dtype=torch.long).reshape(-1, 3).T, self.model.device)
            rows.counts["recaption_loss"] = float(len(taught))

    def terms(self, model: Sa2VA, hidden: Tensor, masks: Segmentation, packed: PackedBatch) -> dict[str, LossTerm]:
        row, column, label = cast(Tensor, packed.lessons[self.name])
        loss = model.token_loss(hidden[row, column], label) * self.weight
        return {"recaption_loss": LossTerm(loss, packed.counts["recaption_loss"])}

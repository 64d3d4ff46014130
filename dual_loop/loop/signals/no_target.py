"""No target: what the image does not show is to give an empty mask, which captions of the image never teach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from dual_loop.caption_metrics import may_hold
from dual_loop.config import Config
from dual_loop.loop.packing import silent
from dual_loop.loop.signals.base import MicroBatch, Signal
from dual_loop.losses import dice_loss, mask_cross_entropy, sum_objects
from dual_loop.model.hardware import send
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import LossTerm, PackedBatch, RankComm, RegionTurn, Segmentation


class NoTarget(Signal):
    """Asks once of each image for what it does not show; no pixel is right.

    That is an expression of which the data set says so (gRefCOCO), else a data set's caption of another image of the
    step. This must not be one that may hold where a caption of the image does (``caption_metrics.may_hold``), be that
    drawn or not. What an image shows besides is not known, so a few of these targets are wrong. Question and answer are
    those of
    step 2: others would give away that nothing is there. No language loss falls on them.
    """

    name = "no_target"

    def __init__(self, prompter: Prompter, config: Config, comm: RankComm) -> None:
        self.prompter, self.loop, self.loss, self.comm = prompter, config.loop, config.loss, comm
        self.turns: list[list[RegionTurn]] = []

    def plan(self, window: Sequence[MicroBatch]) -> None:
        references = [one.text for micro in window for one in micro.captions if one.is_reference]
        # Sorted, so that it does not matter how the images of a step are split.
        offered = sorted({*self.comm.gather(references)})
        self.turns = [self._turns(micro, offered) for micro in window]
        for micro, turns in zip(window, self.turns, strict=True):
            micro.plan.turns += turns

    def _turns(self, micro: MicroBatch, offered: Sequence[str]) -> list[RegionTurn]:
        owners, seeds = micro.batch.region_image.tolist(), micro.batch.region_seeds.tolist()
        turns = []
        for image in range(micro.batch.num_images):
            region, known = owners.index(image), [*micro.batch.undrawn_captions[image]]
            for one, texts, owner in zip(micro.captions, micro.batch.references, owners, strict=True):
                known += [one.text, *texts] if owner == image else []
            own = micro.batch.no_target[image]
            if others := own or [text for text in offered if not may_hold(text, known)]:
                text, place = (
                    others[seeds[region] % len(others)],
                    (self.loop.segment_question, self.loop.segment_answer),
                )
                turn = self.prompter.segment_turn(text, *place, seeds[region])
                turns.append(RegionTurn(region, silent(turn.input_ids), is_extra=True))
        return turns

    def lessons(self, window: Sequence[MicroBatch], progress: float) -> None:
        for rows, turns in zip((micro.rows for micro in window), self.turns, strict=True):
            places = [place for turn in turns for place in turn.places(self.prompter.seg_id)]
            positions = torch.tensor(places, dtype=torch.long).reshape(-1, 2).T
            rows.lessons[self.name] = send(positions, rows.attention_mask.device)
            rows.counts["no_target_loss"] = float(len(turns))

    def terms(self, model: Sa2VA, hidden: Tensor, masks: Segmentation, packed: PackedBatch) -> dict[str, LossTerm]:
        positions = cast(Tensor, packed.lessons[self.name])
        count = positions.shape[1]
        packed.metrics |= {"no_target_empty/sum": 0.0, "no_target_empty/count": float(count)}
        if not count:
            return {"no_target_loss": LossTerm(masks.mask_logits.sum() * 0.0, 0.0)}
        logits = model.segment(hidden, packed, positions).mask_logits
        packed.metrics["no_target_empty/sum"] = (logits <= 0).flatten(1).all(1).sum()
        nothing = torch.zeros_like(logits)
        losses = self.loss.mask_weight * mask_cross_entropy(logits, nothing)
        losses = losses + self.loss.dice_weight * dice_loss(logits, nothing)
        return {"no_target_loss": sum_objects(losses, self.loss.no_target_weight)}

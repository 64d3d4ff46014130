"""What a text leads to: the one place that segments texts, for rewards, measurements and people; no graph.

Training gives the answer ("Sure, [SEG]."), so a mask can never be missing. A measure that is to compare with published
figures lets the model write it: then an answer may hold no [SEG] (no mask) or several.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dual_loop.config import LoopConfig
from dual_loop.loop.packing import pack_turns, silent
from dual_loop.metrics import iou_table, own_image_only
from dual_loop.model.decode import Decoder, Prompt
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA, evaluating
from dual_loop.types import Batch, RegionTurn, Seen

ANSWER_TOKENS = 32
"""Longest written answer: ``Sure, the segmentation result is [SEG].`` and its end, with room."""

RegionText = tuple[int, str | None]
"""A text about an image, named by one of its regions; None, a caption that was rejected, is an empty mask."""


class Scorer:
    """Segments texts as step 2 does, with ``loop.segment_question`` and ``loop.segment_answer``; in eval mode."""

    def __init__(self, model: Sa2VA, prompter: Prompter, config: LoopConfig) -> None:
        self.model, self.prompter, self.config = model, prompter, config

    @torch.no_grad()
    def segment(
        self, batch: Batch, seen: Seen, texts: Sequence[RegionText], *, generated: bool = False, prompts: bool = False
    ) -> list[Tensor]:
        """Return for each text the mask logits (n, Q, Q) of the n [SEG] in its answer; n is 0 for None.

        Args:
            batch: B images with N regions; only the images are looked at.
            seen: what the image encoders made of it.
            texts: in any order; a text that is asked twice of a region is segmented once.
            generated: let the model write the answers, greedily; else the answer of ``segment_answer`` is given.
            prompts: return the embeddings (n, C) that prompt the masks.

        Raises:
            PromptError: a text holds a special token.
        """
        asked = sorted({(region, text) for region, text in texts if text is not None})
        side = self.model.mask_size
        size = (int(self.model.grounding_encoder.prompt_encoder.hidden_size),) if prompts else (side, side)
        nothing = torch.zeros(0, *size, device=self.model.device)
        masks: dict[RegionText, Tensor] = {}
        if asked:
            with evaluating(self.model):
                turns = self._answers(batch, seen, asked, generated)
                counts = [turn.turn.input_ids.count(self.prompter.seg_id) for turn in turns]
                found: Tensor | None = nothing
                if sum(counts):
                    packed = pack_turns(batch, [], turns, self.prompter, vision=seen.vision, levels=seen.levels)
                    answer = self.model.predict(packed)
                    found = answer.seg_embeds if prompts else answer.mask_logits
                assert found is not None
            masks = dict(zip(asked, found.split(counts), strict=True))
        return [masks.get(text, nothing) for text in texts]

    def score(self, batch: Batch, seen: Seen, texts: Sequence[RegionText], soft: bool = False) -> Tensor:
        """Return the IoU of the R texts' masks with the N masks of the batch: (R, N) float32, on the CPU.

        NaN for regions of other images; a rejected text's mask is empty. ``soft``: of the masks' probabilities p with
        the targets t as they are, ``sum(p t) / sum(p + t - p t)``.
        """
        if not texts:
            return torch.zeros(0, batch.num_regions)
        masks = join_masks(self.segment(batch, seen, texts), self.model.mask_size)
        regions = torch.tensor([region for region, _ in texts], dtype=torch.long)
        pair = (masks.float().sigmoid(), batch.target_masks) if soft else (masks > 0, batch.binary_targets)
        return own_image_only(iou_table(*pair).cpu(), regions, batch.region_image)

    def _answers(self, batch: Batch, seen: Seen, texts: Sequence[tuple[int, str]], generated: bool) -> list[RegionTurn]:
        """Return a turn for each text, with the given answer or with the one that the model writes."""
        owners, seeds = batch.region_image.tolist(), batch.region_seeds.tolist()
        question, answer = self.config.segment_question, self.config.segment_answer
        if not generated:
            own = [self.prompter.segment_turn(text, question, answer, seeds[region]) for region, text in texts]
            return [RegionTurn(region, silent(turn.input_ids)) for (region, _), turn in zip(texts, own, strict=True)]
        questions = [self.prompter.segment_question(text, question, seeds[region]) for region, text in texts]
        images = sorted({owners[region] for region, _ in texts})
        prompts = [
            Prompt(asked, images.index(owners[region])) for asked, (region, _) in zip(questions, texts, strict=True)
        ]
        of_view = self.model.project_vision(seen.vision).split(batch.tiles_per_view)
        shown = [[of_view[view] for view in batch.views_read[image]] for image in images]
        frames = [[len(tiles) for tiles in own] for own in shown]
        parts = (self.model, self.prompter, prompts, [torch.cat(own) for own in shown], ANSWER_TOKENS)
        decoder = Decoder(*parts, frames=frames)
        turns = []
        for (region, _), asked, written in zip(texts, questions, decoder.write(range(len(questions))), strict=True):
            # A written placeholder would ask for image features that nobody gave.
            ids = (*asked, *(token for token in written if token != self.prompter.image_context_id))
            turns.append(RegionTurn(region, silent(ids)))
        return turns


def join_masks(masks: Sequence[Tensor], side: int) -> Tensor:
    """Join the masks (n, Q, Q) of each of R >= 1 texts to one of logits: (R, Q, Q), far below 0 where there is none."""
    empty = torch.full((side, side), -1e4, device=masks[0].device)
    return torch.stack([own.amax(0) if len(own) else empty for own in masks])

"""Referring segmentation as a user meets it: the answer is written by the model, or given, and may hold any [SEG].

Training gives the answer ("Sure, [SEG]."), so a mask can never be missing. A measure that is to compare with
published figures lets the model write it: then an answer may hold no [SEG] (no mask) or several.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dual_loop.config import LoopConfig
from dual_loop.loop.generation import Prompts, generate_ids
from dual_loop.loop.rows import Rows
from dual_loop.model.prompts import Branch, Prompter
from dual_loop.model.video_llava_sam import VideoLLaVASAMModel, evaluating
from dual_loop.types import Batch

ANSWER_TOKENS = 32
"""Longest written answer: ``Sure, the segmentation result is [SEG].`` and its end, with room."""


class Answerer:
    """Segments one text a region; no graph.

    Args:
        model: the unwrapped model.
        prompter: builds the questions.
        config: ``segment_question`` and ``segment_answer`` (for given answers) are read.
        max_new_tokens: of a written answer.
    """

    def __init__(
        self,
        model: VideoLLaVASAMModel,
        prompter: Prompter,
        config: LoopConfig,
        max_new_tokens: int = ANSWER_TOKENS,
    ) -> None:
        self.model, self.prompter, self.config = model, prompter, config
        self.max_new_tokens = max_new_tokens

    @torch.no_grad()
    def segment(self, batch: Batch, vision_features: Tensor, texts: Sequence[str], *, generated: bool) -> list[Tensor]:
        """Return for each of the N regions the mask logits (n, Q, Q) of the n [SEG] in its answer; n may be 0.

        Args:
            batch: B images with N regions; only the images are looked at.
            vision_features: (T, M, D_vision) of all views.
            texts: N texts, one a region.
            generated: let the model write the answers, greedily; else the answer of ``segment_answer`` is given.

        Raises:
            PromptError: a text holds a special token.
        """
        with evaluating(self.model):
            branches = self._written(batch, vision_features, texts) if generated else self._given(batch, texts)
            counts = [branch.input_ids.count(self.prompter.seg_id) for branch in branches]
            side = self.model.mask_size
            if sum(counts) == 0:
                return [torch.zeros(0, side, side, device=self.model.device) for _ in branches]
            rows = Rows(batch, self.prompter)
            for region, branch in enumerate(branches):
                rows.add_segmentation(region, branch)
            data = {**rows.pack(vision_features), "g_pixel_values": batch.g_pixel_values}
            logits = self.model(data, mode="predict")["segmentation"].mask_logits
        return list(logits.split(counts))

    def _given(self, batch: Batch, texts: Sequence[str]) -> list[Branch]:
        names = self.config.segment_question, self.config.segment_answer
        seeds = batch.region_seeds.tolist()
        return [self.prompter.segment_branch(t, *names, seed=seed) for t, seed in zip(texts, seeds, strict=True)]

    def _written(self, batch: Batch, vision_features: Tensor, texts: Sequence[str]) -> list[Branch]:
        offsets, seeds = batch.tile_offsets, batch.region_seeds.tolist()
        projected = self.model.project_vision(vision_features)
        views: list[int] = []
        images, questions = [], []
        for region, image in enumerate(batch.region_image.tolist()):
            view = batch.target_view[image]
            if view not in views:
                views.append(view)
            images.append(views.index(view))
            questions.append(self.prompter.segment_question(texts[region], self.config.segment_question, seeds[region]))
        counts = [batch.tiles_per_view[view] for view in views]
        prompts = Prompts(
            questions=questions,
            images=images,
            prefixes=[self.prompter.image_prefix(count) for count in counts],
            tiles=[list(range(offsets[v], offsets[v] + count)) for v, count in zip(views, counts, strict=True)],
            masks=[None] * len(questions),
        )
        answers = generate_ids(self.model, self.prompter, prompts, projected, self.max_new_tokens)
        return [self._branch(*pair) for pair in zip(questions, answers, strict=True)]

    def _branch(self, question: list[int], answer: list[int]) -> Branch:
        # A written placeholder would ask for image features that nobody gave.
        ids = [token for token in self.prompter.cut_turn(answer) if token != self.prompter.image_context_id]
        return Branch((*question, *ids), (-100,) * (len(question) + len(ids)))

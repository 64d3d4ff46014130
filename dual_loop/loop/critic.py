"""What a caption leads to: masks of any number of captions of a region, without graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dual_loop.config import LoopConfig
from dual_loop.loop.rewards import iou_matrix
from dual_loop.loop.rows import Rows
from dual_loop.model.grounding import GroundingFeatures
from dual_loop.model.prompts import Prompter
from dual_loop.model.video_llava_sam import VideoLLaVASAMModel, evaluating
from dual_loop.types import Batch


@dataclass(frozen=True)
class AskedCaption:
    """A caption to be segmented: of which region, and its text."""

    region: int
    text: str


class Critic:
    """Segments captions as step 2 does and compares each mask' with every mask of its image.

    Args:
        model: the unwrapped model; runs in eval mode.
        prompter, config: the question and answer of step 2.
    """

    def __init__(self, model: VideoLLaVASAMModel, prompter: Prompter, config: LoopConfig) -> None:
        self.model, self.prompter, self.config = model, prompter, config

    @torch.no_grad()
    def score(
        self,
        batch: Batch,
        vision_features: Tensor,
        asked: Sequence[AskedCaption],
        grounding: GroundingFeatures | None = None,
    ) -> Tensor:
        """Return the IoU of R captions' masks with the N masks of the batch.

        Args:
            batch: B images with N regions.
            vision_features: (T, M, D_vision) of all its views.
            asked: R captions in any order; a text that is asked twice of a region is segmented once.
            grounding: SAM 2's features of the B images, where they are at hand.

        Returns:
            (R, N) float32, NaN for regions of other images.
        """
        distinct = sorted({(caption.region, caption.text) for caption in asked})
        if not distinct:
            return torch.zeros(0, batch.num_regions)
        logits = self._segment(batch, vision_features, distinct, grounding)
        regions = torch.tensor([region for region, _ in distinct], device=logits.device)
        matrix = iou_matrix(logits, regions, batch.target_masks, batch.region_image.to(logits.device)).cpu()
        index = {pair: number for number, pair in enumerate(distinct)}
        return matrix[[index[caption.region, caption.text] for caption in asked]]

    def _segment(
        self,
        batch: Batch,
        vision_features: Tensor,
        distinct: Sequence[tuple[int, str]],
        grounding: GroundingFeatures | None,
    ) -> Tensor:
        rows, names = Rows(batch, self.prompter), (self.config.segment_question, self.config.segment_answer)
        seeds = batch.region_seeds.tolist()
        for region, text in distinct:
            rows.add_segmentation(region, self.prompter.segment_branch(text, *names, seeds[region]))
        data = {**rows.pack(vision_features), "g_pixel_values": batch.g_pixel_values}
        if grounding is not None:
            data["grounding_features"] = grounding
        with evaluating(self.model):
            return torch.as_tensor(self.model(data, mode="predict")["segmentation"].mask_logits)

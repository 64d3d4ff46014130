"""Soft targets from the weight average (mean teacher, 1703.01780), on the same inputs and the same frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dual_loop.config import LossConfig
from dual_loop.loop.segmenter import SegmentationInputs, mask_ious
from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.model.video_llava_sam import VideoLLaVASAMModel, evaluating
from dual_loop.types import Batch


class MaskTeacher:
    """Writes the teacher's mask probabilities into the inputs of step 2.

    The teacher is the weight average: it runs in eval mode without graph, with its weights swapped into the model,
    and teaches an object only where its own mask agrees with the true one (``loss.distill_agreement``). Differs from
    mean teachers for unlabelled images in that gate: here every object has a true mask, and the teacher adds what a
    hard mask does not say, how sure one can be at each pixel.

    Args:
        model: the unwrapped model.
        average: the weight average.
        config: agreement and weight.
    """

    def __init__(self, model: VideoLLaVASAMModel, average: ExponentialMovingAverage | None, config: LossConfig) -> None:
        self.model, self.average, self.config = model, average, config

    @torch.no_grad()
    def teach(self, batches: Sequence[Batch], inputs: Sequence[SegmentationInputs]) -> list[dict[str, float]]:
        """Add soft targets and their counts to the inputs of every micro-batch; return sums for the records."""
        if self.config.distill_weight == 0:
            return [{} for _ in inputs]
        if self.average is None:
            raise RuntimeError("distillation needs the weight average: call DualLoop.use_average first")
        with self.average.swapped(), evaluating(self.model):
            return [self._teach(batch, one) for batch, one in zip(batches, inputs, strict=True)]

    def _teach(self, batch: Batch, inputs: SegmentationInputs) -> dict[str, float]:
        logits = self.model(plain_inputs(inputs.data), mode="predict")["segmentation"].mask_logits
        agrees = mask_ious(logits, batch.target_masks) >= self.config.distill_agreement
        weights = agrees.float() * inputs.data["region_weights"]
        inputs.data["teacher"] = {"probabilities": logits.float().sigmoid(), "weights": weights}
        inputs.counts["distill_loss"] = float(weights.sum())
        return {"teacher_agrees/sum": float(agrees.sum()), "teacher_agrees/count": float(len(agrees))}


def plain_inputs(data: dict[str, Any]) -> dict[str, Any]:
    """Return inputs of step 2 whose captions are read as plain ids; the masks are the same."""
    return {key: value for key, value in data.items() if key != "captioning"}

"""Soft targets from the weight average (mean teacher, 1703.01780), on the same inputs and the same frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dual_loop.config import LossConfig
from dual_loop.loop.signals.base import MicroBatch, Signal
from dual_loop.losses import full_precision, sum_objects
from dual_loop.metrics import iou_table
from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.model.sa2va import Sa2VA
from dual_loop.model.stored_weights import weights
from dual_loop.types import LossTerm, PackedBatch, Segmentation


@dataclass
class SoftMasks:
    """The teacher's masks of one micro-batch: probabilities (N, Q, Q) and the weight (N,) of each object."""

    probabilities: Tensor
    weights: Tensor


class Distillation(Signal):
    """Draws masks to those of the weight average.

    The teacher runs in eval mode without graph and teaches an object only where its own mask agrees with the true one
    (``loss.distill_agreement``). Differs from mean teachers for unlabelled images in that gate: here every object has a
    true mask, and the teacher adds what a hard mask does not say, how sure one can be at each pixel.

    """

    name = "distillation"

    def __init__(self, model: Sa2VA, average: ExponentialMovingAverage, config: LossConfig) -> None:
        self.model, self.average, self.config = model, average, config

    @torch.no_grad()
    def lessons(self, window: Sequence[MicroBatch], progress: float) -> None:
        with weights(self.average):
            for rows in (micro.rows for micro in window):
                logits = self.model.predict(rows).mask_logits
                agreement = iou_table(logits > 0, rows.batch.binary_targets).diagonal()
                agrees = agreement >= self.config.distill_agreement
                factors = agrees.float() * rows.region_weights
                rows.lessons[self.name] = SoftMasks(logits.float().sigmoid(), factors)
                rows.counts["distill_loss"] = float(factors.sum())
                rows.metrics["teacher_agrees/sum"] = float(agrees.sum())
                rows.metrics["teacher_agrees/count"] = float(len(agrees))

    def terms(self, model: Sa2VA, hidden: Tensor, masks: Segmentation, packed: PackedBatch) -> dict[str, LossTerm]:
        soft = cast(SoftMasks, packed.lessons[self.name])
        settings = (soft.weights, self.config.distill_weight, self.config.distill_confidence)
        return {"distill_loss": distillation_loss(masks.mask_logits, soft.probabilities, *settings)}


def distillation_loss(
    mask_logits: Tensor,
    teacher_probabilities: Tensor,
    object_weights: Tensor,
    weight: float = 1.0,
    confidence: float = 0.0,
) -> LossTerm:
    """Divergence of a student's masks from a teacher's soft ones: the mean over sure pixels, summed over objects.

    Args:
        mask_logits: (N, Q, Q) float, the student's, with graph.
        teacher_probabilities: (N, Q, Q) float in 0..1, without.
        object_weights: (N,) factor of each object; the count is their sum.
        confidence: pixels count where the teacher's ``|2p - 1|`` is at least this much. An object without any such
            pixel adds 0, and is counted.

    Raises:
        ValueError: the shapes differ.
    """
    logits = full_precision(mask_logits)
    targets = teacher_probabilities.detach().float().to(logits.dtype)
    entropy = -(torch.xlogy(targets, targets) + torch.xlogy(1 - targets, 1 - targets))
    values = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") - entropy
    is_sure = ((2 * targets - 1).abs() >= confidence).to(logits.dtype)
    per_object = (values * is_sure).flatten(1).sum(1) / is_sure.flatten(1).sum(1).clamp_min(1.0)
    return sum_objects(per_object, weight, object_weights)

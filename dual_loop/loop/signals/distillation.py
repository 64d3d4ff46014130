"""Soft targets from the weight average (mean teacher, 1703.01780), on the same inputs and the same frozen features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dual_loop.config import LossConfig
from dual_loop.loop.signals.base import MicroBatch, Signal
from dual_loop.losses import check_same_shape, dice_loss, full_precision, mask_cross_entropy, sum_objects
from dual_loop.metrics import iou_table
from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.model.sa2va import Sa2VA
from dual_loop.model.stored_weights import weights
from dual_loop.types import LossTerm, PackedBatch, Segmentation

KL_AGREEMENT = 0.5
"""``loss.distill_agreement`` where it is not set, with ``kl``."""


@dataclass
class SoftMasks:
    """The teacher's masks of one micro-batch: probabilities (N, Q, Q) and the weight (N,) of each object."""

    probabilities: Tensor
    weights: Tensor


class Distillation(Signal):
    """Draws masks to those of the weight average, by ``loss.distill_form``; its average is taken over objects.

    The teacher runs in eval mode without graph. With ``kl`` it teaches an object only where its own mask agrees with
    the true one (``loss.distill_agreement``). Differs from mean teachers for unlabelled images in that gate: here every
    object has a true mask, and the teacher adds what a hard mask does not say, how sure one can be at each pixel.
    """

    name = "distillation"

    def __init__(self, model: Sa2VA, average: ExponentialMovingAverage, config: LossConfig) -> None:
        self.model, self.average, self.config = model, average, config

    @torch.no_grad()
    def lessons(self, window: Sequence[MicroBatch], progress: float) -> None:
        least = self.config.distill_agreement
        if least is None:
            least = KL_AGREEMENT if self.config.distill_form == "kl" else 0.0
        with weights(self.average):
            for rows in (micro.rows for micro in window):
                logits = self.model.predict(rows).mask_logits
                agreement = iou_table(logits > 0, rows.batch.binary_targets).diagonal()
                agrees = agreement >= least
                factors = agrees.float() * rows.region_weights
                rows.lessons[self.name] = SoftMasks(logits.float().sigmoid(), factors)
                rows.counts["distill_loss"] = float(factors.sum())
                rows.metrics["teacher_agrees/sum"] = float(agrees.sum())
                rows.metrics["teacher_agrees/count"] = float(len(agrees))

    def terms(self, model: Sa2VA, hidden: Tensor, masks: Segmentation, packed: PackedBatch) -> dict[str, LossTerm]:
        soft, loss = cast(SoftMasks, packed.lessons[self.name]), self.config
        given = (masks.mask_logits, soft.probabilities, soft.weights)
        if loss.distill_form == "soft_mask":
            return {"distill_loss": soft_mask_loss(*given, loss)}
        return {"distill_loss": distillation_loss(*given, loss.distill_weight, loss.distill_confidence)}


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
    logits, targets, share = _sure_pixels(mask_logits, teacher_probabilities, confidence)
    entropy = -(torch.xlogy(targets, targets) + torch.xlogy(1 - targets, 1 - targets)).flatten(1).mean(1)
    return sum_objects((mask_cross_entropy(logits, targets) - entropy) / share, weight, object_weights)


def soft_mask_loss(
    mask_logits: Tensor, teacher_probabilities: Tensor, object_weights: Tensor, loss: LossConfig
) -> LossTerm:
    """The mask losses against a teacher's soft masks, ``distill_weight x (mask_weight x CE + dice_weight x dice)``.

    At all pixels, also where the mask losses look at points: the teacher's mask exists on this grid alone, so there is
    nothing finer to look up, and no draw adds noise. Arguments and errors as in :func:`distillation_loss`.
    """
    logits, targets, share = _sure_pixels(mask_logits, teacher_probabilities, loss.distill_confidence)
    entropy = loss.mask_weight * mask_cross_entropy(logits, targets) / share
    per_object = entropy + loss.dice_weight * dice_loss(logits, targets)
    return sum_objects(per_object, loss.distill_weight, object_weights)


def _sure_pixels(logits: Tensor, teacher: Tensor, confidence: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits and targets in which an unsure pixel adds nothing to any loss, and the share (N,) of sure ones."""
    check_same_shape(logits, teacher)
    logits = full_precision(logits)
    targets = teacher.detach().to(logits.dtype)
    is_sure = (2 * targets - 1).abs() >= confidence
    share = is_sure.to(targets.dtype).flatten(1).mean(1)
    # Surely no object, as both say.
    hidden = logits.masked_fill(~is_sure, -1e4), targets.masked_fill(~is_sure, 0.0)
    return *hidden, share.clamp_min(1 / targets.shape[1:].numel())

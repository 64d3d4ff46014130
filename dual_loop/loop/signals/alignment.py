"""Latent alignment: the [SEG] embedding is drawn to the prompt by which SAM 2 itself would be asked for the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from dual_loop.config import LossConfig
from dual_loop.loop.signals.base import MicroBatch, Signal
from dual_loop.losses import full_precision, sum_objects
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import LossTerm, PackedBatch, Segmentation


class Alignment(Signal):
    """Mean squared error between [SEG] embeddings and SAM 2's own prompts of the masks; needs masks and no text.

    Under ``loss.align_through = projection`` it reaches ``text_hidden_fcs`` alone, else everything that trains.
    """

    name = "alignment"

    def __init__(self, model: Sa2VA, config: LossConfig) -> None:
        self.model, self.config = model, config

    def lessons(self, window: Sequence[MicroBatch], progress: float) -> None:
        side = self.model.grounding_encoder.prompt_encoder.input_image_size
        for rows in (micro.rows for micro in window):
            targets = rows.batch.binary_targets
            points = inner_points(targets) * (side / targets.shape[-1])
            with torch.no_grad():
                # SAM 2's own embedding of one positive point on each mask.
                rows.lessons[self.name] = self.model.grounding.point_prompts(points.to(self.model.device))[:, 0, 0]
            rows.counts["align_loss"] = rows.counts["mask_loss"]

    def terms(self, model: Sa2VA, hidden: Tensor, masks: Segmentation, packed: PackedBatch) -> dict[str, LossTerm]:
        embeds, targets = cast(Tensor, masks.seg_embeds), cast(Tensor, packed.lessons[self.name])
        if self.config.align_through == "projection":
            rows, columns = packed.seg_positions
            embeds = model.seg_embeds(hidden.detach()[rows, columns])
        return {"align_loss": latent_alignment(embeds, targets, self.config.align_weight, packed.region_weights)}


def latent_alignment(
    seg_embeds: Tensor, target_embeds: Tensor, weight: float = 1.0, object_weights: Tensor | None = None
) -> LossTerm:
    """Mean squared error between prompt embeddings (N, C) and their fixed targets: mean over C, summed over objects.

    ``object_weights`` (N,) as in ``losses.sum_objects``.
    """
    difference = full_precision(seg_embeds) - full_precision(target_embeds.detach())
    return sum_objects(difference.square().mean(dim=1), weight, object_weights)


def inner_points(masks: Tensor) -> Tensor:
    """Return (N, 2) float32 points (x, y) in pixels of (N, H, W) masks, the middle of an empty one.

    A point is the foreground pixel nearest to the mask's centre of mass, so it lies on the object also where the centre
    does not.
    """
    masks, (height, width) = masks.bool(), masks.shape[1:]
    columns, rows = (torch.arange(size, dtype=torch.float32, device=masks.device) for size in (width, height))
    area = masks.flatten(1).sum(1).clamp_min(1)
    x, y = masks.sum(1).float() @ columns / area, masks.sum(2).float() @ rows / area
    distances = (columns - x[:, None, None]) ** 2 + (rows[:, None] - y[:, None, None]) ** 2
    nearest = distances.masked_fill(~masks, float("inf")).flatten(1).argmin(1)
    points = torch.stack([nearest % width, nearest // width], dim=1) + 0.5
    return torch.where(masks.flatten(1).any(1)[:, None], points, points.new_tensor([width / 2, height / 2]))

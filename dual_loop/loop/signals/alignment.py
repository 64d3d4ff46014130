"""Latent alignment: the [SEG] embedding is drawn to the prompt by which SAM 2 itself would be asked for the mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dual_loop.loop.signals.base import Signal, Window
from dual_loop.losses import full_precision, sum_objects
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import LossTerm, PackedBatch, Segmentation


class Alignment(Signal):
    """Mean squared error between [SEG] embeddings and SAM 2's own prompts of the masks; needs masks and no text.

    Args:
        model: gives the targets.
        weight: ``loss.align_weight``.
        through: ``all`` lets the loss reach everything that trains, ``projection`` only ``text_hidden_fcs``.
    """

    name = "alignment"

    def __init__(self, model: Sa2VA, weight: float, through: str) -> None:
        self.model, self.weight, self.through = model, weight, through

    def lessons(self, window: Window, packed: Sequence[PackedBatch]) -> None:
        for rows in packed:
            rows.lessons[self.name] = mask_prompts(self.model, rows.batch.target_masks)
            rows.counts["align_loss"] = rows.counts["mask_loss"]

    def terms(self, model: Sa2VA, hidden: Tensor, masks: Segmentation, packed: PackedBatch) -> dict[str, LossTerm]:
        embeds, targets = masks.seg_embeds, packed.lessons[self.name]
        if self.through == "projection":
            rows, columns = packed.seg_positions
            embeds = model.seg_embeds(hidden.detach()[rows, columns])
        assert isinstance(embeds, Tensor)
        assert isinstance(targets, Tensor)
        return {"align_loss": latent_alignment(embeds, targets, self.weight, packed.region_weights)}


def latent_alignment(
    seg_embeds: Tensor, target_embeds: Tensor, weight: float = 1.0, object_weights: Tensor | None = None
) -> LossTerm:
    """Mean squared error between prompt embeddings (N, C) and their fixed targets: mean over C, summed over objects.

    Args:
        weight: factor of the whole term.
        object_weights: (N,) factor of each object; the count is then their sum instead of N.

    Raises:
        ValueError: the shapes differ.
    """
    difference = full_precision(seg_embeds) - full_precision(target_embeds.detach())
    return sum_objects(difference.square().mean(dim=1), weight, object_weights)


@torch.no_grad()
def mask_prompts(model: Sa2VA, target_masks: Tensor) -> Tensor:
    """Return SAM 2's own embedding of one positive point on each mask: (N, Q, Q) -> (N, C), without gradient.

    The point is the foreground pixel nearest to the mask's centre of mass, so it lies on the object also where the
    centre does not.
    """
    side = model.grounding_encoder.prompt_encoder.input_image_size
    points = inner_points(target_masks) * (side / target_masks.shape[-1])
    return model.grounding.point_prompts(points.to(model.device))[:, 0, 0]


def inner_points(masks: Tensor) -> Tensor:
    """Return (N, 2) float32 points (x, y) in pixels of (N, Q, Q) masks: inside each mask, the middle if empty."""
    points = []
    for mask in masks.bool().cpu():
        rows, columns = mask.nonzero(as_tuple=True)
        if not len(rows):
            points.append(torch.tensor([mask.shape[1] / 2, mask.shape[0] / 2]))
            continue
        y, x = rows.float(), columns.float()
        nearest = int(((x - x.mean()) ** 2 + (y - y.mean()) ** 2).argmin())
        points.append(torch.stack([x[nearest], y[nearest]]) + 0.5)
    return torch.stack(points) if points else torch.zeros(0, 2)

"""The target of latent alignment: the prompt by which SAM 2 itself would be asked for a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from dual_loop.model.video_llava_sam import VideoLLaVASAMModel


@torch.no_grad()
def mask_prompts(model: VideoLLaVASAMModel, target_masks: Tensor) -> Tensor:
    """Return SAM 2's own embedding of one positive point on each mask: (N, Q, Q) -> (N, C), without gradient.

    The point is the foreground pixel nearest to the mask's centre of mass, so it lies on the object also where the
    centre does not. Needs masks and no text.
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

"""The points at which masks are compared where ``loss.num_points`` is not 0.

PointRend (1912.08193), as Mask2Former (2112.01527) and Sa2VA (2501.04001) use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dual_loop.errors import explain


@torch.no_grad()
def sample_points(
    mask_logits: torch.Tensor,
    seeds: torch.Tensor,
    num_points: int,
    oversample_ratio: float,
    importance_sample_ratio: float,
) -> torch.Tensor:
    """Choose the points at which the mask losses of each object are computed (PointRend, section 3.1).

    ``oversample_ratio * num_points`` uniform points are drawn; of these the ``importance_sample_ratio * num_points``
    with the smallest |logit| are kept, most uncertain first; new uniform points fill up the rest. The random numbers
    of an object come from its own seed through a CPU generator, so they depend neither on the other objects in the
    batch nor on the device.

    Args:
        mask_logits: (N, Q, Q) float. seeds: (N,) int64. num_points: P.

    Returns:
        (N, P, 2) float32, (x, y) in 0..1, on the device of ``mask_logits``; no gradient.

    Raises:
        ValueError: an argument is out of range or the number of seeds is not N.
    """
    if num_points < 1 or oversample_ratio < 1 or not 0 <= importance_sample_ratio <= 1:
        seen = f"num_points {num_points}, oversample {oversample_ratio}, importance {importance_sample_ratio}"
        raise ValueError(explain("point sampling is out of range", "sample_points", seen, "P >= 1, >= 1, 0..1"))
    count = len(mask_logits)
    if seeds.shape != (count,):
        raise ValueError(explain("one seed an object is needed", "sample_points", tuple(seeds.shape), (count,)))
    num_drawn, num_uncertain = int(num_points * oversample_ratio), int(num_points * importance_sample_ratio)
    num_uniform = num_points - num_uncertain
    random = torch.empty(count, num_drawn + num_uniform, 2)
    for row, seed in zip(random, seeds.tolist(), strict=True):
        row.copy_(torch.rand(row.shape, generator=torch.Generator().manual_seed(seed)))
    if mask_logits.device.type == "cuda":
        random = random.pin_memory()  # so that the host does not wait
    random = random.to(mask_logits.device, non_blocking=True)
    drawn, uniform = random.split([num_drawn, num_uniform], dim=1)
    uncertainty = -point_sample(mask_logits, drawn).abs()
    chosen = uncertainty.topk(num_uncertain, dim=1).indices
    uncertain = drawn.gather(1, chosen[..., None].expand(-1, -1, 2))
    return torch.cat([uncertain, uniform], dim=1)


def point_sample(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Read N maps at P points each: bilinear, pixel centres at half integers, zeros outside.

    Args:
        maps: (N, Q, Q) of any dtype.
        points: (N, P, 2), (x, y) with 0..1 spanning the map.

    Returns:
        (N, P) float32 (float64 for float64 maps), with gradient to ``maps``.

    Raises:
        ValueError: the shapes do not fit.
    """
    if points.ndim != 3 or maps.ndim != 3 or points.shape[0] != maps.shape[0] or points.shape[2] != 2:
        seen = f"maps {tuple(maps.shape)}, points {tuple(points.shape)}"
        raise ValueError(explain("maps and points do not fit", "point_sample", seen, "(N, Q, Q) and (N, P, 2)"))
    dtype = torch.promote_types(maps.dtype, torch.float32)
    if maps.shape[0] == 0:
        return maps.new_zeros(0, points.shape[1], dtype=dtype) + maps.sum() * 0.0
    if torch.are_deterministic_algorithms_enabled():
        return _gather_bilinear(maps.to(dtype), points.to(dtype))
    grid = (2.0 * points - 1.0).to(dtype)
    sampled = F.grid_sample(maps.to(dtype)[:, None], grid[:, None], mode="bilinear", align_corners=False)
    return sampled[:, 0, 0]


def mask_sample(masks: Sequence[torch.Tensor], points: torch.Tensor) -> torch.Tensor:
    """Read the masks of B images at P points each, as :func:`point_sample` does, without a copy in float32.

    Args:
        masks: B tensors (n, H, W) bool, whose sizes may differ; N in all. points: (N, P, 2), (x, y) in 0..1.

    Returns:
        (N, P) float32.
    """
    own_points = points.split([len(own) for own in masks])
    return torch.cat([_gather_bilinear(own, at) for own, at in zip(masks, own_points, strict=True)])


def _gather_bilinear(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """:func:`point_sample` by four gathers: the backward pass of grid_sample adds in any order on a GPU."""
    height, width = maps.shape[1:]
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    total = points.new_zeros(points.shape[:2])
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = x.floor() + right, y.floor() + down
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        weight = (1.0 - (x - column).abs()) * (1.0 - (y - row).abs()) * inside
        place = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
        total = total + weight * maps.flatten(1).gather(1, place)
    return total

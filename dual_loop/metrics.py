"""Measures of masks: pure functions.

Conventions, since published code differs in each of them:

* **IoU of two empty masks is 1**, as in LISA and GRES; such a pair adds nothing to the sums of cIoU.
* **gIoU** is the mean of the IoUs (mIoU in older papers, not the "generalised IoU" of boxes).
* **cIoU** is the sum of intersections over the sum of unions (oIoU in older papers); it favours large objects.
* **Pr@t** is the share of IoUs that are ``>= t``.
* **J** of a frame of a video is the IoU of its two masks, **F** the harmonic mean of the precision and the recall of
  their boundaries (:func:`boundary_f`), **J&F** the mean of both. Where both masks are empty J and F are 1, where one
  is they are 0.

All are fractions of 1, not per cent. LISA: 2308.00692; GRES: 2306.00968; DAVIS: Perazzi et al., CVPR 2016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from dual_loop.errors import explain

if TYPE_CHECKING:
    import torch

MASKS_AT_ONCE = 64

BOUNDARY_TOLERANCE = 0.008
"""Of F, as a share of the image's diagonal; rounded up to whole pixels."""

PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


Array = TypeVar("Array", "np.ndarray", "torch.Tensor")


def mask_overlap(pred: Array, target: Array) -> tuple[Array, Array]:
    """Return the intersection and the union of N pairs of masks, each (N,) int64 in pixels.

    Args:
        pred: (N, H, W) bool, numpy or torch.
        target: the same shape and kind.

    Raises:
        ValueError: the shapes differ or are not (N, H, W), or a mask is not boolean (sums of overlapping polygons and
            logits would otherwise be counted without a word).
    """
    if pred.shape != target.shape or pred.ndim != 3:
        seen = f"{tuple(pred.shape)} and {tuple(target.shape)}"
        raise ValueError(explain("masks cannot be compared", "mask_overlap", seen, "two equal shapes (N, H, W)"))
    dtypes = [str(mask.dtype).removeprefix("torch.") for mask in (pred, target)]
    if dtypes != ["bool", "bool"]:
        fix = "compare with a threshold first"
        raise ValueError(explain("masks are not boolean", "mask_overlap", dtypes, "bool", fix))
    return (pred & target).sum((1, 2)), (pred | target).sum((1, 2))


def iou(intersection: npt.ArrayLike, union: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return intersections over unions, elementwise; 1 where the union is 0.

    Division rounds correctly, so an IoU of exactly 3/5 equals the literal 0.6.
    """
    inner, outer = np.asarray(intersection, np.float64), np.asarray(union, np.float64)
    return np.where(outer > 0, inner / np.maximum(outer, 1), 1.0)


def boundary_f(pred: np.ndarray, target: np.ndarray) -> float:
    """Return F of two masks (H, W) bool, in 0..1.

    Precision is the share of the prediction's boundary with a pixel of the target's within the tolerance, recall the
    other way round; a mask without boundary (empty, or the whole image) has precision 1 as the prediction and recall 1
    as the target.
    """
    radius = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*target.shape))
    own, other = _boundary(pred), _boundary(target)
    precision, recall = _share_near(own, other, radius), _share_near(other, own, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Return the pixels that differ from that to the right, below, or below to the right: (H, W) bool."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return np.asarray((mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:]))


def _share_near(boundary: np.ndarray, other: np.ndarray, radius: int) -> float:
    """Return the share of a boundary's pixels at most ``radius`` from one of ``other``; 1 where it has none.

    In every row that a disk around a pixel meets, it counts those of ``other`` between the disk's ends.
    """
    rows, columns = boundary.nonzero()
    height, width = other.shape
    counts = np.pad(other.cumsum(1, dtype=np.int32), ((0, 0), (1, 0)))
    is_near = np.zeros(len(rows), bool)
    for offset in range(-radius, radius + 1):
        reach = math.isqrt(radius**2 - offset**2)
        row = (rows + offset).clip(0, height - 1)
        found = counts[row, (columns + reach + 1).clip(max=width)] > counts[row, (columns - reach).clip(min=0)]
        is_near |= found & (row == rows + offset)
    return float(is_near.mean()) if len(rows) else 1.0


def iou_table(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the IoU of every pair of masks: (R, H, W) and (N, H, W) bool -> (R, N) float32; 1 for two empty masks.

    Of values in 0..1 it is the soft IoU, whose intersection is the sum of products. Areas are exact up to 2^24 pixels.
    Masks are compared :data:`MASKS_AT_ONCE` rows at a time.
    """
    import torch

    with torch.autocast(pred.device.type, enabled=False):  # half precision would round areas
        flat = target.flatten(1).float()
        areas, rows = flat.sum(1), []
        for part in pred.split(MASKS_AT_ONCE):
            own = part.flatten(1).float()
            inner = own @ flat.T
            outer = own.sum(1)[:, None] + areas[None] - inner
            rows.append(torch.where(outer > 0, inner / outer.clamp_min(1), torch.ones_like(outer)))
    return torch.cat(rows) if rows else flat.new_zeros(0, len(flat))


def own_image_only(table: torch.Tensor, regions: torch.Tensor, region_image: torch.Tensor) -> torch.Tensor:
    """Return an IoU table (R, N) with NaN where region n lies on another image than region ``regions[r]``."""
    images = region_image.to(table.device)
    return table.masked_fill(images[regions.to(table.device)][:, None] != images[None], float("nan"))


def own_and_margin(table: torch.Tensor, regions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the IoU (R,) of each caption's mask with its own region, and that minus the best of the other regions.

    Args:
        table: (R, N) float, the IoU of each caption's mask with every region; NaN for regions of other images.
        regions: (R,) int64, the region of each caption.

    Returns:
        Both (R,); the margin is in -1..1, NaN where the image has no other region.
    """
    import torch

    own = table.gather(1, regions[:, None])[:, 0]
    is_own = torch.zeros_like(table, dtype=torch.bool).scatter(1, regions[:, None], True)
    others = table.masked_fill(is_own | table.isnan(), float("-inf"))
    best = others.amax(1) if table.shape[1] else table.new_zeros(len(table))
    return own, torch.where(best.isinf(), float("nan"), own - best)


def ratio(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the two halves of an average, as the numbers of a step hold them until ranks are summed."""
    return {f"{name}/sum": float(sum(values)), f"{name}/count": float(len(values))}

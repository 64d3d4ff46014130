"""The loss functions, and the points at which masks are compared: pure functions of tensors.

No function here divides by the size of its batch. The trainer adds the sums and the counts over micro-batches and
ranks and divides once, so the way in which a global batch is split cannot change the gradient.

All arithmetic is float32 whatever the dtype of the logits (bfloat16 has 8 bits of mantissa, too few for a sum over
65,536 pixels); float64 inputs stay float64, which the finite-difference tests use.

Sources: soft dice, V-Net (1606.04797); weights and epsilon, Sa2VA (2501.04001); points, PointRend (1912.08193), as
Mask2Former (2112.01527) and Sa2VA use it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dual_loop.errors import explain
from dual_loop.types import LossTerm

IGNORE_INDEX = -100
LOGITS_AT_ONCE = 1024
"""Positions whose vocabulary logits exist at once: 1024 x 151,674 x 4 bytes are 0.6 GB."""


def mask_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sigmoid cross-entropy of N objects, the mean over the pixels (or points) of each: (N,) float.

    Args:
        logits: (N, ...) float, any number of pixels or points.
        targets: the same shape, in 0..1 (fractional where read bilinearly), any dtype; gets no gradient.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape(logits, targets)
    logits = full_precision(logits)
    values = F.binary_cross_entropy_with_logits(logits, targets.detach().to(logits.dtype), reduction="none")
    return values.flatten(1).mean(dim=1)


def dice_loss(logits: torch.Tensor, targets: torch.Tensor, eps: float = 1.0) -> torch.Tensor:
    """Soft dice of N objects, ``1 - (2 sum(p t) + eps) / (sum p + sum t + eps)`` for each: (N,) in 0..1.

    First powers in the denominator (the "naive" dice of Sa2VA), not the squares of V-Net. Arguments, shapes and
    errors as in :func:`mask_cross_entropy`.
    """
    _check_same_shape(logits, targets)
    probabilities = full_precision(logits).sigmoid().flatten(1)
    targets = targets.detach().to(probabilities.dtype).flatten(1)
    overlap = (probabilities * targets).sum(dim=1)
    return 1.0 - (2.0 * overlap + eps) / (probabilities.sum(dim=1) + targets.sum(dim=1) + eps)


def sum_objects(per_object: torch.Tensor, weight: float, object_weights: torch.Tensor | None = None) -> LossTerm:
    """Return the weighted sum of a loss of N objects, and what it is to be divided by.

    Args:
        per_object: (N,) float.
        object_weights: (N,) factor of each object; the count is then their sum instead of N.

    Raises:
        ValueError: there is not one weight an object.
    """
    if object_weights is None:
        return LossTerm(per_object.sum() * weight, float(per_object.shape[0]))
    if object_weights.shape != per_object.shape:
        seen, expected = tuple(object_weights.shape), tuple(per_object.shape)
        raise ValueError(explain("one weight an object is needed", "object_weights", seen, expected))
    object_weights = object_weights.detach().to(per_object)
    return LossTerm((per_object * object_weights).sum() * weight, object_weights.sum())


def token_cross_entropy(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    chunk: int = LOGITS_AT_ONCE,
) -> torch.Tensor:
    """Cross-entropy of P tokens, summed; their logits never exist all at once.

    With more than one chunk the backward pass computes the logits of a chunk again: (chunk, V) float32 instead of
    (P, V) is kept at any time.

    Args:
        logits_of: (p, D) -> (p, V). hidden: (P, D) float.
        labels: (P,) int64, -100 where there is no loss; row p of ``hidden`` predicts ``labels[p]``.
        chunk: most positions at once.

    Returns:
        A scalar, a zero with graph where there is no token.
    """

    def part_total(part: torch.Tensor, part_labels: torch.Tensor) -> torch.Tensor:
        logits = full_precision(logits_of(part))
        return F.cross_entropy(logits, part_labels, ignore_index=IGNORE_INDEX, reduction="sum")

    if len(hidden) <= chunk:
        return part_total(hidden, labels)
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.stack([checkpoint(part_total, *part, use_reentrant=False) for part in parts]).sum()


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
    drawn, uniform = random.to(mask_logits.device).split([num_drawn, num_uniform], dim=1)
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
    grid = (2.0 * points - 1.0).to(dtype)
    sampled = F.grid_sample(maps.to(dtype)[:, None], grid[:, None], mode="bilinear", align_corners=False)
    return sampled[:, 0, 0]


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32; float64 stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_same_shape(first: torch.Tensor, second: torch.Tensor) -> None:
    if first.shape != second.shape:
        seen, expected = tuple(second.shape), tuple(first.shape)
        raise ValueError(explain("prediction and target differ in shape", "", seen, expected))

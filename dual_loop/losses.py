"""The loss functions: pure functions of tensors.

No function here divides by the size of its batch. The trainer adds the sums and the counts over micro-batches and
ranks and divides once, so the way in which a global batch is split cannot change the gradient.

All arithmetic is float32 whatever the dtype of the logits (bfloat16 has 8 bits of mantissa, too few for a sum over
65,536 pixels); float64 inputs stay float64, which the finite-difference tests use.

Sources: soft dice, V-Net (1606.04797); weights and epsilon, Sa2VA (2501.04001).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dual_loop.errors import explain
from dual_loop.types import LossTerm

T = TypeVar("T")

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
    check_same_shape(logits, targets)
    logits = full_precision(logits)
    values = F.binary_cross_entropy_with_logits(logits, targets.detach().to(logits.dtype), reduction="none")
    return values.flatten(1).mean(dim=1)


def dice_loss(logits: torch.Tensor, targets: torch.Tensor, eps: float = 1.0) -> torch.Tensor:
    """Soft dice of N objects, ``1 - (2 sum(p t) + eps) / (sum p + sum t + eps)`` for each: (N,) in 0..1.

    First powers in the denominator (the "naive" dice of Sa2VA), not the squares of V-Net. Arguments, shapes and
    errors as in :func:`mask_cross_entropy`.
    """
    check_same_shape(logits, targets)
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


def map_chunks(function: Callable[..., T], *tensors: torch.Tensor, chunk: int = LOGITS_AT_ONCE) -> list[T]:
    """Return what ``function`` makes of each part of ``tensors``, which are split alike along their first dimension.

    With more than one part, what it keeps for the backward pass is let go and computed again there: vocabulary logits
    of one part, (chunk, V) float32 instead of (P, V), exist at any time.
    """
    parts = list(zip(*(tensor.split(chunk) for tensor in tensors), strict=True))
    if len(parts) == 1:
        return [function(*parts[0])]
    return [checkpoint(function, *part, use_reentrant=False) for part in parts]


def token_cross_entropy(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    chunk: int = LOGITS_AT_ONCE,
) -> torch.Tensor:
    """Cross-entropy of P tokens, summed; their logits never exist all at once (:func:`map_chunks`).

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

    return torch.stack(map_chunks(part_total, hidden, labels, chunk=chunk)).sum()


def divergence(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of P distributions over V words from others, exact: (P,) in nats.

    Its gradient is the exact one at these places. That the places themselves, which were sampled, would come more or
    less often is no part of it.

    Args:
        log_probs: (P, V) float, normalised, with graph. reference: (P, V) float, normalised.
    """
    own = full_precision(log_probs)
    return (own.exp() * (own - reference.detach().to(own))).sum(-1)


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32; float64 stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_same_shape(first: torch.Tensor, second: torch.Tensor) -> None:
    """Raise a ValueError where a prediction and its target differ in shape."""
    if first.shape != second.shape:
        seen, expected = tuple(second.shape), tuple(first.shape)
        raise ValueError(explain("prediction and target differ in shape", "", seen, expected))

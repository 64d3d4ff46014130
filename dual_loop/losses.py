"""The loss functions: pure functions of tensors, each returning a weighted sum and a count.

No function here divides by the size of its batch. The trainer adds the sums and the counts over micro-batches and
ranks and divides once, so the way in which a global batch is split cannot change the gradient.

All arithmetic is float32 whatever the dtype of the logits (bfloat16 has 8 bits of mantissa, too few for a sum over
65,536 pixels); float64 inputs stay float64, which the finite-difference tests use.

Sources: soft dice, V-Net (1606.04797); uncertain-point sampling, PointRend (1912.08193) as used by Mask2Former
(2112.01527); weights, epsilon and point counts, Sa2VA (2501.04001).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dual_loop.config import LossConfig
from dual_loop.errors import explain
from dual_loop.types import LossTerm

IGNORE_INDEX = -100

# The original reduction adds these to its divisors; they matter only for parity with published loss values.
_ORIGINAL_AVERAGE_OFFSET = 1e-4
_ORIGINAL_EPSILON = torch.finfo(torch.float32).eps


def mask_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: float = 2.0,
    object_weights: torch.Tensor | None = None,
) -> LossTerm:
    """Sigmoid cross-entropy: the mean over the pixels (or points) of each object, summed over objects.

    Args:
        logits: (N, ...) float, N objects with any number of pixels or points.
        targets: the same shape, in 0..1 (fractional where read bilinearly), any dtype; gets no gradient.
        weight: factor of the whole term.
        object_weights: (N,) factor of each object; the count is then their sum instead of N.

    Raises:
        ValueError: the shapes differ.
    """
    return _sum_objects(_cross_entropy_per_object(logits, targets), weight, object_weights)


def dice_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: float = 0.5,
    eps: float = 1.0,
    object_weights: torch.Tensor | None = None,
) -> LossTerm:
    """Soft dice, ``1 - (2 sum(p t) + eps) / (sum p + sum t + eps)`` for each object, summed over objects.

    First powers in the denominator (the "naive" dice of Sa2VA), not the squares of V-Net. Arguments, shapes and
    errors as in :func:`mask_cross_entropy`.
    """
    return _sum_objects(_dice_per_object(logits, targets, eps), weight, object_weights)


def mask_losses(
    mask_logits: torch.Tensor,
    target_masks: torch.Tensor,
    seeds: torch.Tensor,
    config: LossConfig,
    point_coords: torch.Tensor | None = None,
    object_weights: torch.Tensor | None = None,
) -> dict[str, LossTerm]:
    """Return the terms ``mask_loss`` and ``dice_loss`` of N objects.

    Args:
        mask_logits: (N, Q, Q) float.
        target_masks: (N, Q, Q) bool, uint8 or float in 0..1.
        seeds: (N,) int64, the seed of the points of each object.
        config: weights and point sampling; ``num_points`` 0 compares all pixels, else so many sampled points.
        point_coords: (N, P, 2) points (x, y) in 0..1 to use instead of sampling, whatever ``num_points`` says.
        object_weights: (N,) factor of each object; the counts are then their sum.

    Returns:
        Both terms count objects. With N == 0 both are a zero that is connected to ``mask_logits`` and count 0.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_same_shape(mask_logits, target_masks)
    if mask_logits.shape[0] == 0:
        zero = mask_logits.sum() * 0.0
        return {"mask_loss": LossTerm(zero, 0.0), "dice_loss": LossTerm(zero, 0.0)}
    if point_coords is None and config.num_points > 0:
        point_coords = sample_points(
            mask_logits, seeds, config.num_points, config.oversample_ratio, config.importance_sample_ratio
        )
    logits, targets = mask_logits, target_masks
    if point_coords is not None:
        logits, targets = point_sample(mask_logits, point_coords), point_sample(target_masks, point_coords)
    return {
        "mask_loss": mask_cross_entropy(logits, targets, config.mask_weight, object_weights),
        "dice_loss": dice_loss(logits, targets, config.dice_weight, object_weights=object_weights),
    }


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
        mask_logits: (N, Q, Q) float.
        seeds: (N,) int64.
        num_points: P, at least 1.
        oversample_ratio: at least 1.
        importance_sample_ratio: 0..1.

    Returns:
        (N, P, 2) float32, (x, y) in 0..1, on the device of ``mask_logits``; no gradient.

    Raises:
        ValueError: an argument is out of range or the number of seeds is not N.
    """
    num_objects = mask_logits.shape[0]
    num_drawn, num_uncertain = _split_points(num_points, oversample_ratio, importance_sample_ratio)
    if seeds.shape != (num_objects,):
        raise ValueError(explain("one seed an object is needed", "sample_points", tuple(seeds.shape), (num_objects,)))
    num_uniform = num_points - num_uncertain
    random = torch.empty(num_objects, num_drawn + num_uniform, 2)
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
    if maps.shape[0] == 0:
        return _full_precision(maps).new_zeros(0, points.shape[1]) + maps.sum() * 0.0
    values = _full_precision(maps)
    grid = (2.0 * points - 1.0).to(values.dtype)
    sampled = F.grid_sample(values[:, None], grid[:, None], mode="bilinear", align_corners=False)
    return sampled[:, 0, 0]


def token_cross_entropy_from_positions(logits: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> LossTerm:
    """Cross-entropy of P tokens whose logits were already gathered, summed over tokens.

    Args:
        logits: (P, V) float, row p predicts ``labels[p]``.
        labels: (P,) int64, -100 where there is no loss.
        weight: factor of the whole term.

    Returns:
        Count: the number of labels that are not -100. No token at all gives a zero with graph and count 0.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        seen = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
        raise ValueError(explain("token logits and labels do not fit", seen=seen, expected="(P, V) and (P,)"))
    total = F.cross_entropy(_full_precision(logits), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return LossTerm(total * weight, float((labels != IGNORE_INDEX).sum()))


def chunked_token_cross_entropy(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    chunk: int,
    weight: float = 1.0,
) -> LossTerm:
    """Cross-entropy of P tokens whose logits never exist all at once; else as the function above.

    With more than one chunk the backward pass computes the logits of a chunk again: (chunk, V) float32 instead of
    (P, V) is kept at any time.

    Args:
        logits_of: (p, D) -> (p, V).
        hidden: (P, D) float.
        labels: (P,) int64.
        chunk: most positions at once; 0 takes all.
        weight: factor of the whole term.
    """
    if chunk == 0 or len(hidden) <= chunk:
        return token_cross_entropy_from_positions(logits_of(hidden), labels, weight)

    def part_total(part: torch.Tensor, part_labels: torch.Tensor) -> torch.Tensor:
        return token_cross_entropy_from_positions(logits_of(part), part_labels, weight).total

    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    totals = [checkpoint(part_total, *part, use_reentrant=False) for part in parts]
    return LossTerm(torch.stack(totals).sum(), float((labels != IGNORE_INDEX).sum()))


def shifted_token_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weight: float = 1.0) -> LossTerm:
    """Next-token cross-entropy: position l predicts label l + 1, summed over tokens.

    Only the positions that carry loss are turned to float32, since (R, L, V) in float32 is often the largest tensor
    of a training step.

    Args:
        logits: (R, L, V) float.
        labels: (R, L) int64, -100 where there is no loss; the first label of a row is never predicted.
        weight: factor of the whole term.

    Returns:
        Count: the number of predicted tokens, over all rows together (not a mean of row means).

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        seen = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
        raise ValueError(explain("token logits and labels do not fit", seen=seen, expected="(R, L, V) and (R, L)"))
    following = labels[:, 1:]
    has_loss = following != IGNORE_INDEX
    return token_cross_entropy_from_positions(logits[:, :-1][has_loss], following[has_loss], weight)


def policy_loss(log_probs: torch.Tensor, advantages: torch.Tensor, weight: float = 1.0) -> LossTerm:
    """Score-function loss of sampled tokens: ``-sum(A * log p)``, whose gradient raises what earned an advantage.

    REINFORCE with one update a roll-out: the importance ratio of PPO and GRPO is 1, so there is nothing to clip. The
    average is over tokens, as in DAPO (2503.14476), not over sequences first.

    Args:
        log_probs: (P,) float, log-probability of each sampled token, with graph.
        advantages: (P,) float, that of the token's caption; gets no gradient.
        weight: factor of the whole term.

    Returns:
        Count: P. No token at all gives a zero with graph.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape(log_probs, advantages)
    values = _full_precision(log_probs)
    total = -(values * advantages.detach().to(values)).sum()
    return LossTerm(total * weight, float(log_probs.numel()))


def kl_divergence(log_probs: torch.Tensor, reference_log_probs: torch.Tensor, weight: float = 1.0) -> LossTerm:
    """Divergence from a reference at sampled tokens: ``exp(r - p) - (r - p) - 1``, summed.

    The estimator called k3 (J. Schulman, "Approximating KL divergence", 2020): never negative, exactly 0 where both
    agree, unbiased for samples of the policy. Exponents are cut at 20, where float32 still holds the square.

    Args:
        log_probs: (P,) float, with graph. reference_log_probs: (P,) float, without.
        weight: factor of the whole term.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape(log_probs, reference_log_probs)
    values = _full_precision(log_probs)
    difference = (reference_log_probs.detach().to(values) - values).clamp(max=20.0)
    return LossTerm((difference.exp() - difference - 1.0).sum() * weight, float(log_probs.numel()))


def distillation_loss(
    mask_logits: torch.Tensor,
    teacher_probabilities: torch.Tensor,
    object_weights: torch.Tensor,
    weight: float = 1.0,
    confidence: float = 0.0,
) -> LossTerm:
    """Divergence of a student's masks from a teacher's soft ones: the mean over sure pixels, summed over objects.

    Args:
        mask_logits: (N, Q, Q) float, the student's, with graph.
        teacher_probabilities: (N, Q, Q) float in 0..1, without.
        object_weights: (N,) factor of each object; the count is their sum.
        weight: factor of the whole term.
        confidence: pixels count where the teacher's ``|2p - 1|`` is at least this much. An object without any such
            pixel adds 0, and is counted.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape(mask_logits, teacher_probabilities)
    logits, targets = _full_precision(mask_logits), teacher_probabilities.detach().to(torch.float32)
    targets = targets.to(logits.dtype)
    entropy = -(torch.xlogy(targets, targets) + torch.xlogy(1 - targets, 1 - targets))
    values = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") - entropy
    is_sure = ((2 * targets - 1).abs() >= confidence).to(logits.dtype)
    per_object = (values * is_sure).flatten(1).sum(1) / is_sure.flatten(1).sum(1).clamp_min(1.0)
    return _sum_objects(per_object, weight, object_weights)


def latent_alignment(
    seg_embeds: torch.Tensor,
    target_embeds: torch.Tensor,
    weight: float = 1.0,
    object_weights: torch.Tensor | None = None,
) -> LossTerm:
    """Mean squared error between prompt embeddings and their targets: mean over C, summed over objects.

    Args:
        seg_embeds: (N, C) float.
        target_embeds: (N, C) float, a fixed target: it gets no gradient.
        weight: factor of the whole term.
        object_weights: (N,) factor of each object; the count is then their sum instead of N.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape(seg_embeds, target_embeds)
    difference = _full_precision(seg_embeds) - _full_precision(target_embeds.detach())
    return _sum_objects(difference.square().mean(dim=1), weight, object_weights)


def original_mask_losses(
    mask_logits: torch.Tensor,
    target_masks: torch.Tensor,
    config: LossConfig,
    point_coords: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return ``loss_mask`` and ``loss_dice`` as the original Sa2VA code averages them over one batch.

    For comparison with published values only. Over all pixels the averages are plain means. Over points the original
    divides dice by ``N + 1e-4`` and cross-entropy by ``N * P + 1e-4``, and adds the float32 machine epsilon to both.

    Args:
        mask_logits: (N, Q, Q) float, N >= 1.
        target_masks: (N, Q, Q) in 0..1.
        config: the weights.
        point_coords: (N, P, 2) points (x, y) in 0..1, None for all pixels.
    """
    if point_coords is None:
        entropy = _cross_entropy_per_object(mask_logits, target_masks)
        dice = _dice_per_object(mask_logits, target_masks)
        return {"loss_mask": entropy.mean() * config.mask_weight, "loss_dice": dice.mean() * config.dice_weight}
    logits, targets = point_sample(mask_logits, point_coords), point_sample(target_masks, point_coords)
    num_objects, num_points = logits.shape
    entropy_sum = _cross_entropy_per_object(logits, targets).sum() * num_points
    dice_sum = _dice_per_object(logits, targets).sum()
    entropy_divisor = num_objects * num_points + _ORIGINAL_AVERAGE_OFFSET + _ORIGINAL_EPSILON
    dice_divisor = num_objects + _ORIGINAL_AVERAGE_OFFSET + _ORIGINAL_EPSILON
    return {
        "loss_mask": entropy_sum / entropy_divisor * config.mask_weight,
        "loss_dice": dice_sum / dice_divisor * config.dice_weight,
    }


def _cross_entropy_per_object(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(N, ...) logits and targets -> (N,) mean cross-entropy."""
    _check_same_shape(logits, targets)
    logits = _full_precision(logits)
    values = F.binary_cross_entropy_with_logits(logits, targets.detach().to(logits.dtype), reduction="none")
    return values.flatten(1).mean(dim=1)


def _dice_per_object(logits: torch.Tensor, targets: torch.Tensor, eps: float = 1.0) -> torch.Tensor:
    """(N, ...) logits and targets -> (N,) dice loss in 0..1."""
    _check_same_shape(logits, targets)
    probabilities = _full_precision(logits).sigmoid().flatten(1)
    targets = targets.detach().to(probabilities.dtype).flatten(1)
    overlap = (probabilities * targets).sum(dim=1)
    return 1.0 - (2.0 * overlap + eps) / (probabilities.sum(dim=1) + targets.sum(dim=1) + eps)


def _sum_objects(per_object: torch.Tensor, weight: float, object_weights: torch.Tensor | None) -> LossTerm:
    if object_weights is None:
        return LossTerm(per_object.sum() * weight, float(per_object.shape[0]))
    if object_weights.shape != per_object.shape:
        seen, expected = tuple(object_weights.shape), tuple(per_object.shape)
        raise ValueError(explain("one weight an object is needed", "object_weights", seen, expected))
    object_weights = object_weights.detach().to(per_object)
    return LossTerm((per_object * object_weights).sum() * weight, float(object_weights.sum()))


def _split_points(num_points: int, oversample_ratio: float, importance_sample_ratio: float) -> tuple[int, int]:
    """Return how many points are drawn to choose from, and how many uncertain ones are chosen."""
    if num_points < 1 or oversample_ratio < 1 or not 0 <= importance_sample_ratio <= 1:
        seen = f"num_points {num_points}, oversample {oversample_ratio}, importance {importance_sample_ratio}"
        raise ValueError(explain("point sampling is out of range", "sample_points", seen, "P >= 1, >= 1, 0..1"))
    return int(num_points * oversample_ratio), int(num_points * importance_sample_ratio)


def _full_precision(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_same_shape(first: torch.Tensor, second: torch.Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(
            explain("prediction and target differ in shape", seen=tuple(second.shape), expected=tuple(first.shape))
        )

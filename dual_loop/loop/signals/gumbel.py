"""Straight-through Gumbel captions: discrete in the forward pass, with a gradient to the logits that chose them.

Sources: Gumbel-softmax and Concrete (1611.01144, 1611.00712), straight-through captions for a listener (1706.01554,
PSST 1907.11565), noise conditioned on what was sampled (REBAR 1703.07370, RELAX 1711.00123). Differs from those: the
tokens were sampled before, in a batched roll-out without graph, so the noise is drawn from its posterior given the
token instead of being remembered; and gradient reaches only the most likely tokens besides the sampled one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dual_loop.errors import explain

_TINY = 1e-12


def conditioned_perturbation(logits: Tensor, chosen: Tensor, uniform: Tensor) -> Tensor:
    """Return logits plus Gumbel noise, the noise drawn from its posterior given which entry is the largest.

    With normalised logits the largest of all perturbed logits is Gumbel(0) distributed whichever entry it is, and the
    others are Gumbel variables truncated at it. The noise is a constant: gradient flows as through ``logits + noise``.

    Args:
        logits: (P, V') float.
        chosen: (P,) int64, the entry whose perturbed logit must be the largest.
        uniform: (P, V') float in 0..1, random.

    Returns:
        (P, V') float32.
    """
    log_probs = logits.float().log_softmax(-1)
    exponential = -torch.log(uniform.float().clamp(_TINY, 1.0 - 1e-7))
    largest = exponential.gather(1, chosen[:, None])
    with torch.no_grad():
        # -log(E_j / p_j + E_i) for the others, -log(E_i) for the chosen one.
        others = -torch.logaddexp(exponential.log() - log_probs, largest.log())
        perturbed = others.scatter(1, chosen[:, None], -largest.log())
        noise = perturbed - log_probs
    return log_probs + noise


def straight_through_weights(
    logits: Tensor, token_ids: Tensor, uniform: Tensor, temperature: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """Return the tokens that gradient reaches at each position and their straight-through weights.

    Args:
        logits: (P, V) float, with graph.
        token_ids: (P,) int64, the sampled tokens.
        uniform: (P, top_k + 1) float in 0..1, random.
        temperature: of the softmax over perturbed logits, above 0.
        top_k: how many of the most likely other tokens take part.

    Returns:
        ids: (P, k + 1) int64, the sampled token first; k is ``top_k``, or V - 1 where that is less.
        weights: (P, k + 1) float32: 1 for the sampled token and 0 for the others, exactly; the gradient is that of
        the softmax.

    Raises:
        ValueError: the temperature or the number of random numbers is wrong.
    """
    num_others = min(top_k, logits.shape[1] - 1)
    if temperature <= 0 or uniform.shape[1] < num_others + 1:
        seen = f"temperature {temperature}, uniform {tuple(uniform.shape)}"
        raise ValueError(explain("straight-through weights", seen=seen, expected=f"> 0 and (P, {num_others + 1})"))
    with torch.no_grad():
        without = logits.detach().float().scatter(1, token_ids[:, None], float("-inf"))
        ids = torch.cat([token_ids[:, None], without.topk(num_others, dim=1).indices], dim=1)
    first = torch.zeros_like(token_ids)
    perturbed = conditioned_perturbation(logits.gather(1, ids), first, uniform[:, : num_others + 1])
    soft = (perturbed / temperature).softmax(-1)
    hard = torch.zeros_like(soft)
    hard[:, 0] = 1.0
    return ids, hard + (soft - soft.detach())


def soft_embeddings(table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums of embedding rows: table (V, D), ids and weights (P, k) -> (P, D) in the table's dtype.

    The table gets no gradient.
    """
    rows = table.detach()[ids]
    return torch.as_tensor((weights[..., None] * rows.float()).sum(1).to(table.dtype))


def temperature_at(progress: float, start: float, end: float) -> float:
    """Return the temperature after a share ``progress`` (0..1) of the run: geometric from ``start`` to ``end``."""
    return float(start * (end / start) ** min(max(progress, 0.0), 1.0))

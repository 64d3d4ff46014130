"""How a token is drawn on the device: random numbers without a generator, and the likeliest tokens alone."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top(logits: Tensor, top_p: Tensor) -> Tensor:
    """Set logits (R, V) to minus infinity but for the likeliest tokens, whose probability together reaches ``top_p``.

    ``top_p``: (R, 1) above 0; the likeliest token always stays.
    """
    ordered, index = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(-1)
    if torch.are_deterministic_algorithms_enabled():
        # Floating sums over many threads are refused on GPUs; whole numbers have one sum in any order.
        probability = (probability.double() * 2.0**40).long()
        top_p = top_p * 2.0**40
    better = probability.cumsum(-1) - probability  # of all tokens before this one
    return torch.empty_like(logits).scatter_(1, index, ordered.masked_fill(better >= top_p, float("-inf")))


def uniform_noise(seeds: Tensor, number: Tensor, size: int) -> Tensor:
    """Return random numbers (R, size) float32 inside 0..1 that depend on row, draw and place alone: no generator.

    The bits are those of Chris Wellons's 32-bit integer hash "lowbias32" over seed, draw and place.

    Args:
        seeds: (R,) int64. number: (1,) int64, which draw it is. size: V.
    """

    def mixed(bits: Tensor) -> Tensor:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
            # int32 has no logical shift: the bits that a negative number shifts in are cut off.
            bits = (bits ^ ((bits >> shift) & (2 ** (32 - shift) - 1))) * factor
        return bits

    halves = seeds & 0x7FFFFFFF, (seeds >> 31 ^ seeds >> 62) & 0x7FFFFFFF
    low, high, draw = (part.to(torch.int32) for part in (*halves, number))
    key = mixed(mixed(low) ^ mixed(high + 0x3C6EF372) ^ mixed(draw + 0x1E3779B9))
    place = mixed(torch.arange(1, size + 1, dtype=torch.int32, device=seeds.device))
    # 23 bits, so that neither 0 nor 1 is rounded to.
    return (((mixed(key[:, None] ^ place) >> 9) & 0x7FFFFF).float() + 0.5) * 2.0**-23

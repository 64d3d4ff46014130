"""Intervals of figures by the bootstrap."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from dual_loop.errors import explain

# Resamples are drawn in pieces of about this many numbers, to bound the memory on large splits.
_MAX_DRAWS_AT_ONCE = 4_000_000


def paired_bootstrap(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    num_resamples: int = 10000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, float]:
    """Return the mean of ``after - before`` and its 95 % interval by the percentile bootstrap (Efron 1979).

    Args:
        before, after: (N,) a score of the same N items, finite.
        num_resamples: at least 1.
        seed: fixes the result.
        groups: N labels, such as image names. Whole groups are then drawn, because regions of one image are not
            independent and drawing them singly would make the interval too narrow.

    Returns:
        ``{"mean", "ci95_low", "ci95_high"}``. With a single item or group the interval has no width.

    Raises:
        ValueError: lengths differ, or as :func:`bootstrap_ratio`.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        seen = f"shapes {first.shape} and {second.shape}"
        raise ValueError(explain("scores cannot be paired", "paired_bootstrap", seen, "N scores each"))
    differences, labels = second - first, range(len(first)) if groups is None else groups
    low, high = bootstrap_ratio(differences, np.ones_like(differences), labels, num_resamples, seed)
    return {"mean": float(differences.mean()), "ci95_low": low, "ci95_high": high}


def bootstrap_ratio(
    numerators: npt.ArrayLike,
    denominators: npt.ArrayLike,
    groups: Sequence[Hashable],
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % interval of ``sum(numerators) / sum(denominators)`` by the percentile bootstrap over groups.

    With denominators of 1 it is the interval of a mean; with intersections and unions that of cIoU. A resample whose
    denominators sum to 0 counts 1, as two empty masks do.

    Args:
        numerators, denominators: (N,) finite numbers.
        groups: N labels, such as image names; whole groups are drawn.
        num_resamples: at least 1.
        seed: fixes the result.

    Raises:
        ValueError: nothing is given, lengths differ, a number is not finite, or no resample is asked for.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    is_fit = top.shape == bottom.shape == (len(groups),) and len(groups) > 0
    if not is_fit or not np.isfinite([top, bottom]).all() or num_resamples < 1:
        seen = f"shapes {top.shape} and {bottom.shape}, {len(groups)} groups, {num_resamples} resamples"
        expected = "N finite values each, N >= 1, and 1 resample or more"
        raise ValueError(explain("a ratio cannot be resampled", "bootstrap_ratio", seen, expected))
    numbers: dict[Hashable, int] = {}
    group_of_item = np.array([numbers.setdefault(label, len(numbers)) for label in groups])
    tops = np.bincount(group_of_item, weights=top, minlength=len(numbers))
    bottoms = np.bincount(group_of_item, weights=bottom, minlength=len(numbers))
    generator, ratios = np.random.default_rng(seed), np.empty(num_resamples)
    piece = max(1, _MAX_DRAWS_AT_ONCE // len(numbers))
    for start in range(0, num_resamples, piece):
        stop = min(start + piece, num_resamples)
        drawn = generator.integers(len(numbers), size=(stop - start, len(numbers)))
        sums = bottoms[drawn].sum(axis=1)
        ratios[start:stop] = np.where(sums > 0, tops[drawn].sum(axis=1) / np.where(sums > 0, sums, 1.0), 1.0)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)

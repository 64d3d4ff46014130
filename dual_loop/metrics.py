"""Measures of masks and captions: pure functions.

Conventions, since published code differs in each of them:

* **IoU of two empty masks is 1**, as in LISA and GRES; such a pair adds nothing to the sums of cIoU.
* **gIoU** is the mean of the IoUs (mIoU in older papers, not the "generalised IoU" of boxes).
* **cIoU** is the sum of intersections over the sum of unions (oIoU in older papers); it favours large objects.
* **Pr@t** is the share of IoUs that are ``>= t``.

All are fractions of 1, not per cent. LISA: 2308.00692; GRES: 2306.00968.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from dual_loop.errors import explain

if TYPE_CHECKING:
    import torch

MASKS_AT_ONCE = 64

PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)

# Resamples are drawn in pieces of about this many numbers, to bound the memory on large splits.
_MAX_DRAWS_AT_ONCE = 4_000_000

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
        raise ValueError(
            explain("masks are not boolean", "mask_overlap", dtypes, "bool", "compare with a threshold first")
        )
    return (pred & target).sum((1, 2)), (pred | target).sum((1, 2))


def iou(intersection: npt.ArrayLike, union: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return intersections over unions, elementwise; 1 where the union is 0.

    Division rounds correctly, so an IoU of exactly 3/5 equals the literal 0.6.
    """
    inner, outer = np.asarray(intersection, np.float64), np.asarray(union, np.float64)
    return np.where(outer > 0, inner / np.maximum(outer, 1), 1.0)


def iou_table(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the IoU of every pair of masks: (R, H, W) and (N, H, W) bool -> (R, N) float32; 1 for two empty masks.

    Areas are exact up to 2^24 pixels. Masks are compared :data:`MASKS_AT_ONCE` rows at a time.
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


def normalise_caption(text: str) -> str:
    """Return ``text`` in lower case, with single spaces, without white space at the ends and full stops at the end."""
    return " ".join(text.lower().split()).rstrip(" .")


def caption_exact(caption: str, references: Sequence[str]) -> bool:
    """Whether ``caption`` equals one of ``references``, both normalised with :func:`normalise_caption`.

    Raises:
        ValueError: there is no reference, so the question has no answer; leave such regions out of the average.
    """
    if isinstance(references, str) or not references:
        raise ValueError(explain("captions are needed to compare with", "caption_exact", repr(references), "a list"))
    return normalise_caption(caption) in {normalise_caption(reference) for reference in references}


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
        ValueError: lengths differ, nothing is given, or a score is not finite.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    labels: Sequence[Hashable] = range(len(first)) if groups is None else groups
    if first.ndim != 1 or first.shape != second.shape or len(labels) != len(first) or not len(first):
        seen = f"shapes {first.shape} and {second.shape}, {len(labels)} groups"
        raise ValueError(explain("scores cannot be paired", "paired_bootstrap", seen, "N scores each, N >= 1"))
    differences = second - first
    if not np.isfinite(differences).all() or num_resamples < 1:
        seen = f"{int((~np.isfinite(differences)).sum())} not finite, num_resamples {num_resamples}"
        raise ValueError(explain("the bootstrap needs finite scores and at least one resample", seen=seen))
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
        ValueError: nothing is given, or lengths differ.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if top.ndim != 1 or top.shape != bottom.shape or len(groups) != len(top) or not len(top):
        seen = f"shapes {top.shape} and {bottom.shape}, {len(groups)} groups"
        raise ValueError(explain("a ratio cannot be resampled", "bootstrap_ratio", seen, "N values each, N >= 1"))
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


def distinct_ngrams(texts: Sequence[str], length: int) -> float:
    """Return distinct n-grams over all n-grams of ``texts`` (distinct-n, 1510.03055): 0..1, 0 where there is none."""
    runs = []
    for text in texts:
        words = text.lower().split()
        runs += [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


METEOR_VARIANT = "meteor-exact-stem"
"""What :func:`meteor_exact_stem` is called wherever it is printed. It is not METEOR: figures of papers are not
comparable."""

_ALPHA, _BETA, _GAMMA, _STEM_WEIGHT = 0.85, 0.20, 0.60, 0.6
_BEAM = 32
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


def meteor_exact_stem(candidate: str, references: Sequence[str]) -> float:
    """Return the METEOR-type score of a caption against its references, 0..1, the best of them.

    METEOR 1.5 (Denkowski and Lavie, WMT 2014) with its English parameters (alpha 0.85, beta 0.20, gamma 0.60) and two
    of its four matchers: exact words (weight 1) and Snowball stems (weight 0.6). No synonyms, no paraphrases, and no
    discount for function words, so its values differ from those of the Java program. The alignment has the largest
    weight of matches and then the fewest chunks, found by a beam search of width 32.
    """
    words = _WORD.findall(candidate.lower())
    best = 0.0
    for reference in references:
        others = _WORD.findall(reference.lower())
        matched, matches, chunks = _align(words, others)
        if matches == 0:
            continue
        precision, recall = matched / len(words), matched / len(others)
        mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
        # One unbroken run over both whole texts is no fragmentation at all.
        whole = chunks == 1 and matches == len(words) == len(others)
        best = max(best, mean * (1 - (0.0 if whole else _GAMMA * (chunks / matches) ** _BETA)))
    return best


def _align(candidate: Sequence[str], reference: Sequence[str]) -> tuple[float, int, int]:
    """Return weight, number of matches and number of chunks of the best one-to-one alignment."""
    stem, stems = _stemmer(), [_stemmer()(word) for word in reference]
    options = [
        [(k, 1.0 if other == word else _STEM_WEIGHT) for k, other in enumerate(reference) if stems[k] == stem(word)]
        for word in candidate
    ]
    # State: weight, chunks, matches, positions used, position that the previous word matched (-2: none).
    beam: list[tuple[float, int, int, frozenset[int], int]] = [(0.0, 0, 0, frozenset(), -2)]
    for matches in options:
        grown = {(state[3], -2): (*state[:4], -2) for state in beam}
        for weight, chunks, count, used, last in beam:
            for position, gain in matches:
                if position not in used:
                    state = (weight + gain, chunks + (position != last + 1), count + 1, used | {position}, position)
                    key = (state[3], position)
                    if key not in grown or (state[0], -state[1]) > (grown[key][0], -grown[key][1]):
                        grown[key] = state
        beam = sorted(grown.values(), key=lambda s: (-s[0], s[1], sorted(s[3]), s[4]))[:_BEAM]
    weight, chunks, count = beam[0][:3]
    return weight, count, chunks


@functools.cache
def _stemmer() -> Callable[[str], str]:
    import snowballstemmer

    stem: Callable[[str], str] = snowballstemmer.stemmer("english").stemWord
    return functools.lru_cache(maxsize=65536)(stem)

"""What in an evaluation looks like cheating: plain messages, from the regions before and after training.

A loop can raise its own figures by a private code between captioner and segmenter. The weights that training started
from do not know that code; figures that rise with the own listener and fall with that one are no progress.
"""

from __future__ import annotations

from collections.abc import Sequence

from dual_loop.evaluation.evaluate import RegionResult, summarise
from dual_loop.metrics import paired_bootstrap

LEAST_RISE, LEAST_FALL = 0.02, 0.01
"""Points (of 1) by which the own listener must rise and the frozen one fall, both beyond chance."""
VOCABULARY_SHARE = 0.5
LENGTH_FACTOR = 2.0
EXACT_LOSS = 0.10


def find_flags(before: Sequence[RegionResult], after: Sequence[RegionResult]) -> list[str]:
    """Return one message for each thing that looks like cheating; none is a good sign, not a proof.

    Args:
        before, after: the same regions in the same order, measured with the starting weights and the trained ones.
    """
    old, new = summarise(before), summarise(after)
    checks = (_private_code(before, after), *_language(old, new))
    return [message for message in checks if message is not None]


def _private_code(before: Sequence[RegionResult], after: Sequence[RegionResult]) -> str | None:
    """Own cycle IoU rose and that of the frozen listener fell, both beyond chance (95 % interval by image)."""
    own = [(b.cycle_iou, a.cycle_iou) for b, a in zip(before, after, strict=True)]
    # Before training both listeners are the same weights.
    frozen = [(b.cycle_iou, a.frozen_iou) for b, a in zip(before, after, strict=True) if a.frozen_iou is not None]
    if len(frozen) != len(own) or not own:
        return None
    images = [result.image for result in before]
    rise = paired_bootstrap([b for b, _ in own], [a for _, a in own], groups=images)
    fall = paired_bootstrap([b for b, _ in frozen], [a for _, a in frozen], groups=images)
    if rise["mean"] < LEAST_RISE or fall["mean"] > -LEAST_FALL:
        return None
    if rise["ci95_low"] <= 0 or fall["ci95_high"] >= 0:
        return None
    return (
        f"private_code: cycle gIoU rose by {100 * rise['mean']:.1f} points with the own listener and fell by "
        f"{-100 * fall['mean']:.1f} with the frozen one"
    )


def _language(old: dict[str, float], new: dict[str, float]) -> list[str | None]:
    vocabulary = length = drift = None
    if new["vocabulary"] < VOCABULARY_SHARE * old["vocabulary"]:
        vocabulary = f"vocabulary_collapse: {new['vocabulary']:.0f} words in use, {old['vocabulary']:.0f} before"
    words, words_before = new["caption_words"], old["caption_words"]
    if words_before > 0 and not 1 / LENGTH_FACTOR <= words / words_before <= LENGTH_FACTOR:
        length = f"length_drift: {words:.1f} words a caption, {words_before:.1f} before"
    if new["caption_exact"] <= old["caption_exact"] - EXACT_LOSS:
        drift = f"language_drift: {new['caption_exact']:.1%} of captions exact, {old['caption_exact']:.1%} before"
    return [vocabulary, length, drift]

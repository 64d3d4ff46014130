"""What in an evaluation looks like cheating: plain messages, from the regions before and after training.

A loop can raise its own figures by a private code between captioner and segmenter. The weights that training started
from do not know that code; figures that rise with the own listener and fall with that one are no progress.

Greedy captions of the start suit its own listener best, so a change of a few words loses something with it, without any
code. How much, the captions show that the start samples at temperature 1 of the same regions: a fall is flagged where
it is larger than theirs beyond chance, paired by region.
"""

from __future__ import annotations

from collections.abc import Sequence

from dual_loop.evaluation.figures import cycle_gains, summarise
from dual_loop.evaluation.measure import MeasuredRegion

LEAST_RISE, LEAST_FALL = 0.02, 0.01
"""Points (of 1) by which the own listener must rise and the frozen one fall, both beyond chance."""
VOCABULARY_SHARE = 0.5
LENGTH_FACTOR = 2.0
EXACT_LOSS = 0.10


def find_flags(before: Sequence[MeasuredRegion], after: Sequence[MeasuredRegion]) -> list[str]:
    """Return one message for each thing that looks like cheating; none is a good sign, not a proof.

    Both are the same regions in the same order, measured with the starting weights and the trained ones.
    """
    flags = []
    gains = cycle_gains(before, after) if after else {}
    if "cycle_gIoU_frozen" in gains:
        rise, fall = gains["cycle_gIoU"], gains["cycle_gIoU_frozen"]
        is_large = rise["mean"] >= LEAST_RISE and fall["mean"] <= -LEAST_FALL
        sampled, beyond = gains.get("cycle_gIoU_sampled"), gains.get("frozen_beyond_sampled", fall)
        if is_large and rise["ci95_low"] > 0 and max(fall["ci95_high"], beyond["ci95_high"]) < 0:
            text = f"private_code: cycle gIoU rose by {100 * rise['mean']:.1f} points with the own listener and fell "
            text += f"by {-100 * fall['mean']:.1f} with the frozen one"
            lost = f"; captions that the start samples lose {-100 * sampled['mean']:.1f}" if sampled else ""
            flags.append(text + lost)
    old, new = summarise(before), summarise(after)
    if new["vocabulary"] < VOCABULARY_SHARE * old["vocabulary"]:
        flags.append(f"vocabulary_collapse: {new['vocabulary']:.0f} words in use, {old['vocabulary']:.0f} before")
    words, words_before = new["caption_words"], old["caption_words"]
    if words_before > 0 and not 1 / LENGTH_FACTOR <= words / words_before <= LENGTH_FACTOR:
        flags.append(f"length_drift: {words:.1f} words a caption, {words_before:.1f} before")
    if new["caption_exact"] <= old["caption_exact"] - EXACT_LOSS:
        flags.append(f"language_drift: {new['caption_exact']:.1%} of captions exact, {old['caption_exact']:.1%} before")
    return flags

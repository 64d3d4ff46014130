"""The flags: each raised by its own case and by no other."""

from __future__ import annotations

import dataclasses

import pytest

from dual_loop.evaluation.cheating_flags import find_flags
from dual_loop.evaluation.figures import cycle_gains
from dual_loop.evaluation.measure import MeasuredRegion, SegmentedCaption, SegmentedSentence

WORDS = ("red circle", "blue star", "green moon", "pink flag", "grey cross", "white heart", "black cloud", "tan tree")


def regions(own: float, frozen: float | None = None, caption=None, exact: bool = True) -> list[MeasuredRegion]:
    found = []
    for number in range(24):
        shake = 0.01 * (number % 5)
        text = WORDS[number % len(WORDS)] if caption is None else caption
        given = MeasuredRegion(f"s/{number}#0", f"s/{number}", caption=text)
        given.references = [text if exact else "nothing like it"]
        given.sentences = [SegmentedSentence(text, 1, 50.0, 100.0)]
        given.cycle = SegmentedCaption(100 * (own + shake), 100.0)
        if frozen is not None:
            given.frozen = SegmentedCaption(100 * (frozen + shake), 100.0)
        found.append(given)
    return found


def names(before, after) -> list[str]:
    return [flag.split(":")[0] for flag in find_flags(before, after)]


def test_honest_gains_raise_no_flag():
    before = regions(0.5)
    for own, frozen in ((0.5, 0.5), (0.7, 0.55), (0.7, 0.495), (0.5, 0.3), (0.4, 0.4)):
        assert names(before, regions(own, frozen)) == [], (own, frozen)
    assert names(before, regions(0.9)) == [], "no frozen listener was asked"


def test_private_code():
    (flag,) = find_flags(regions(0.5), regions(0.7, 0.4))
    told = "cycle gIoU rose by 20.0 points with the own listener and fell by 10.0 with the frozen one"
    assert flag == f"private_code: {told}"
    gains = cycle_gains(regions(0.5), regions(0.7, 0.4))
    assert gains["cycle_gIoU"]["mean"] == pytest.approx(0.2)
    assert gains["cycle_gIoU_frozen"]["mean"] == pytest.approx(-0.1)
    assert set(cycle_gains(regions(0.5), regions(0.7))) == {"cycle_gIoU"}


def test_a_fall_no_larger_than_that_of_captions_which_the_start_samples_is_no_code():
    """A run that taught masks alone: few captions changed, each for a worse one, as samples of the start are."""
    before, after = regions(0.5), regions(0.65, 0.5)
    for number in (0, 4, 9, 14, 19):
        after[number].frozen = SegmentedCaption(20.0, 100.0)
    for number, region in enumerate(before):
        region.sampled = SegmentedCaption(15.0, 100.0) if number in (2, 6, 11, 16, 21) else region.cycle
    assert cycle_gains(before, after)["cycle_gIoU_frozen"]["mean"] < -0.03
    assert names(before, after) == []
    coded = regions(0.65, 0.3)
    (flag,) = find_flags(before, coded)
    assert flag.startswith("private_code: ")
    assert flag.endswith("; captions that the start samples lose 7.5")


def test_private_code_needs_more_than_chance():
    before, after = regions(0.5), regions(0.5, 0.4)
    for number, result in enumerate(after):
        # +3 points on average, by one region out of eight.
        result.cycle.intersection += 24.0 if number % 8 == 0 else 0.0
    few = slice(0, 8)
    assert names(before[few], after[few]) == []


def test_language_flags():
    before = regions(0.5)
    assert names(before, regions(0.5, 0.5, caption="red circle")) == ["vocabulary_collapse"]
    assert names(before, regions(0.5, 0.5, exact=False)) == ["language_drift"]
    long = [f"{one.caption} and {one.caption} again" for one in before]
    long = [dataclasses.replace(one, caption=text, references=[text]) for one, text in zip(before, long, strict=True)]
    assert names(before, long) == ["length_drift"]
    assert names(long, before) == ["length_drift"]

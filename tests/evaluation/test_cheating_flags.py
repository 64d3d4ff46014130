"""The frozen listener in the evaluation, and the flags: each raised by its own case and by no other."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dual_loop.evaluation.evaluate import RegionResult, evaluate_samples, summarise
from dual_loop.evaluation.cheating_flags import find_flags
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.ema import StartingWeights
from dual_loop.train_dual_loop import cycle_gains

from small_model import pair_samples, scene_samples, small_model

WORDS = ("red circle", "blue star", "green moon", "pink flag", "grey cross", "white heart", "black cloud", "tan tree")


def regions(own: float, frozen: float | None = None, caption=None, exact: bool = True) -> list[RegionResult]:
    found = []
    for number in range(24):
        shake = 0.01 * (number % 5)
        text = WORDS[number % len(WORDS)] if caption is None else caption
        given = RegionResult(f"s/{number}#0", f"s/{number}", text, exact, [50.0], [100.0], 100 * (own + shake), 100.0)
        if frozen is not None:
            given.frozen_intersection, given.frozen_union = 100 * (frozen + shake), 100.0
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


def test_private_code_needs_more_than_chance():
    before, after = regions(0.5), regions(0.5, 0.4)
    for number, result in enumerate(after):
        # +3 points on average, by one region out of eight.
        result.cycle_intersection += 24.0 if number % 8 == 0 else 0.0
    few = slice(0, 8)
    assert names(before[few], after[few]) == []


def test_language_flags():
    before = regions(0.5)
    assert names(before, regions(0.5, 0.5, caption="red circle")) == ["vocabulary_collapse"]
    assert names(before, regions(0.5, 0.5, exact=False)) == ["language_drift"]
    long = [dataclasses.replace(r, caption=f"{r.caption} and {r.caption} again") for r in before]
    assert names(before, long) == ["length_drift"]
    assert names(long, before) == ["length_drift"]


def test_the_frozen_listener_hears_the_same_captions():
    model, prompter, config = small_model()
    samples = [*scene_samples(2), *pair_samples(1)]
    starting = StartingWeights(trainable_parameters(model))
    alone = evaluate_samples(model, prompter, config, samples)
    same = evaluate_samples(model, prompter, config, samples, starting.swapped)
    assert [r.caption for r in alone] == [r.caption for r in same]
    assert all(r.frozen_iou == r.cycle_iou and r.frozen_uniqueness == r.uniqueness for r in same)
    assert all(r.frozen_iou is None for r in alone)
    assert same[-1].uniqueness is None, "a pair has one region"
    with torch.no_grad():
        for parameter in model.text_hidden_fcs.parameters():
            parameter.mul_(-1.0)
    moved = evaluate_samples(model, prompter, config, samples, starting.swapped)
    assert [r.frozen_iou for r in moved] == pytest.approx([r.cycle_iou for r in same])
    assert [r.cycle_iou for r in moved] != [r.cycle_iou for r in same]
    figures = summarise(moved)
    assert figures["cycle_gIoU_frozen"] == pytest.approx(summarise(same)["cycle_gIoU"])
    assert figures["vocabulary"] >= 1
    assert figures["caption_words"] > 0
    assert -1 <= figures["uniqueness"] <= 1


def test_results_of_older_runs_still_load():
    old = {"name": "a", "image": "i", "caption": "c", "exact": None, "intersection": [1.0], "union": [2.0]}
    result = RegionResult(**old, cycle_intersection=1.0, cycle_union=2.0)
    assert result.frozen_iou is None
    assert result.cycle_iou == 0.5

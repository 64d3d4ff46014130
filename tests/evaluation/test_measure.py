"""The measurer: saved masks, two listeners, rejected captions, and regions on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from squares import SIDE, square

from dual_loop.caption_metrics import may_hold
from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.masks import decode_rle
from dual_loop.data.prepare import resize_targets
from dual_loop.errors import SampleError
from dual_loop.evaluation.figures import cycle_gains, loop_figures, referring_figures, summarise
from dual_loop.evaluation.measure import (
    BestOf,
    MeasuredRegion,
    RegionMeter,
    compare_predictions,
    texts_without_target,
    undo_target_shift,
)
from dual_loop.evaluation.protocols import PRESETS, choose_protocol
from dual_loop.loop.gates import CaptionGates
from dual_loop.loop.scorer import Scorer
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.prompts import Prompter
from dual_loop.model.stored_weights import StartingWeights, StoredWeights, weights
from dual_loop.types import RegionSample, WrittenCaption

from small_model import pair_samples, scene_samples, small_model


def sample_of(masks: list[np.ndarray], captions: list[tuple[str, ...]]) -> RegionSample:
    names = tuple(str(k) for k in range(len(masks)))
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    return RegionSample("refcoco", "x", image, np.stack(masks), names, tuple(captions))


def test_saved_predictions_count_as_by_hand() -> None:
    """Two sentences of one region, one of another, one with no mask at all."""
    target, other = square((0, 0, 5, 4)), square((5, 5, 9, 10))  # 20 pixels each
    sample = sample_of([target, other, square((0, 6, 2, 8))], [("a", "b"), ("c",), ("d",)])
    half = square((0, 0, 5, 2))  # IoU 0.5
    shifted = square((5, 5, 9, 9))  # 16 of 20: IoU 0.8
    saved = {
        "refcoco/x#0": [encode_rle(half), encode_rle(target)],
        "refcoco/x#1": [encode_rle(shifted)],
    }
    records = compare_predictions(sample, "refcoco:val", saved)
    figures = referring_figures(records)
    assert figures["sentences"] == 4
    assert figures["gIoU"]["value"] == pytest.approx((0.5 + 1.0 + 0.8 + 0.0) / 4, abs=1e-15)
    assert figures["cIoU"]["value"] == pytest.approx((10 + 20 + 16 + 0) / (20 + 20 + 20 + 4), abs=1e-15)
    expected = {"Pr@0.5": 0.75, "Pr@0.6": 0.5, "Pr@0.7": 0.5, "Pr@0.8": 0.5, "Pr@0.9": 0.25}
    assert {name: figures[name]["value"] for name in expected} == expected
    assert figures["without_mask"]["value"] == 0.25


def test_ignored_pixels_are_in_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is the whole picture; what is ignored is in no intersection and in no union."""
    model, prompter, config = small_model()
    [sample] = scene_samples(1)
    ignored = np.zeros(sample.masks.shape[1:], bool)
    ignored[:20] = True
    targets = sample.masks & ~ignored
    sample = replace(sample, masks=targets, ignored=ignored, groups=("a",) * sample.num_regions)
    answers = [torch.ones(1, *[model.mask_size] * 2)] * sample.num_regions
    monkeypatch.setattr(Scorer, "segment", lambda *given, **options: answers)
    for region, target in zip(RegionMeter(model, prompter, config).measure([sample], "set"), targets, strict=True):
        assert region.group == "a"
        assert region.cycle is not None
        for answer in (region.cycle, *region.sentences):
            assert (answer.intersection, answer.union) == (target.sum(), (~ignored).sum())
    saved = {region: [encode_rle(np.ones_like(ignored))] for region in (f"{sample.source}/{sample.sample_id}#0",)}
    [first, *_] = compare_predictions(sample, "set", saved, [])
    assert first.sentences[0].union == (~ignored).sum()


def test_the_shift_of_targets_taken_at_corners_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that answers with the targets it was given reaches more of the masks they came from."""
    model, prompter, config = small_model()
    samples = scene_samples(3)
    targets = [resize_targets(own.masks, model.mask_size, "nearest").float() - 0.5 for own in samples]
    answers = [logits[None] for own in targets for logits in own]
    monkeypatch.setattr(Scorer, "segment", lambda *given, **options: answers)
    mean = {}
    for undo in (False, True):
        protocol = choose_protocol("sa2va", {"undo_target_shift": undo})
        assert protocol.name == ("sa2va*" if undo else "sa2va")
        regions = RegionMeter(model, prompter, config, protocol, ["referring"]).measure(samples, "refcoco:val")
        mean[undo] = np.mean([region.ious[0] for region in regions])
    assert mean[True] > mean[False] + 0.04


@pytest.mark.parametrize("size", [(128, 128), (40, 60), (375, 500)])
def test_undoing_the_shift_moves_a_mask_by_what_nearest_moved_it(size: tuple[int, int]) -> None:
    ramps = torch.stack(torch.meshgrid(*[torch.arange(side) + 0.5 for side in size], indexing="ij"))
    taken = torch.nn.functional.interpolate(ramps[None], (32, 32), mode="nearest")[0]
    undone = undo_target_shift(taken, size)[:, 2:-2, 2:-2]
    for axis, side in enumerate(size):
        centres = (torch.arange(2, 30) + 0.5) * side / 32
        error = (undone[axis].mean(1 - axis) - centres).mean().abs()
        assert error < 0.05 * side / 32


def test_a_saved_mask_of_another_size_is_refused() -> None:
    sample = sample_of([square((0, 0, 5, 4))], [("a",)])
    saved = {"refcoco/x#0": [encode_rle(np.ones((4, 4), bool))]}
    with pytest.raises(SampleError) as caught:
        compare_predictions(sample, "refcoco:val", saved)
    assert caught.value.reason == "size_mismatch"


def test_an_expression_without_a_target_is_of_another_image_and_does_not_hold_there() -> None:
    captions = {"a": ("the red flag", "the blue moon"), "b": ("the flag",), "c": ("the red flag", "the star"), "d": ()}
    regions = [
        MeasuredRegion(f"{image}#{n}", image, references=[text] if text else [], own=n)
        for image, own in captions.items()
        for n, text in enumerate(own or ("",))
    ]
    found = texts_without_target(regions)
    assert found == ["the star", "the star", "the star", "the blue moon", "the blue moon", None]
    assert texts_without_target(regions[:2]) == [None, None]


@pytest.mark.usefixtures("precision")
def test_what_is_not_there_is_asked_of_every_region_with_an_expression() -> None:
    model, prompter, config = small_model()
    meter = RegionMeter(model, prompter, config, tasks=("no_target",))
    samples = [*scene_samples(3), *pair_samples(1)]
    regions = meter.measure(samples, "val")
    assert [region.no_target is None for region in regions] == [not region.references for region in regions]
    for region in regions[:-1]:
        other = region.no_target
        own = [text for one in regions if one.image == region.image for text in one.references]
        assert other is not None
        assert not may_hold(other.text, own)
        assert (other.intersection, other.union) == (0, decode_rle(other.mask, "x").sum())
    assert any(region.no_target.union for region in regions[:-1])
    again = [MeasuredRegion.from_json(json.loads(json.dumps(region.to_json()))) for region in regions]
    assert [region.no_target for region in again] == [region.no_target for region in regions]
    assert [region.no_target for region in meter.measure(samples, "val")] == [region.no_target for region in regions]


@pytest.mark.usefixtures("precision")
def test_expressions_without_a_target_are_asked_of_their_own_image() -> None:
    model, prompter, config = small_model()
    first, second = scene_samples(2)
    samples = [replace(first, no_target=("a pink zebra", "the bus")), second]
    plain = RegionMeter(model, prompter, config, tasks=("referring",)).measure([first, second], "val")
    regions = RegionMeter(model, prompter, config, tasks=("referring",)).measure(samples, "val")
    assert [one.sentences for one in regions] == [one.sentences for one in plain]
    texts = [[answer.text for answer in one.without_target] for one in regions]
    assert texts == [["a pink zebra", "the bus"]] + [[]] * (len(regions) - 1)
    for answer in regions[0].without_target:
        assert (answer.intersection, answer.union) == (0, decode_rle(answer.mask, "x").sum())
    saved = {one.name: [answer.mask for answer in one.answers] for one in regions}
    assert [one.answers for one in compare_predictions(samples[0], "val", saved)] == [
        [replace(answer, num_masks=1) for answer in one.answers] for one in regions[: first.num_regions]
    ]
    figures = referring_figures(regions)
    assert figures["sentences"] == len(plain) + 2
    assert figures["N_acc"]["value"] in (0, 0.5, 1)


@pytest.mark.usefixtures("precision")
def test_the_frozen_listener_hears_the_same_captions() -> None:
    model, prompter, config = small_model()
    samples = [*scene_samples(2), *pair_samples(1)]
    starting = StartingWeights(trainable_parameters(model))
    alone = RegionMeter(model, prompter, config).measure(samples, "val")
    same = RegionMeter(model, prompter, config, frozen_listener=partial(weights, starting)).measure(samples, "val")
    assert [r.caption for r in alone] == [r.caption for r in same]
    assert all(r.frozen_iou == r.cycle_iou and r.frozen_uniqueness == r.uniqueness for r in same)
    assert all(r.frozen_iou is None for r in alone)
    assert same[-1].uniqueness is None, "a pair has one region"
    with torch.no_grad():
        for parameter in model.text_hidden_fcs.parameters():
            parameter.mul_(-1.0)
    moved = RegionMeter(model, prompter, config, frozen_listener=partial(weights, starting)).measure(samples, "val")
    assert [r.frozen_iou for r in moved] == pytest.approx([r.cycle_iou for r in same])
    assert [r.cycle_iou for r in moved] != [r.cycle_iou for r in same]
    figures = summarise(moved)
    assert figures["cycle_gIoU_frozen"] == pytest.approx(summarise(same)["cycle_gIoU"])
    assert figures["vocabulary"] >= 1
    assert figures["caption_words"] > 0
    assert -1 <= figures["uniqueness"] <= 1


def test_an_independent_listener_hears_the_same_captions_before_and_after() -> None:
    model, prompter, config = small_model()
    other = trainable_parameters(small_model(seed=1)[0])
    listener = partial(weights, StoredWeights(trainable_parameters(model), other))
    samples = scene_samples(2)
    alone = RegionMeter(model, prompter, config).measure(samples, "val")
    heard = RegionMeter(model, prompter, config, independent_listener=listener).measure(samples, "val")
    assert [(r.caption, r.cycle) for r in heard] == [(r.caption, r.cycle) for r in alone]
    ious = [r.independent.iou for r in heard]
    assert ious != [r.cycle_iou for r in heard]
    kept = [MeasuredRegion.from_json(json.loads(json.dumps(r.to_json()))) for r in heard]
    assert kept == heard
    flat = [MeasuredRegion.from_flat(json.loads(json.dumps(r.flat()))) for r in heard]
    assert [r.independent.iou for r in flat] == ious
    mean = sum(ious) / len(ious)
    assert summarise(heard)["cycle_gIoU_independent"] == pytest.approx(mean)
    assert loop_figures(heard)["cycle_gIoU_independent"]["value"] == pytest.approx(mean)
    assert cycle_gains(heard, heard)["cycle_gIoU_independent"]["mean"] == 0.0
    assert "cycle_gIoU_independent" not in cycle_gains(alone, heard), "the first evaluation had no such listener"


GATES = (None, None, "script", None)
WRITTEN = [WrittenCaption(text, (1, 2), gate, False) for text, gate in zip("abcd", GATES, strict=True)]


@pytest.mark.parametrize(
    ("heard", "floor", "chosen"),
    [
        ([-1.0, -0.5, -0.1, -0.7], 0.0, 1),  # the likeliest, c is gated
        ([-1.0, -0.91, -0.1, -0.95], 0.0, 0),  # none by the margin
        ([-1.0, -0.5, -0.1, -0.7], 0.48, 3),  # b is likelier to the listener, and below the floor in all
        ([-1.0, -0.5, -0.1, -0.7], 0.9, 0),
    ],
)
def test_the_best_of_several_captions(heard: list[float], floor: float, chosen: int) -> None:
    own = torch.tensor([-0.1, -1.0, -0.1, -0.7])
    assert BestOf(3, margin=0.1, floor=floor).choose(WRITTEN, own, torch.tensor(heard)) == chosen


@pytest.mark.usefixtures("precision")
def test_a_sample_that_a_listener_finds_likelier_takes_the_place_of_the_greedy_caption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A random model writes on and on, which the gates refuse.
    monkeypatch.setattr(CaptionGates, "check", lambda self, text, truncated, unreadable: unreadable)
    model, prompter, config = small_model()
    other = {name: 20 * value.detach() for name, value in trainable_parameters(small_model(seed=1)[0]).items()}
    listener = partial(weights, StoredWeights(trainable_parameters(model), other))
    samples = [*scene_samples(2), *pair_samples(1)]

    def measured(best_of: BestOf | None) -> list[MeasuredRegion]:
        meter = RegionMeter(model, prompter, config, independent_listener=listener, best_of=best_of)
        return meter.measure(samples, "val")

    plain, read, chosen = (measured(one) for one in (None, BestOf(), BestOf(samples=4, margin=0.0)))
    assert [(r.caption, r.cycle, r.greedy) for r in read] == [(r.caption, r.cycle, None) for r in plain]
    assert all(0 < r.trust < 1 for r in read)
    replaced = [(r, before) for r, before in zip(chosen, read, strict=True) if r.greedy is not None]
    assert replaced
    for region, before in replaced:
        assert region.greedy == before.caption != region.caption
        assert region.trust != before.trust
        assert MeasuredRegion.from_json(json.loads(json.dumps(region.to_json()))) == region


def test_both_evaluations_count_a_rejected_caption_as_an_empty_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompter, config = small_model()
    with torch.no_grad():
        for parameter in model.mllm.model.language_model.parameters():
            parameter.mul_(6.0 if parameter.dim() >= 2 else 1.0)  # captions then differ from region to region
    samples = [*scene_samples(2), *pair_samples(1)]
    meter = RegionMeter(model, prompter, config, choose_protocol("dual_loop", {}), ["loop"])
    accepted = RegionMeter(model, prompter, config).measure(samples, "val")
    assert all(record.rejected is None for record in meter.measure(samples, "refcoco:val"))
    refused = {accepted[0].caption, accepted[-1].caption}
    unreadable = Prompter.unreadable

    def refuse(self: Prompter, text: str) -> str | None:
        return "special_token" if text in refused else unreadable(self, text)

    monkeypatch.setattr(Prompter, "unreadable", refuse)
    results = RegionMeter(model, prompter, config).measure(samples, "val")
    records = meter.measure(samples, "refcoco:val")
    is_refused = [result.caption in refused for result in accepted]
    assert [record.rejected is not None for record in records] == is_refused
    assert 0 < sum(is_refused) < len(is_refused)
    for result, record, before, empty in zip(results, records, accepted, is_refused, strict=True):
        assert result.name == record.name
        assert result.cycle == record.cycle
        if empty:
            assert before.cycle.intersection > 0, "the caption led to a mask before it was refused"
            assert result.cycle.intersection == 0
            assert result.cycle.union == decode_rle(record.target, "target").sum()
            assert not decode_rle(result.cycle.mask, "mask").any()
        else:
            assert result.cycle.intersection == before.cycle.intersection > 0
    figures = loop_figures(records)
    assert figures["cycle_gIoU"]["value"] == pytest.approx(summarise(results)["cycle_gIoU"], abs=1e-12)
    assert figures["cycle_gIoU"]["value"] < summarise(accepted)["cycle_gIoU"]


@pytest.mark.usefixtures("precision")
def test_regions_survive_the_way_through_files() -> None:
    model, prompter, config = small_model()
    samples, starting = [*scene_samples(1), *pair_samples(1)], StartingWeights(trainable_parameters(model))
    meter = RegionMeter(model, prompter, config, PRESETS["dual_loop"], frozen_listener=partial(weights, starting))
    regions = meter.measure(samples, "refcoco:val")
    for region in regions:
        line = region.to_json()
        keys = ["name", "image", "data", "target", "references", "sentences", "caption", "rejected"]
        assert list(line) == [*keys, "cycle", "own", "frozen", "entry"]
        assert list(line["cycle"]) == ["intersection", "union", "ious", "mask"]
        again = MeasuredRegion.from_json(json.loads(json.dumps(line)))
        assert again == region
        flat = json.loads(json.dumps(region.flat()))
        numbers = MeasuredRegion.from_flat(flat)
        assert numbers.flat() == flat
        for name in ("ious", "cycle_iou", "frozen_iou", "exact", "uniqueness", "frozen_uniqueness"):
            assert getattr(again, name) == getattr(region, name)
            assert getattr(numbers, name) == getattr(region, name)
    numbers = [MeasuredRegion.from_flat(region.flat()) for region in regions]
    assert summarise(numbers) == pytest.approx(summarise(regions), abs=0)
    [alone] = RegionMeter(model, prompter, config, PRESETS["dual_loop"], ["referring"]).measure(samples[1:], "sav")
    assert list(alone.to_json()) == ["name", "image", "data", "target", "references", "sentences", "entry"]


def test_results_of_older_runs_still_load() -> None:
    old = {"name": "a", "image": "i", "caption": "c", "exact": None, "intersection": [1.0], "union": [2.0]}
    result = MeasuredRegion.from_flat({**old, "cycle_intersection": 1.0, "cycle_union": 2.0})
    assert result.frozen_iou is None
    assert result.cycle_iou == 0.5

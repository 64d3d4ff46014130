"""Figures by hand: empty masks, overlapping polygons, scorers, intervals; saved predictions counted again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dual_loop.data.masks import decode_segmentation, decode_summed_polygons, encode_rle
from dual_loop.errors import ConfigError, SampleError
from dual_loop.evaluation.caption_scores import score_captions, words
from dual_loop.evaluation.figures import captioning_figures, figures_of, loop_figures, markdown_table, referring_figures
from dual_loop.evaluation.protocols import PRESETS, choose_protocol
from dual_loop.evaluation.regions import compare_predictions
from dual_loop.metrics import bootstrap_ratio, mask_overlap
from dual_loop.types import RegionSample

SIDE = 10


def square(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    for y1, x1, y2, x2 in boxes:
        mask[y1:y2, x1:x2] = True
    return mask


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
        "refcoco/x#0": {"sentences": [{"mask": encode_rle(half)}, {"mask": encode_rle(target)}]},
        "refcoco/x#1": {"sentences": [{"mask": encode_rle(shifted)}]},
    }
    records = compare_predictions(sample, "refcoco:val", saved)
    figures = referring_figures(records)
    assert figures["sentences"] == 4
    assert figures["gIoU"]["value"] == pytest.approx((0.5 + 1.0 + 0.8 + 0.0) / 4, abs=1e-15)
    assert figures["cIoU"]["value"] == pytest.approx((10 + 20 + 16 + 0) / (20 + 20 + 20 + 4), abs=1e-15)
    expected = {"Pr@0.5": 0.75, "Pr@0.6": 0.5, "Pr@0.7": 0.5, "Pr@0.8": 0.5, "Pr@0.9": 0.25}
    assert {name: figures[name]["value"] for name in expected} == expected
    assert figures["without_mask"]["value"] == 0.25


@pytest.mark.parametrize(
    ("predicted", "target", "iou"),
    [
        (square(), square(), 1.0),
        (square(), square((0, 0, 10, 10)), 0.0),
        (square((0, 0, 10, 10)), square(), 0.0),
        (square((0, 0, 10, 5)), square((0, 0, 10, 10)), 0.5),
    ],
)
def test_empty_and_full(predicted: np.ndarray, target: np.ndarray, iou: float) -> None:
    intersection, union = (int(area[0]) for area in mask_overlap(predicted[None], target[None]))
    sentence = {"num_masks": 1, "intersection": intersection, "union": union}
    figures = referring_figures([{"image": "a", "sentences": [sentence]}])
    assert figures["gIoU"]["value"] == iou
    assert figures["cIoU"]["value"] == iou


def test_overlapping_polygons_are_united_and_the_published_way_is_not() -> None:
    polygons = [[0, 0, 6, 0, 6, 10, 0, 10], [4, 0, 10, 0, 10, 10, 4, 10]]
    united = decode_segmentation(polygons, SIDE, SIDE, "here")
    assert united.all()
    summed = decode_summed_polygons(polygons, SIDE, SIDE, "here")
    # Columns 0..3 are 1, 4 and 5 are 2, the rest 1: the code flips at every change of value.
    assert summed[:, :4].all()
    assert not summed[:, 4:6].any()
    assert summed[:, 6:].all()
    apart = [[0, 0, 3, 0, 3, 3, 0, 3], [5, 5, 9, 5, 9, 9, 5, 9]]
    one, two = (decode(apart, SIDE, SIDE, "here") for decode in (decode_segmentation, decode_summed_polygons))
    assert np.array_equal(one, two)


def test_scores_are_those_of_pycocoevalcap() -> None:
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    generated = ["a red star on the left", "the blue moon", "two green flags near a cloud", "a red star"]
    references = [
        ["the red star to the left", "a red star on the left side"],
        ["the blue moon"],
        ["a green flag", "green flags and one cloud"],
        ["the yellow star", "a yellow star"],
    ]
    truths = {str(k): own for k, own in enumerate(references)}
    found = {str(k): [text] for k, text in enumerate(generated)}
    scores = score_captions(generated, references)
    # These texts hold no punctuation and no capitals, so every tokenizer leaves them as they are.
    assert scores.corpus["CIDEr-D"] == pytest.approx(cider.Cider().compute_score(truths, found)[0], abs=1e-9)
    bleu, _ = Bleu(4).compute_score(truths, found, verbose=0)
    for order in range(4):
        assert scores.corpus[f"BLEU-{order + 1}"] == pytest.approx(bleu[order], abs=1e-9)
    assert scores.corpus["ROUGE-L"] == pytest.approx(Rouge().compute_score(truths, found)[0], abs=1e-9)
    assert scores.corpus["exact"] == 0.25
    if shutil.which("java"):
        assert 0 < scores.corpus["METEOR 1.5"] < 1
        assert scores.tokenizer == "ptb"
    else:
        assert "METEOR 1.5" not in scores.corpus
        assert scores.missing["METEOR 1.5"] == "needs Java"


def test_without_java_nothing_is_called_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    scores = score_captions(["A red star."], [["the red star", "A red-star!"]])
    assert scores.tokenizer == "words"
    assert "METEOR 1.5" not in scores.corpus
    assert "meteor-exact-stem" in scores.corpus
    assert words("A red-star, isn't it?") == "a red-star isn't it"


def test_loop_figures() -> None:
    def record(image: str, own: int, ious: list[float]) -> dict:
        cycle = {"intersection": round(100 * ious[own]), "union": 100, "ious": ious}
        return {"image": image, "own": own, "cycle": cycle}

    records = [record("a", 0, [0.8, 0.1]), record("a", 1, [0.6, 0.2]), record("b", 0, [0.5])]
    figures = loop_figures(records)
    assert figures["cycle_gIoU"]["value"] == pytest.approx(0.5)
    assert figures["uniqueness"]["value"] == pytest.approx((0.7 - 0.4) / 2)
    assert figures["picks_own"]["value"] == 0.5
    assert (figures["captions"], figures["in_company"]) == (3, 2)


def test_figures_of_nothing_and_tables() -> None:
    assert referring_figures([]) == {"sentences": 0}
    assert loop_figures([{"image": "a"}]) == {"captions": 0}
    record = {"image": "a", "caption": "x y", "rejected": None, "references": [], "sentences": []}
    figures = captioning_figures([record])
    assert (figures["captions"], figures["with_references"], figures["words"]["value"]) == (1, 0, 2.0)
    table = markdown_table({"masks": figures_of([record], ["captioning"])})
    assert "**masks**: 1 regions, 1 images" in table
    assert "| words | 2.00 | 2.00 to 2.00 |" in table


def test_bootstrap_ratio() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(0.5, 0.2, 400)
    low, high = bootstrap_ratio(values, np.ones(400), list(range(400)))
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.003)
    assert high == pytest.approx(values.mean() + error, abs=0.003)
    grouped = bootstrap_ratio(values, np.ones(400), [k // 100 for k in range(400)])
    assert grouped[1] - grouped[0] != high - low
    assert bootstrap_ratio([0.0, 0.0], [0.0, 0.0], ["a", "b"]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="cannot be resampled"):
        bootstrap_ratio([1.0], [1.0, 2.0], ["a"])


def test_protocols() -> None:
    assert choose_protocol("sa2va", {"join": None}).name == "sa2va"
    changed = choose_protocol("sa2va", {"join": "first"})
    assert (changed.name, changed.join, changed.seg) == ("sa2va*", "first", "generated")
    assert PRESETS["lisa"].clean("  The Red Star. ") == "the red star"
    assert PRESETS["dual_loop"].clean("The Red Star.") == "The Red Star."
    with pytest.raises(ConfigError, match="unknown protocol"):
        choose_protocol("best", {})
    with pytest.raises(ConfigError, match="--seg"):
        choose_protocol("lisa", {"seg": "perhaps"})


def test_a_saved_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    sample = sample_of([square((0, 0, 5, 4))], [("a",)])
    saved = {"refcoco/x#0": {"sentences": [{"mask": encode_rle(np.ones((4, 4), bool))}]}}
    with pytest.raises(SampleError) as caught:
        compare_predictions(sample, "refcoco:val", json.loads(json.dumps(saved)))
    assert caught.value.reason == "size_mismatch"

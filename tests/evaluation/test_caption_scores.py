"""Caption scores: those of pycocoevalcap to rounding, and nothing under METEOR's name without Java."""

from __future__ import annotations

import shutil

import pytest

from dual_loop.evaluation.caption_scores import score_captions, words


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

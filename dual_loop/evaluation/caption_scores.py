"""Scores of generated captions against references: the field's own scorers, and what they were run on.

CIDEr-D, BLEU and ROUGE-L are those of pycocoevalcap, whose Python code they all share. METEOR is the Java program of
version 1.5 that the same package carries; without Java there is no METEOR, and nothing else is printed under its name
(``meteor-exact-stem`` is this package's own score and says so).
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dual_loop.errors import EnvironmentProblem, explain
from dual_loop.metrics import METEOR_VARIANT, caption_exact, meteor_exact_stem

INSTALL = "pip install 'dual-loop[caption-eval]'"


@dataclass
class CaptionScores:
    """Scores of N captions.

    Attributes:
        corpus: name to value; BLEU and METEOR are scores of the whole corpus, the others are means.
        single: name to N values of those that are means, for intervals.
        tokenizer: ``ptb`` (the Penn Treebank tokenizer of the Java program) or ``words`` (see :func:`words`).
        missing: name to why a score is not there.
    """

    corpus: dict[str, float] = field(default_factory=dict)
    single: dict[str, list[float]] = field(default_factory=dict)
    tokenizer: str = "words"
    missing: dict[str, str] = field(default_factory=dict)


def words(text: str) -> str:
    """Return ``text`` in lower case, cut into words and joined by single spaces; punctuation is dropped.

    Stands in for the Java tokenizer where there is no Java. They differ in contractions and hyphens.
    """
    return " ".join(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower()))


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Score ``captions`` against ``references`` (at least one each).

    CIDEr-D weighs words by how rare they are in these references, so its value belongs to this very set.
    """
    scores = CaptionScores()
    if not captions:
        return scores
    exact = [float(caption_exact(c, own)) for c, own in zip(captions, references, strict=True)]
    stem = [meteor_exact_stem(c, own) for c, own in zip(captions, references, strict=True)]
    for name, values in (("exact", exact), (METEOR_VARIANT, stem)):
        scores.single[name] = values
        scores.corpus[name] = sum(values) / len(values)
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        scores.missing = dict.fromkeys(("CIDEr-D", "BLEU", "ROUGE-L", "METEOR 1.5"), f"not installed; {INSTALL}")
        return scores
    hypotheses = {str(k): [text] for k, text in enumerate(captions)}
    truths = {str(k): list(own) for k, own in enumerate(references)}
    has_java = shutil.which("java") is not None
    tokenize = _ptb if has_java else _words_of_all
    scores.tokenizer = "ptb" if has_java else "words"
    tokens, truth_tokens = tokenize(hypotheses), tokenize(truths)
    _python_scores(scores, truth_tokens, tokens)
    if has_java:
        _meteor(scores, truth_tokens, tokens)
    else:
        scores.missing["METEOR 1.5"] = "needs Java"
    return scores


def _words_of_all(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {key: [words(text) for text in own] for key, own in texts.items()}


def _ptb(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # An empty line would shift all that follow it: the tokenizer drops it.
    form = {key: [{"caption": text.replace("\n", " ").strip() or "."} for text in own] for key, own in texts.items()}
    with _quiet_children():
        found = PTBTokenizer().tokenize(form)
    return {key: list(found[key]) for key in texts}


@contextlib.contextmanager
def _quiet_children() -> Iterator[None]:
    """Send what child processes write to standard error nowhere: the tokenizer reports its speed."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _python_scores(scores: CaptionScores, truths: Mapping[str, Any], tokens: Mapping[str, Any]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(4).compute_score(truths, tokens)
        cider, cider_each = Cider().compute_score(truths, tokens)
        rouge, rouge_each = Rouge().compute_score(truths, tokens)
    scores.corpus.update({f"BLEU-{order}": float(value) for order, value in enumerate(bleu, start=1)})
    scores.corpus.update({"CIDEr-D": float(cider), "ROUGE-L": float(rouge)})
    scores.single.update({"CIDEr-D": [float(v) for v in cider_each], "ROUGE-L": [float(v) for v in rouge_each]})


def _meteor(scores: CaptionScores, truths: Mapping[str, Any], tokens: Mapping[str, Any]) -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    try:
        mean, _ = Meteor().compute_score(truths, tokens)
    except (OSError, ValueError, AssertionError) as error:
        scores.missing["METEOR 1.5"] = f"the Java program failed: {type(error).__name__}: {error}"
        return
    if not math.isfinite(mean):
        raise EnvironmentProblem(explain("METEOR's Java program returned no number", seen=str(mean)))
    # The program adds up matches and chunks over the corpus; it is no mean of single scores.
    scores.corpus["METEOR 1.5"] = float(mean)

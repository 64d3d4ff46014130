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
from collections.abc import Sequence
from dataclasses import dataclass, field

from dual_loop.caption_metrics import METEOR_VARIANT, caption_exact, meteor_exact_stem
from dual_loop.errors import EnvironmentProblem, explain

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

    Raises:
        EnvironmentProblem: METEOR's program answers, but with no number.
    """
    scores = CaptionScores()
    if not captions:
        return scores
    pairs = list(zip(captions, references, strict=True))
    scores.single["exact"] = [float(caption_exact(*pair)) for pair in pairs]
    scores.single[METEOR_VARIANT] = [meteor_exact_stem(*pair) for pair in pairs]
    scores.corpus = {name: sum(values) / len(values) for name, values in scores.single.items()}
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        scores.missing = dict.fromkeys(("CIDEr-D", "BLEU", "ROUGE-L", "METEOR 1.5"), f"not installed; {INSTALL}")
        return scores
    has_java = shutil.which("java") is not None
    scores.tokenizer = "ptb" if has_java else "words"
    tokenize = _ptb if has_java else _words
    tokens = tokenize([[text] for text in captions])
    truths = tokenize(references)
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(4).compute_score(truths, tokens)
        cider, cider_each = Cider().compute_score(truths, tokens)
        rouge, rouge_each = Rouge().compute_score(truths, tokens)
    scores.corpus.update({f"BLEU-{order}": float(value) for order, value in enumerate(bleu, start=1)})
    scores.corpus.update({"CIDEr-D": float(cider), "ROUGE-L": float(rouge)})
    scores.single.update({"CIDEr-D": [float(v) for v in cider_each], "ROUGE-L": [float(v) for v in rouge_each]})
    if not has_java:
        scores.missing["METEOR 1.5"] = "needs Java"
        return scores
    try:
        meteor, _ = Meteor().compute_score(truths, tokens)
    except (OSError, ValueError, AssertionError) as error:
        scores.missing["METEOR 1.5"] = f"the Java program failed: {type(error).__name__}: {error}"
        return scores
    if not math.isfinite(meteor):
        raise EnvironmentProblem(explain("METEOR's Java program returned no number", seen=str(meteor)))
    # The program adds up matches and chunks over the corpus; it is no mean of single scores.
    scores.corpus["METEOR 1.5"] = float(meteor)
    return scores


def _words(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    return {number: [words(text) for text in own] for number, own in enumerate(texts)}


def _ptb(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # An empty line would shift all that follow it: the tokenizer drops it.
    lines = [[{"caption": text.replace("\n", " ").strip() or "."} for text in own] for own in texts]
    # Its child process reports its speed on standard error.
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        found = PTBTokenizer().tokenize(dict(enumerate(lines)))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
    return {number: list(found[number]) for number in range(len(texts))}

"""Measures of captions: pure functions of texts."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence

from dual_loop.errors import explain

METEOR_VARIANT = "meteor-exact-stem"
"""What :func:`meteor_exact_stem` is called wherever it is printed. It is not METEOR: figures of papers are not
comparable."""

_ALPHA, _BETA, _GAMMA, _STEM_WEIGHT = 0.85, 0.20, 0.60, 0.6
_BEAM = 32
_ARTICLES = {"a", "an", "the"}
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


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


def may_hold(text: str, captions: Iterable[str]) -> bool:
    """Whether ``text`` may be true where ``captions`` are: it says the same as one of them, or only more, or only less.

    Articles, order and repetition of words do not count. What the captions do not mention is not known.
    """
    own, *others = ({*_WORD.findall(one.lower())} - _ARTICLES for one in (text, *captions))
    return any(own <= other or other <= own for other in others)


def distinct_ngrams(texts: Sequence[str], length: int) -> float:
    """Return distinct n-grams over all n-grams of ``texts`` (distinct-n, 1510.03055): 0..1, 0 where there is none."""
    runs = []
    for text in texts:
        words = text.lower().split()
        runs += [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


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

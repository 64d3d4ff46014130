"""Measures of captions: values by hand, from METEOR's formula too, and what must hold for any captions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dual_loop.caption_metrics import (
    METEOR_VARIANT,
    caption_exact,
    distinct_ngrams,
    may_hold,
    meteor_exact_stem,
    normalise_caption,
)


def formula(matched: float, matches: int, chunks: int, length: int, reference: int) -> float:
    precision, recall = matched / length, matched / reference
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    return mean * (1 - 0.60 * (chunks / matches) ** 0.20)


GOLDEN = [
    ("red circle", "red circle", 1.0),
    ("Red circle.", "red circle", 1.0),
    ("red circle", "the red circle", formula(2, 2, 1, 2, 3)),
    ("circle red", "red circle", formula(2, 2, 2, 2, 2)),
    ("two dogs", "a dog", formula(0.6, 1, 1, 2, 2)),
    ("the dog on the left", "left dog", formula(2, 2, 2, 5, 2)),
    # Two words "the": the alignment with one chunk less wins.
    ("the cat the mat", "the mat", formula(2, 2, 1, 4, 2)),
    ("running man", "man runs", formula(1.6, 2, 2, 2, 2)),
    ("star", "circle", 0.0),
    ("", "circle", 0.0),
]


@pytest.mark.parametrize(("candidate", "reference", "expected"), GOLDEN)
def test_by_hand(candidate, reference, expected):
    assert meteor_exact_stem(candidate, [reference]) == pytest.approx(expected, abs=1e-9)


def test_it_is_never_called_meteor():
    assert METEOR_VARIANT == "meteor-exact-stem"


def test_the_best_reference_counts():
    assert meteor_exact_stem("red circle", ["a star", "red circle"]) == 1.0
    assert meteor_exact_stem("red circle", []) == 0.0


WORDS = st.lists(st.sampled_from(["a", "b", "cat", "cats", "dog", "run", "running", "left"]), max_size=9).map(" ".join)


@given(WORDS, WORDS)
def test_range_and_identity(first, second):
    assert 0.0 <= meteor_exact_stem(first, [second]) <= 1.0
    assert meteor_exact_stem(first, [first]) == (1.0 if first else 0.0)


@given(st.permutations(["one", "cat", "near", "big", "tree"]))
def test_order_matters(words):
    text = " ".join(words)
    score = meteor_exact_stem(text, ["one cat near big tree"])
    assert (score == 1.0) == (text == "one cat near big tree")


def test_distinct():
    assert distinct_ngrams(["a b", "a b"], 1) == 0.5
    assert distinct_ngrams(["a b", "a c"], 2) == 1.0
    assert distinct_ngrams([], 1) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Red\tcircle. ", "the red circle"),
        ("a dog .", "a dog"),
        ("a dog...", "a dog"),
        ("no. 5 bus", "no. 5 bus"),
        ("left, no comma lost", "left, no comma lost"),
        (" . ", ""),
    ],
)
def test_normalising_captions(text: str, expected: str):
    assert normalise_caption(text) == expected


@given(st.text(alphabet=st.sampled_from("aB .\t\nÉß,"), max_size=20))
def test_normalising_twice_changes_nothing(text: str):
    once = normalise_caption(text)
    assert normalise_caption(once) == once


def test_exact_captions():
    assert caption_exact("The red circle.", ["a blue square", "the red  circle"])
    assert not caption_exact("the red circles", ["the red circle"])
    with pytest.raises(ValueError, match="captions are needed"):
        caption_exact("the red circle", [])
    with pytest.raises(ValueError, match="captions are needed"):
        caption_exact("a", "abc")  # a string is a sequence of letters; "a" would be among them


@pytest.mark.parametrize(
    ("text", "caption", "expected"),
    [
        ("the blue flag", "a blue flag.", True),
        ("the flag", "the large blue flag", True),
        ("the large blue flag", "the flag", True),
        ("flag, blue", "the blue flag", True),
        ("the blue flag", "the blue star", False),
        ("the flags", "the flag", False),
    ],
)
def test_a_caption_may_hold_where_another_does(text: str, caption: str, expected: bool) -> None:
    assert may_hold(text, ["the red moon", caption]) is expected
    assert not may_hold(text, [])

"""Gates: what earns nothing, and that ordinary captions pass."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dual_loop.config import GATES
from dual_loop.errors import ConfigError
from dual_loop.loop.captioner import prompt_texts
from dual_loop.loop.gates import CaptionGates


def find_marker(text: str) -> str | None:
    return next((marker for marker in ("[SEG]", "<vp>", "<|end|>") if marker in text), None)


def gates(names=GATES) -> CaptionGates:
    return CaptionGates(names, find_marker, prompt_texts())


ORDINARY = (
    "red circle",
    "the man in the blue shirt on the left",
    "player number 23",
    "2 dogs next to a car",
    "the second chair from the right, behind the table",
    "a very, very old tree",
    "No. 7 on the jersey",
    "one of the three cats",
    "élégant café sign",
    "T-shirt with stripes",
    "the left x-ray",
)

CLOSED = {
    "special_token": ("a [SEG] thing", "<vp>"),
    "prompt_leak": (
        "give me a short description of the dog",
        "region in the picture marked by region1",
        "Can you segment in this image",
    ),
    "coordinates": (
        "(12, 34)",
        "the thing at 12, 34, 56, 78",
        "at 0.25",
        "[0.1 0.2 0.3 0.4]",
        "twelve forty",
        "12x34",
        "x=12 y=3",
        "40% from the left",
        "10 px down",
        "<box>a</box>",
        "bounding box",
        "0x3f",
        "#ffcc00",
        "row 3 7",
    ),
    "script": ("红色的圆", "красный круг", "a 红色的圆圈"),
    "repetition": ("red red red", "on left on left on left", "the cat and the cat and the cat and"),
    "empty": ("", "...", " - "),
}


@pytest.mark.parametrize("caption", ORDINARY)
def test_ordinary_captions_pass(caption):
    assert gates().check(caption, truncated=False) is None


@pytest.mark.parametrize(("name", "caption"), [(name, text) for name, texts in CLOSED.items() for text in texts])
def test_each_gate_closes_and_can_be_switched_off(name, caption):
    assert gates().check(caption, truncated=False) == name
    assert gates([name]).check(caption, truncated=False) == name
    assert gates([other for other in GATES if other != name]).check(caption, truncated=False) != name
    assert gates(()).check(caption, truncated=True) is None


def test_truncated_captions_earn_nothing():
    assert gates().check("red circle", truncated=True) == "truncated"
    assert gates(["empty"]).check("red circle", truncated=True) is None


def test_an_unknown_gate_is_named():
    with pytest.raises(ConfigError, match="no_such"):
        gates(["no_such"])


@given(st.text(max_size=80), st.booleans())
def test_any_text_gets_one_answer(text, truncated):
    found = gates().check(text, truncated)
    assert found is None or found in GATES
    assert (found is None) <= (not truncated)


@given(st.lists(st.sampled_from(["red", "blue", "circle", "star", "left", "big"]), min_size=1, max_size=6, unique=True))
def test_different_plain_words_pass(words):
    assert gates().check(" ".join(words), truncated=False) is None

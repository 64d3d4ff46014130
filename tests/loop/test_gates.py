"""Gates: what earns nothing, and that ordinary captions pass."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dual_loop.config import GATES
from dual_loop.errors import ConfigError
from dual_loop.loop.gates import CaptionGates
from dual_loop.model.build import build_prompter, build_tokenizer
from dual_loop.model.prompts import prompt_texts

from small_model import small_config

PROMPTER = build_prompter(small_config(), build_tokenizer(small_config().model))


def check(text: str, truncated: bool = False, names=GATES) -> str | None:
    return CaptionGates(names, prompt_texts()).check(text, truncated, PROMPTER.unreadable(text))


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
    "the man in the third row",
    "woman in the front row, second from left",
    "third horse from the right",
    "a stone column behind the row of chairs",
    "the last column of the temple",
    "clock on the wall",
    "the clock showing three",
    "the bus with number 42 on its front",
    "top left corner",
    "the donut at the bottom right",
    "upper half of the sandwich",
    "half of a pizza",
    "one third of the cake",
    "a quarter pound burger",
    "the middle giraffe",
    "boy at bat",
    "kid sitting at the far left",
    "the cell phone in her hand",
    "a laptop next to the cell tower",
    "white square plate",
    "the field player in red",
    "HDTV above the fireplace",
    "BMW parked near the kerb",
    "the xbox controller",
    "jersey 10, blue shorts",
    "twins, the taller one",
    "a man and a woman at ten",
    "the rhythm guitar player",
    "strengths and weaknesses poster",
    "the sphynx cat",
    "pizza with jalapeños",
    "Škoda estate car",
    "the Xerox machine",
    "a jacuzzi full of people",
    "skyscraper",
    "the dog's left ear",
    "girl w/ pink backpack",
    "guy on the left (blue cap)",
    "man, right",
    "the 2nd zebra",
    "bottle of 7up",
    "an iphone 14 on a table",
    "a plane, tail number n123",
    'van with "taxi" on its door',
    "black-and-white cow",
    "closest elephant to the camera",
    "not the red one",
    "the thing the child points at",
    "a fjord under clouds",
    "zzz sticker",
    "pyjamas on the bed",
    "motorcycle without a rider",
    "vase with flowers that is not on the shelf",
    "two people sharing an umbrella",
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
        "grid cell b7",
        "the cell c4",
        "third row second column",
        "2nd column of the 5th row",
        "row two, column three",
        "row 3, column b",
        "quadrant II",
        "the upper left quadrant",
        "at ten past four",
        "towards half past three",
        "at 3 o'clock",
        "the two o'clock position",
        "clock position four",
        "45 degrees from the top",
        "two thirds from the left",
        "zero point two five",
        "at e4",
    ),
    "unprintable": ("a red\x07 circle", "star \ufffd", "the\u200b star", "moon \ue000"),
    "gibberish": (
        "xqzvk jqwp vbzk",
        "aaaaaaa",
        "a8f3k2q9 m7d2b1k4",
        "bcdfg hjklm",
        "@@## %% &&!! star",
        "vqxj the zqxw",
    ),
    "script": ("红色的圆", "красный круг", "a 红色的圆圈"),
    "repetition": ("red red red", "on left on left on left", "the cat and the cat and the cat and"),
    "empty": ("", "...", " - "),
}


@pytest.mark.parametrize("caption", ORDINARY)
def test_ordinary_captions_pass(caption):
    assert check(caption) is None


@pytest.mark.parametrize(("name", "caption"), [(name, text) for name, texts in CLOSED.items() for text in texts])
def test_each_gate_closes_and_can_be_switched_off(name, caption):
    assert check(caption) == name
    assert check(caption, names=[name]) == name
    others = CaptionGates([other for other in GATES if other != name], prompt_texts())
    assert others.check(caption, False, None) != name
    assert CaptionGates((), prompt_texts()).check(caption, True, None) is None


@pytest.mark.parametrize(("name", "caption"), [(name, CLOSED[name][0]) for name in ("special_token", "empty")])
def test_what_step_two_cannot_read_earns_nothing_whichever_gates_are_on(name, caption):
    assert check(caption, names=()) == name
    assert check(caption, names=[other for other in GATES if other != name]) == name


def test_truncated_captions_earn_nothing():
    assert check("red circle", truncated=True) == "truncated"
    assert check("red circle", truncated=True, names=["empty"]) is None


def test_an_unknown_gate_is_named():
    with pytest.raises(ConfigError, match="no_such"):
        CaptionGates(["no_such"], prompt_texts())


@given(st.text(max_size=80), st.booleans())
def test_any_text_gets_one_answer(text, truncated):
    found = check(text, truncated)
    assert found is None or found in GATES
    assert (found is None) <= (not truncated)


@given(st.lists(st.sampled_from(["red", "blue", "circle", "star", "left", "big"]), min_size=1, max_size=6, unique=True))
def test_different_plain_words_pass(words):
    assert check(" ".join(words)) is None

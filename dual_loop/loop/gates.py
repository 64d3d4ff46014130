"""What is no caption: text that a segmenter can follow without its being a description.

A rewarded captioner finds the shortest way to a mask: coordinates, mask tokens, a word repeated as a code, the words of
its own prompt. Telling it not to does not help (field reports); earning nothing does. Such a caption earns the least
that a reward can be, and step 2 does not read it (``loop.on_rejected``), unless its only fault is its length. Each gate
is counted.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from dual_loop.config import GATES
from dual_loop.errors import ConfigError, explain

LEAK_WORDS = 4
"""So many words of a prompt in a row are a leak."""
FOREIGN_SHARE = 0.2
REPEATED_WORD, REPEATED_RUN = 3, 3

_NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty"),
    *("fifty", "sixty", "seventy", "eighty", "ninety", "hundred", "thousand"),
)
_ORDINAL_WORDS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_NUMBER = rf"(?:\d+(?:\.\d+)?|\b(?:{'|'.join(_NUMBER_WORDS)})\b)"
_ORDINAL = rf"\b(?:{'|'.join(_ORDINAL_WORDS)}|\d+(?:st|nd|rd|th)|last|middle)\b"
_LINE = rf"(?:{_ORDINAL}\s+{{0}}|\b{{0}}\s+(?:number\s+)?(?:{_NUMBER}|[a-z]\b))"
_ROW, _COLUMN = _LINE.format("(?:row|line)"), _LINE.format("col(?:umn)?")
_COORDINATES = re.compile(
    "|".join(
        (
            # Places of a grid: third row second column, grid cell b7, at c4, quadrant II.
            rf"{_ROW}\W+(?:\w+\W+){{0,3}}?{_COLUMN}|{_COLUMN}\W+(?:\w+\W+){{0,3}}?{_ROW}",
            r"\b(?:grid|cell|sector)\s+(?:cell\s+|number\s+)?(?:[a-z]?-?\d+|[a-z]|[ivx]+)\b|\bquadrants?\b",
            r"\b(?:at|position|square|field)\s+[a-z]-?\d{1,2}\b",
            # Hands of a clock and angles: at ten past four, at 3 o'clock, 45 degrees.
            rf"\b(?:at|towards?)\s+(?:an?\s+|the\s+)?(?:quarter|half|{_NUMBER})\s+(?:past|to|before|after)\s+{_NUMBER}",
            rf"\b(?:at|towards?)\s+(?:the\s+)?{_NUMBER}\s*o\W?\s?clock|{_NUMBER}\s*o\W?\s?clock\s+(?:position|direction)",
            rf"\bclock\s+position\b|{_NUMBER}\s*(?:°|degrees?\b)",
            # Shares in words: two thirds from the left, zero point two.
            r"\b(?:one|two|three|four)\s+(?:third|quarter|fifth|tenth)s?\s+(?:of\s+the\s+way|from|down|across|along|up)",
            rf"{_NUMBER}\s+point\s+{_NUMBER}",
            # Two numbers in a row, in any brackets: (12, 34), [0.1 0.2], 12x34, twelve forty.
            rf"{_NUMBER}(?:\s*[,;:x×/|]\s*|\s+(?:by\s+|comma\s+|and\s+)?|\s*-\s*){_NUMBER}",
            r"(?<![\d.])[01]?\.\d+",  # a share of the image: 0.25
            r"\d\s*(?:%|percent\b|px\b|pixels?\b)",
            r"\b[xy]\s*[=:]?\s*\d",
            r"\b[xy][12]?\s*=",
            r"<\s*/?\s*(?:box|bbox|point|loc|quad|ref|mask|seg)\w*\s*>",
            r"\b(?:bbox|bounding box|coordinates?)\b",
            r"#[0-9a-f]{3,}\b|\b0x[0-9a-f]+\b",
        )
    ),
    re.IGNORECASE,
)


_UNSPEAKABLE = re.compile(
    # Neighbours that words of no Latin language have, a letter four times, five letters without a vowel.
    r"j[bcdfghklmpqrstvwxz]|q[bcdfghjklmnopqrstvwxyz]|v[bcdfghjkmpqtwxz]|x[jkqz]|z[jqx]|[wk][qxz]|([a-z])\1{3}"
    r"|^[bcdfghjklmnpqrstvwxz]{5,}$|^(?=.*\d.*\d)(?=.*[a-z].*[a-z])\w{6,}$"
)
SYMBOL_SHARE = 0.4
"""Of the characters besides white space: more symbols than this are no description."""


class CaptionGates:
    """Checks captions against the gates that are on.

    Args:
        gates: names out of :data:`~dual_loop.config.GATES`.
        prompts: the texts that a caption must not repeat.

    Raises:
        ConfigError: an unknown gate.
    """

    def __init__(self, gates: Sequence[str], prompts: Sequence[str]) -> None:
        unknown = [name for name in gates if name not in GATES]
        if unknown:
            raise ConfigError(explain("unknown gate", "reward.gates", ", ".join(unknown), ", ".join(GATES)))
        self.names = tuple(name for name in GATES if name in gates)
        self.leaks = {run for prompt in prompts for run in _runs(_words(prompt), LEAK_WORDS)}

    def check(self, text: str, truncated: bool, unreadable: str | None) -> str | None:
        """Return the first gate that closes on ``text``, None where it may earn its reward.

        Args:
            text: the caption.
            truncated: whether it met the token limit before it ended.
            unreadable: ``empty`` or ``special_token`` where step 2 cannot read it; such a caption earns nothing,
                whichever gates are on.
        """
        closed = {
            "special_token": unreadable == "special_token",
            "prompt_leak": any(run in self.leaks for run in _runs(_words(text), LEAK_WORDS)),
            "coordinates": _COORDINATES.search(text) is not None,
            "script": is_foreign(text),
            "unprintable": any(one == "\ufffd" or unicodedata.category(one)[0] == "C" for one in text),
            "gibberish": is_gibberish(text),
            "repetition": repeats_itself(text),
            "truncated": truncated,
            "empty": unreadable == "empty",
        }
        return next((name for name in self.names if closed[name]), unreadable)


def is_foreign(text: str) -> bool:
    """Tell whether more than a fifth of the letters are not Latin."""
    letters = [character for character in text if character.isalpha()]
    foreign = sum(not unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    return foreign > FOREIGN_SHARE * len(letters)


def is_gibberish(text: str) -> bool:
    """Tell whether most words of three letters or more cannot be spoken, or symbols outweigh words."""
    words = [word for word in _words(text) if len(word) > 2]
    strange = sum(_UNSPEAKABLE.search(word) is not None for word in words)
    shown = [character for character in text if not character.isspace()]
    symbols = sum(not character.isalnum() for character in shown)
    return 2 * strange > len(words) or (len(shown) > 3 and symbols > SYMBOL_SHARE * len(shown))


def repeats_itself(text: str) -> bool:
    """Tell whether a word comes three times in a row, or a run of two or three words three times at all."""
    words = _words(text)
    if any(len(set(words[start : start + REPEATED_WORD])) == 1 for start in range(len(words) - REPEATED_WORD + 1)):
        return True
    for length in (2, 3):
        runs = _runs(words, length)
        if any(runs.count(run) >= REPEATED_RUN for run in set(runs)):
            return True
    return False


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:'\w+)?", text.lower())


def _runs(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]

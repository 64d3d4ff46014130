"""What makes a caption earn nothing: text that a segmenter can follow without its being a description.

A rewarded captioner finds the shortest way to a mask: coordinates, mask tokens, a word repeated as a code, the words of
its own prompt. Telling it not to does not help (field reports); earning nothing does. Each gate is counted.
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
_NUMBER = rf"(?:\d+(?:\.\d+)?|\b(?:{'|'.join(_NUMBER_WORDS)})\b)"
_COORDINATES = re.compile(
    "|".join(
        (
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

"""Captions as people bring them: what no prompt can hold."""

from __future__ import annotations

from collections.abc import Iterable

from dual_loop.errors import bad_sample, printable, shorten

MARKERS = (
    *("<img>", "</img>", "<IMG_CONTEXT>", "[SEG]", "<p>", "</p>", "<vp>", "</vp>"),
    *("<|end|>", "<|im_end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|im_start|>"),
)
"""Image and region markers and turn delimiters of all templates of ``model.prompts``; a test compares the two."""


def check_captions(texts: Iterable[str], where: str) -> None:
    """Refuse captions that hold a marker, also in lower case (``special_token``), or half a character."""
    for text in texts:
        check_text(text, where)
        if not is_plain(text):
            marker = next(marker for marker in MARKERS if marker in text or marker in text.lower())
            seen, fix = f"{marker} in {shorten(text)}", "take it out of the caption"
            raise bad_sample("special_token", "a caption holds a special token", where, seen, "plain text", fix)


def check_text(text: str, where: str) -> None:
    """Refuse half a pair of surrogates (``\\ud800`` in JSON): no tokenizer takes it (``broken_text``)."""
    if not text.isprintable() and printable(text) != text:
        raise bad_sample("broken_text", "a caption holds half a character", where, shorten(text), fix="mend it")


def is_plain(text: str) -> bool:
    """Tell whether a text holds no marker."""
    return not any(marker in text or marker in text.lower() for marker in MARKERS)

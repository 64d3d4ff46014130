"""How a referring mask is asked for and counted. Published figures differ in these choices, so each is a switch.

What the projects do was read from their public code; a preset fixes the switches that move numbers, not the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dual_loop.errors import ConfigError, explain
from dual_loop.model.prompts import SEGMENT_QUESTIONS

VIDEO_CONVENTIONS = {
    "memory": "SAM 2's, with this model's mask decoder; masks stay where the object score is not positive",
    "J, F": "mean over all frames of a video, then over expressions; F within 0.008 of the diagonal",
}


@dataclass(frozen=True)
class Protocol:
    """The switches.

    Attributes:
        name: the preset, with ``*`` behind it where a switch was changed.
        seg: ``forced`` gives the answer with [SEG], so a mask is never missing; ``generated`` lets the model write it,
            and an answer without [SEG] counts as an empty mask.
        join: of several masks in one answer, ``union`` or the ``first``.
        text: expressions ``as_is``, which the question reads in lower case without a final full stop, or
            ``lower_strip``: also without white space around them and further stops.
        polygons: true masks of several polygons are their ``union``; ``summed`` repeats the way of code that adds the
            polygons and then encodes the sum: where two overlap, the run-length encoder flips inside and outside.
        question: name of the question (``model.prompts.SEGMENT_QUESTIONS``).
        max_tiles: most tiles of an image (``data.max_tiles``); None leaves it to the checkpoint's configuration.
        undo_target_shift: move masks back by the half cell that weights have learnt to move them by whose targets were
            taken at the corners of cells (``data.target_pooling = nearest``, as Sa2VA trains).
        frames: of a video, the first ones, which the language model reads and whose masks it prompts; None of images.
    """

    name: str = "dual_loop"
    seg: str = "forced"
    join: str = "union"
    text: str = "as_is"
    polygons: str = "union"
    question: str = "segment"
    max_tiles: int | None = None
    undo_target_shift: bool = False
    frames: int | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the switches with the conventions that have none, as printed in every result."""
        fixed = {
            "threshold": "logit > 0 at the image's own size",
            "empty_against_empty": "IoU 1",
            "unit": "one sample a sentence",
            **({"precision": "IoU >= threshold"} if self.frames is None else VIDEO_CONVENTIONS),
        }
        return {key: value for key, value in {**asdict(self), **fixed}.items() if value is not None}

    def of_video(self, frames: int) -> Protocol:
        """Return the protocol for videos: as many first frames, each one tile, as Sa2VA reads them."""
        return replace(self, frames=frames, max_tiles=1)

    def with_tiles(self, number: int) -> Protocol:
        """Return the protocol with the tiles that are really taken; ``*`` behind the name where it wants others."""
        is_other = self.max_tiles not in (None, number) and not self.name.endswith("*")
        return replace(self, name=f"{self.name}*" if is_other else self.name, max_tiles=number)

    def clean(self, text: str) -> str:
        """Return an expression as this protocol reads it."""
        return text.lower().strip().rstrip(".").strip() if self.text == "lower_strip" else text


PRESETS: Mapping[str, Protocol] = {
    "dual_loop": Protocol(),
    "generated": Protocol("generated", seg="generated"),
    # LISA gives "[SEG]." in the answer and sums polygons; expressions are lower-cased and stripped.
    "lisa": Protocol("lisa", seg="forced", text="lower_strip", polygons="summed", question="output"),
    # Sa2VA cuts images into tiles, writes the answer, unites all masks of it, and sums polygons.
    "sa2va": Protocol("sa2va", seg="generated", join="union", polygons="summed", question="segment", max_tiles=12),
    # UniPixel writes the answer and takes the first mask.
    "unipixel": Protocol("unipixel", seg="generated", join="first", question="segment"),
}

CHOICES: Mapping[str, tuple[str, ...]] = {
    "seg": ("forced", "generated"),
    "join": ("union", "first"),
    "text": ("as_is", "lower_strip"),
    "polygons": ("union", "summed"),
    "question": tuple(SEGMENT_QUESTIONS),
}


def choose_protocol(preset: str, changes: Mapping[str, str | bool | None]) -> Protocol:
    """Return a preset with some switches changed (None leaves one alone).

    Raises:
        ConfigError: an unknown preset or value.
    """
    if preset not in PRESETS:
        raise ConfigError(explain("unknown protocol", "--protocol", preset, ", ".join(PRESETS)))
    protocol = PRESETS[preset]
    wanted: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    for key, value in wanted.items():
        if key in CHOICES and value not in CHOICES[key]:
            raise ConfigError(explain("unknown choice", f"--{key}", value, ", ".join(CHOICES[key])))
    changed = {key: value for key, value in wanted.items() if getattr(protocol, key) != value}
    return replace(protocol, **{**changed, "name": f"{preset}*"}) if changed else protocol

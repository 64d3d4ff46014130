"""Generated scenes with exact masks and true captions: coloured symbols on dull backgrounds.

A scene depends on its seed alone. Random numbers come from one numpy generator, and all drawing is integer or plain
IEEE arithmetic on glyphs of DejaVu Sans (which ships with matplotlib), so the same seed gives the same scene on every
machine with the same Pillow.

The caption of an object is ``the {colour} {shape}``. Two objects of a scene never share both, unless they are made
as *twins*; then, and only then, the caption has one further word: the size where the sizes differ clearly, else the
side on which the object lies. So every object has exactly one right caption, and exact match is a fair measure.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from dual_loop.drawing import dejavu_font

GENERATOR_VERSION = 2

_SHAPES = ("star", "heart", "cloud", "umbrella", "cross", "moon", "flag", "triangle")
GLYPHS = dict(zip(_SHAPES, "\u2605\u2665\u2601\u2602\u271a\u2768\u2691\u25b2", strict=True))
"""Shape names and the character of DejaVu Sans that draws each."""

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 180),
    "cyan": (40, 200, 215),
}
"""Colour names and RGB in 0..255."""

SIDES = (128, 144, 160)
"""Canvas heights and widths, in pixels."""
NUM_OBJECTS = (2, 4)
"""Fewest and most objects of a scene."""
SIZES = (34.0, 56.0)
"""Smallest and largest nominal size of an object (:class:`SceneObject`), at a canvas side of 144 pixels."""
TWIN_PROBABILITY = 0.12
"""Chance that a scene has a pair of twins: two objects of one shape and one colour."""
SHARE_PROBABILITY = 0.6
"""Chance that a new object that is no twin shares shape or colour with an earlier one."""
SCENE_OPTIONS = {
    "shapes": tuple(GLYPHS),
    "colours": tuple(COLOURS),
    "sizes": SIZES,
    "twin_probability": TWIN_PROBABILITY,
    "share_probability": SHARE_PROBABILITY,
    "min_objects": NUM_OBJECTS[0],
    "max_objects": NUM_OBJECTS[1],
    "sides": SIDES,
}
"""All of that, as data sets record it."""

POSITION_WORDS = ("left", "right", "top", "bottom")
SIZE_WORDS = ("small", "large")

REFERENCE_SIDE = 144
CLEAR_SIZE_RATIO = 1.35
CLEAR_OFFSET = 0.25
CLEAR_AXIS_MARGIN = 0.12
MIN_VISIBLE_FRACTION = 0.45
MIN_VISIBLE_PIXELS = 60
LAYOUTS_PER_DRAW = 25
_GLYPH_SIDE = 160
_EDGE = 2


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        shape, colour: names from :data:`GLYPHS` and :data:`COLOURS`.
        size: nominal size in pixels; the longer side is 0.9 of it for square glyphs, up to 1.2 for narrow ones.
        centre: (x, y) in pixels, of the whole object, also where a part is covered.
        qualifier: ``""``, or the word that tells twins apart (:data:`SIZE_WORDS` or :data:`POSITION_WORDS`).
        mask: (H, W) bool, the visible pixels.
        visible_fraction: visible pixels over all pixels of the object, 0..1.
    """

    shape: str
    colour: str
    size: float
    centre: tuple[float, float]
    qualifier: str
    mask: np.ndarray
    visible_fraction: float

    @property
    def caption(self) -> str:
        """The one right caption of the object in its scene."""
        if self.qualifier in POSITION_WORDS:
            where = "on the" if self.qualifier in ("left", "right") else "at the"
            return f"the {self.colour} {self.shape} {where} {self.qualifier}"
        return " ".join(word for word in ("the", self.qualifier, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """An image with its objects, drawn in their order (a later object covers an earlier one).

    Attributes:
        image: (H, W, 3) uint8 RGB.
        objects: N objects; their masks are disjoint.
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]

    @property
    def captions(self) -> tuple[str, ...]:
        """N captions, no two alike."""
        return tuple(item.caption for item in self.objects)

    @property
    def masks(self) -> np.ndarray:
        """(N, H, W) bool."""
        return np.stack([item.mask for item in self.objects])


class _Look(NamedTuple):
    """What an object keeps when it moves: shape, colour, size at side 144, and the kind of twin it is."""

    shape: str
    colour: str
    size: float
    twin: str  # "", "size" or "position"


_Stamp = tuple[Image.Image, tuple[int, int]]
"""A drawn object: an "L" image of coverage 0..255, and the (x, y) pixel of its upper left corner."""


class _Place(NamedTuple):
    x: float
    y: float
    rotation: float
    size: float


def pool_seed(seed: int, pool: str, index: int) -> int:
    """Return the scene seed of entry ``index`` of a named pool, such as ``"refcoco/val"``: 63 bits of a SHA-256.

    Different pools of one ``seed`` have different scenes, so training and held-out data cannot overlap.
    """
    digest = hashlib.sha256(f"{seed}/{pool}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generate_scene(seed: int) -> Scene:
    """Return the scene of ``seed``: a pure function of it."""
    (scene,) = _generate(seed, 1)
    return scene


def generate_pair(seed: int) -> tuple[Scene, Scene]:
    """Return two scenes with the same objects in the same order, moved and on a new background.

    All objects change size by one common factor, so a size word is true in both scenes. A position word is true in
    its own scene only: choose the region among :func:`movable_objects`, of which there is at least one.
    """
    first, second = _generate(seed, 2)
    return first, second


def _generate(seed: int, count: int) -> list[Scene]:
    """Return ``count`` scenes of the same objects."""
    rng = np.random.default_rng(seed)
    while True:
        looks = _choose_looks(rng)
        if count > 1 and all(look.twin == "position" for look in looks):
            continue
        # Objects that were drawn get several layouts, or twins would be rarer than their probability says.
        for _ in range(LAYOUTS_PER_DRAW):
            scenes: list[Scene] = []
            while len(scenes) < count and (scene := _try_scene(rng, looks)) is not None:
                scenes.append(scene)
            if len(scenes) == count:
                return scenes


def movable_objects(scene: Scene) -> tuple[int, ...]:
    """Return the indices of the objects whose caption has no position word, so that it outlives a move."""
    return tuple(i for i, item in enumerate(scene.objects) if item.qualifier not in POSITION_WORDS)


def _choose_looks(rng: np.random.Generator) -> list[_Look]:
    """Draw shape, colour and size of all objects; at most two of them are twins."""
    low, high = SIZES
    looks: list[_Look] = []
    fewest, most = NUM_OBJECTS
    num_objects = int(rng.integers(fewest, most + 1))
    has_twins = rng.random() < TWIN_PROBABILITY
    for _ in range(num_objects - has_twins):
        shape, colour = _choose_new_pair(rng, looks)
        looks.append(_Look(shape, colour, float(rng.uniform(low, high)), ""))
    if has_twins:  # a twin of an earlier object: both clearly different in size for one half, alike for the other
        index = int(rng.integers(len(looks)))
        ratio = 1.4
        if rng.random() < 0.5:
            small = float(rng.uniform(low, high / ratio))
            sizes = [small, float(rng.uniform(small * ratio, high))]
            rng.shuffle(sizes)
            kind = "size"
        else:
            sizes = [looks[index].size, min(looks[index].size * float(rng.uniform(0.95, 1.05)), high)]
            kind = "position"
        looks[index] = looks[index]._replace(size=sizes[0], twin=kind)
        looks.append(looks[index]._replace(size=sizes[1]))
    order = rng.permutation(len(looks))
    return [looks[int(i)] for i in order]


def _choose_new_pair(rng: np.random.Generator, looks: list[_Look]) -> tuple[str, str]:
    """Draw a pair of shape and colour that no earlier object has; it shares one of them, or neither, as drawn."""
    used = {(look.shape, look.colour) for look in looks}
    shapes, colours = {look.shape for look in looks}, {look.colour for look in looks}
    free = [(s, c) for s in GLYPHS for c in COLOURS if (s, c) not in used]
    wants_shared = bool(looks) and rng.random() < SHARE_PROBABILITY
    # Sharing is tried first with one attribute drawn at random, so that a shared shape is as common as a shared
    # colour although there are more shapes than colours.
    by_shape = rng.random() < 0.5
    if wants_shared:
        kept = [p for p in free if (p[0] in shapes if by_shape else p[1] in colours)]
    else:
        kept = [p for p in free if p[0] not in shapes and p[1] not in colours]
    kept = kept or free
    return kept[int(rng.integers(len(kept)))]


def _try_scene(rng: np.random.Generator, looks: list[_Look]) -> Scene | None:
    """Place and draw ``looks``; None where twins cannot be told apart or an object is covered too much."""
    height, width = (int(rng.choice(SIDES)) for _ in range(2))
    places = _choose_places(rng, looks, height, width)
    qualifiers = _choose_qualifiers(looks, places, height, width)
    if qualifiers is None:
        return None
    stamps: list[_Stamp] = []
    for look, place in zip(looks, places, strict=True):
        turned = _glyph(look.shape).rotate(place.rotation, Image.Resampling.BILINEAR, expand=True)
        factor = place.size / _GLYPH_SIDE
        size = (max(1, round(turned.width * factor)), max(1, round(turned.height * factor)))
        corner = (round(place.x - size[0] / 2), round(place.y - size[1] / 2))
        stamps.append((turned.resize(size, Image.Resampling.BOX), corner))
    covered = np.zeros((height, width), bool)
    objects: list[SceneObject] = []
    for look, place, word, stamp in reversed(list(zip(looks, places, qualifiers, stamps, strict=True))):
        canvas = Image.new("L", (width, height))
        canvas.paste(*stamp)
        whole = np.asarray(canvas) >= 128  # the pixels that the object covers by half or more
        mask = whole & ~covered  # later objects are in front
        covered = covered | whole
        seen, full = int(mask.sum()), int(whole.sum())
        if seen < MIN_VISIBLE_PIXELS or seen < MIN_VISIBLE_FRACTION * full:
            return None
        centre = (place.x, place.y)
        objects.append(SceneObject(look.shape, look.colour, place.size, centre, word, mask, seen / full))
    return Scene(_paint(rng, looks, stamps, height, width), tuple(reversed(objects)))


def _choose_places(rng: np.random.Generator, looks: list[_Look], height: int, width: int) -> list[_Place]:
    """Give each object a slot of a 2x2 layout, jittered so that neighbours sometimes overlap."""
    scale = float(rng.uniform(0.92, 1.08)) * min(height, width) / REFERENCE_SIDE
    # Most scenes keep near their slots, which a small model learns in minutes; some are crowded, and objects overlap.
    jitter = 0.2 if rng.random() < 0.3 else 0.08
    slots = rng.permutation(4)[: len(looks)]
    places = []
    for look, slot in zip(looks, slots, strict=True):
        size = look.size * scale
        rotation = float(rng.uniform(-15, 15))
        jitter_x, jitter_y = rng.uniform(-jitter, jitter, size=2)
        glyph = _glyph(look.shape)
        long, high = glyph.width * size / _GLYPH_SIDE, glyph.height * size / _GLYPH_SIDE
        cosine, sine = abs(math.cos(math.radians(rotation))), abs(math.sin(math.radians(rotation)))
        half_width, half_height = (long * cosine + high * sine) / 2, (long * sine + high * cosine) / 2
        x = (0.25 + 0.5 * (int(slot) % 2) + float(jitter_x)) * width
        y = (0.25 + 0.5 * (int(slot) // 2) + float(jitter_y)) * height
        x = min(max(x, half_width + _EDGE), width - half_width - _EDGE)
        y = min(max(y, half_height + _EDGE), height - half_height - _EDGE)
        places.append(_Place(x, y, rotation, size))
    return places


def _choose_qualifiers(looks: list[_Look], places: list[_Place], height: int, width: int) -> list[str] | None:
    """Return the further word of each object, None where twins cannot be told apart clearly by their place."""
    words = [""] * len(looks)
    pair = [i for i, look in enumerate(looks) if look.twin]
    if not pair:
        return words
    first, second = pair
    if looks[first].twin == "size":
        is_small = places[first].size < places[second].size
        words[first], words[second] = SIZE_WORDS if is_small else SIZE_WORDS[::-1]
        return words
    offset_x = (places[second].x - places[first].x) / width
    offset_y = (places[second].y - places[first].y) / height
    if max(abs(offset_x), abs(offset_y)) < CLEAR_OFFSET or abs(abs(offset_x) - abs(offset_y)) < CLEAR_AXIS_MARGIN:
        return None
    horizontal = abs(offset_x) > abs(offset_y)
    low_word, high_word = POSITION_WORDS[:2] if horizontal else POSITION_WORDS[2:]
    first_is_low = (offset_x if horizontal else offset_y) > 0
    words[first], words[second] = (low_word, high_word) if first_is_low else (high_word, low_word)
    return words


@cache
def _glyph(shape: str) -> Image.Image:
    """Return the glyph at nominal size 160 px, cropped to its ink, as an "L" image (0..255 is coverage)."""
    canvas = Image.new("L", (640, 640))
    font = dejavu_font(256, ImageFont.Layout.BASIC)
    ImageDraw.Draw(canvas).text((160, 128), GLYPHS[shape], font=font, fill=255)
    ink = canvas.crop(canvas.getbbox())
    # Narrow glyphs (moon, cloud) are drawn longer, or they would have a fraction of the others' area.
    aspect = min(ink.size) / max(ink.size)
    factor = min(1.2, 0.9 / math.sqrt(aspect)) * _GLYPH_SIDE / max(ink.size)
    size = (max(1, round(ink.width * factor)), max(1, round(ink.height * factor)))
    return ink.resize(size, Image.Resampling.BOX)


def _paint(rng: np.random.Generator, looks: list[_Look], stamps: list[_Stamp], height: int, width: int) -> np.ndarray:
    """Return the (H, W, 3) uint8 image: background, objects with a darker rim, then noise of +-5 on every value."""
    canvas = Image.fromarray(_background(rng, height, width))
    for look, (coverage, corner) in zip(looks, stamps, strict=True):
        shifted = np.asarray(COLOURS[look.colour]) + rng.integers(-14, 15, size=3)
        fill = tuple(int(value) for value in np.clip(shifted, 0, 255))
        # The rim shows where one object ends and another of the same colour begins.
        canvas.paste(tuple(value * 7 // 10 for value in fill), corner, coverage)
        canvas.paste(fill, corner, coverage.filter(ImageFilter.MinFilter(3)))
    noise = rng.integers(-5, 6, size=(height, width, 3), dtype=np.int8)
    image: np.ndarray = np.clip(np.asarray(canvas, np.int16) + noise, 0, 255).astype(np.uint8)
    return image


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return (H, W, 3) uint8: two dull colours mixed by a gradient, stripes, smooth noise or blotches."""
    first, second = (int(rng.integers(60, 215)) + rng.integers(-10, 11, size=3) for _ in range(2))
    kind = int(rng.integers(4))
    rows, columns = np.ogrid[0:height, 0:width]
    angle = float(rng.uniform(0, math.pi))
    along = rows * math.sin(angle) + columns * math.cos(angle)
    if kind == 0:
        mix = (along - along.min()) / (along.max() - along.min())
    elif kind == 1:
        period = float(rng.uniform(8, 40))
        mix = np.abs((along / period) % 2 - 1)
    else:
        cells = int(rng.integers(3, 12 if kind == 2 else 7))
        coarse = Image.fromarray(rng.integers(0, 256, size=(cells, cells), dtype=np.uint8))
        mix = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / 255
        if kind == 3:
            mix = np.clip((mix - 0.5) * 6 + 0.5, 0, 1)
    # Full contrast would draw edges as strong as the objects' own.
    strength = float(rng.uniform(0.25, 0.6))
    steps = np.linspace(0, strength, 256)[:, None]
    palette = (first * (1 - steps) + second * steps).astype(np.uint8)
    background: np.ndarray = palette[(mix * 255).astype(np.uint8)]
    return background

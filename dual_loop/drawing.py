"""Masks drawn on images, and panels of a region: for runs, pages and reports."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GIVEN_COLOUR = (255, 140, 0)
"""Of masks that were given."""
PREDICTED_COLOUR = (0, 170, 255)
"""Of masks that a model drew."""

PANEL_SIDE = 256
GAP = 8
FONT_SIZE = 14
LINE_HEIGHT = 18
TITLE_HEIGHT = 2 * LINE_HEIGHT + 6
COLUMNS = 66
"""Characters of a line of the caption."""


@dataclass(frozen=True)
class Panel:
    """One region to be drawn.

    Attributes:
        name: ``source/sample_id#region_id``.
        image: (H, W, 3) uint8, the image that was captioned. mask: (H, W) bool on it.
        caption: what step 1 wrote, or the data set's own words.
        origin: where the caption came from: ``generated``, ``reference`` or ``rejected``.
        target_image: (H2, W2, 3) uint8, the image that was segmented. target_mask: (H2, W2) bool on it.
        predicted_mask: (H2, W2) bool, mask'.
        iou: of mask' and the target mask, 0..1.
    """

    name: str
    image: np.ndarray
    mask: np.ndarray
    caption: str
    origin: str
    target_image: np.ndarray
    target_mask: np.ndarray
    predicted_mask: np.ndarray
    iou: float


def overlay(
    image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], side: int, outline: np.ndarray | None = None
) -> Image.Image:
    """Tint ``mask`` on ``image`` and fit it into a square of ``side`` pixels; the aspect ratio is kept.

    A white line around the border shows the mask also where the object has its colour.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) bool.
        colour: of the tint and of the mask's border.
        side: longer side of the result in pixels.
        outline: (H, W) bool, drawn as a thin border in the colour of given masks.
    """
    scale = side / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)).astype(np.float32)
    inside = _resize_mask(mask, size)
    pixels[inside] = 0.45 * pixels[inside] + 0.55 * np.array(colour, dtype=np.float32)
    pixels[_border(~inside)] = 255
    pixels[_border(inside)] = colour
    if outline is not None:
        pixels[_border(_resize_mask(outline, size))] = GIVEN_COLOUR
    return Image.fromarray(pixels.astype(np.uint8))


def draw_panel(panel: Panel) -> Image.Image:
    """Draw image + mask and target image + mask' side by side, over the caption; images keep their aspect ratio."""
    given = overlay(panel.image, panel.mask, GIVEN_COLOUR, PANEL_SIDE)
    back = overlay(panel.target_image, panel.predicted_mask, PREDICTED_COLOUR, PANEL_SIDE, outline=panel.target_mask)
    lines = textwrap.wrap(panel.caption, COLUMNS) or ["(empty)"]
    height = max(given.height, back.height)
    bottom = TITLE_HEIGHT + height + GAP
    size = (2 * PANEL_SIDE + 3 * GAP, bottom + (1 + len(lines)) * LINE_HEIGHT + GAP)
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), dejavu_font(FONT_SIZE)
    draw.text((GAP, 4), f"{panel.name}   IoU {panel.iou:.3f}", fill="black", font=font)
    columns = (("given mask", GIVEN_COLOUR, given), ("mask' (the given one outlined)", PREDICTED_COLOUR, back))
    for column, (title, colour, picture) in enumerate(columns):
        start = GAP + column * (PANEL_SIDE + GAP)
        draw.rectangle((start, 8 + LINE_HEIGHT, start + 9, 17 + LINE_HEIGHT), fill=colour)
        draw.text((start + 15, 4 + LINE_HEIGHT), title, fill="#555555", font=font)
        left, top = start + (PANEL_SIDE - picture.width) // 2, TITLE_HEIGHT + (height - picture.height) // 2
        canvas.paste(picture, (left, top))
    draw.text((GAP, bottom), f"caption ({panel.origin})", fill="#555555", font=font)
    draw.multiline_text((GAP, bottom + LINE_HEIGHT), "\n".join(lines), fill="black", font=font, spacing=4)
    return canvas


def save_panels(panels: Sequence[Panel], folder: Path, name: str) -> None:
    """Write ``<name>_<n>.png`` for each panel below ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, panel in enumerate(panels):
        draw_panel(panel).save(folder / f"{name}_{index}.png")


def dejavu_font(size: int, layout: ImageFont.Layout | None = None) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans at ``size`` pixels: matplotlib ships it, so text looks the same on every machine."""
    import matplotlib  # here, because training draws seldom and need not hold it

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=layout)


def _resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)) >= 128


def _border(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of ``mask`` with a neighbour outside of it."""
    padded = np.pad(mask, 1, mode="edge")
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(mask & ~core)

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

PANEL_SIDE = 320
GAP = 8
FONT_SIZE = 14
LINE_HEIGHT = 18
TITLE_HEIGHT = 2 * LINE_HEIGHT + 6


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
    pixels[_border(inside)] = colour
    if outline is not None:
        pixels[_border(_resize_mask(outline, size))] = GIVEN_COLOUR
    return Image.fromarray(pixels.astype(np.uint8))


def draw_panel(panel: Panel) -> Image.Image:
    """Draw image + mask, the caption, and target image + mask' side by side; images keep their aspect ratio."""
    left = overlay(panel.image, panel.mask, GIVEN_COLOUR, PANEL_SIDE)
    right = overlay(panel.target_image, panel.predicted_mask, PREDICTED_COLOUR, PANEL_SIDE, outline=panel.target_mask)
    lines = textwrap.wrap(panel.caption, 38) or ["(empty)"]
    height = max(left.height, right.height, len(lines) * LINE_HEIGHT)
    canvas = Image.new("RGB", (3 * PANEL_SIDE + 4 * GAP, TITLE_HEIGHT + height + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), dejavu_font(FONT_SIZE)
    starts = [GAP + column * (PANEL_SIDE + GAP) for column in range(3)]
    for start, picture in ((starts[0], left), (starts[2], right)):
        centred = start + (PANEL_SIDE - picture.width) // 2, TITLE_HEIGHT + (height - picture.height) // 2
        canvas.paste(picture, centred)
    draw.text((GAP, 4), f"{panel.name}   IoU {panel.iou:.3f}", fill="black", font=font)
    titles = ("image and mask", f"caption ({panel.origin})", "mask' (target outlined)")
    for start, text in zip(starts, titles, strict=True):
        draw.text((start, 4 + LINE_HEIGHT), text, fill="#555555", font=font)
    top = TITLE_HEIGHT + (height - len(lines) * LINE_HEIGHT) // 2
    draw.multiline_text((starts[1] + GAP, top), "\n".join(lines), fill="black", font=font, spacing=4)
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
    """Return the pixels of ``mask`` with a neighbour outside of it (the rim of the picture counts as outside)."""
    padded = np.pad(mask, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(mask & ~core)

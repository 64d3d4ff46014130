"""Masks drawn on images, and images as text: for panels, pages and reports."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

GIVEN_COLOUR = (255, 140, 0)
"""Of masks that were given."""
PREDICTED_COLOUR = (0, 170, 255)
"""Of masks that a model drew."""


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    colour: tuple[int, int, int],
    side: int,
    outline: np.ndarray | None = None,
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


def dejavu_font(size: int, layout: ImageFont.Layout | None = None) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans at ``size`` pixels: matplotlib ships it, so text looks the same on every machine."""
    import matplotlib  # here, because training draws seldom and need not hold it

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=layout)


def data_uri(picture: Image.Image, quality: int = 80) -> str:
    """Return a picture as a ``data:`` address with a JPEG inside, for pages that stand alone."""
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)) >= 128


def _border(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of ``mask`` with a neighbour outside of it (the rim of the picture counts as outside)."""
    padded = np.pad(mask, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(mask & ~core)

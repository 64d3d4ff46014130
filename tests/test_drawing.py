"""Panels: geometry, and colours where the masks are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dual_loop.drawing import (
    GAP,
    GIVEN_COLOUR,
    LINE_HEIGHT,
    PANEL_SIDE,
    TITLE_HEIGHT,
    Panel,
    draw_panel,
    overlay,
    save_panels,
)


def _panel(caption: str = "a red star") -> Panel:
    image = np.zeros((80, 160, 3), np.uint8)
    left, right = np.zeros((80, 160), bool), np.zeros((80, 160), bool)
    left[:, :80], right[:, 80:] = True, True
    return Panel("sav/a#0", image, left, caption, "generated", image, right, right, 0.5)


def test_masks_are_tinted_where_they_lie_and_images_keep_their_aspect() -> None:
    pixels = np.asarray(draw_panel(_panel()))
    assert pixels.shape[1] == 2 * PANEL_SIDE + 3 * GAP
    height = PANEL_SIDE // 2  # the image is twice as wide as high
    assert pixels.shape[0] == TITLE_HEIGHT + height + 2 * GAP + 2 * LINE_HEIGHT
    first = pixels[TITLE_HEIGHT : TITLE_HEIGHT + height, GAP : GAP + PANEL_SIDE]
    middle, quarter = height // 2, PANEL_SIDE // 4
    assert first[middle, quarter, 0] > 100  # orange on the left half
    assert not first[middle, 3 * quarter].any()
    second = pixels[TITLE_HEIGHT : TITLE_HEIGHT + height, PANEL_SIDE + 2 * GAP :]
    assert second[middle, 3 * quarter, 2] > 100
    assert not second[middle, quarter].any()


def test_a_mask_shows_on_an_object_of_its_colour() -> None:
    image = np.full((40, 40, 3), GIVEN_COLOUR, np.uint8)
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    drawn = np.asarray(overlay(image, mask, GIVEN_COLOUR, 40))
    assert (drawn[9, 10:30] == 255).all()
    assert (drawn[11:29, 11:29] >= np.array(GIVEN_COLOUR) - 1).all()


def test_caption_is_drawn_and_long_or_empty_ones_fit() -> None:
    plain = draw_panel(_panel("x"))
    for caption in ("", "naïve ★ 星"):
        assert draw_panel(_panel(caption)).tobytes() != plain.tobytes()
    long = draw_panel(_panel("word " * 60))
    assert long.height > plain.height


def test_files_are_numbered(tmp_path: Path) -> None:
    save_panels([_panel(), _panel()], tmp_path / "panels", "step_000012")
    paths = sorted((tmp_path / "panels").iterdir())
    assert [path.name for path in paths] == ["step_000012_0.png", "step_000012_1.png"]
    assert Image.open(paths[1]).size[0] == 2 * PANEL_SIDE + 3 * GAP

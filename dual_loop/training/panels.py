"""Example panels: what was captioned, what was said, what was segmented."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from dual_loop.drawing import GIVEN_COLOUR, PREDICTED_COLOUR, dejavu_font, overlay
from dual_loop.metrics import iou, mask_overlap
from dual_loop.types import PackedBatch, RegionSample, Segmentation

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


def make_panel(packed: PackedBatch, masks: Segmentation, samples: Sequence[RegionSample], region: int) -> Panel:
    """Collect what is drawn of one region (its position in the micro-batch)."""
    batch, caption = packed.batch, packed.captions[region]
    image = int(batch.region_image[region])
    first = int((batch.region_image < image).sum())
    sample, position = samples[image], region - first
    name = f"{sample.source}/{sample.sample_id}#{sample.region_ids[position]}"
    if name != batch.region_names[region]:
        raise RuntimeError(f"the panel of {batch.region_names[region]} would show {name}: the data changed on the disk")
    target = sample.segmentation_masks[position]
    predicted = mask_at_size(masks.mask_logits[region], *target.shape)
    overlap = mask_overlap(predicted[None], target[None])
    origin = "reference" if caption.is_reference else "rejected" if caption.rejected else "generated"
    return Panel(
        name=name,
        image=sample.image,
        mask=sample.masks[position],
        caption=caption.text,
        origin=origin,
        target_image=sample.segmentation_image,
        target_mask=target,
        predicted_mask=predicted,
        iou=float(iou(*overlap)[0]),
    )


def draw_panel(panel: Panel) -> Image.Image:
    """Draw image + mask, the caption, and target image + mask' side by side; images keep their aspect ratio."""
    left = overlay(panel.image, panel.mask, GIVEN_COLOUR, PANEL_SIDE)
    right = overlay(panel.target_image, panel.predicted_mask, PREDICTED_COLOUR, PANEL_SIDE, outline=panel.target_mask)
    lines = textwrap.wrap(panel.caption, 38) or ["(empty)"]
    height = max(left.height, right.height, len(lines) * LINE_HEIGHT)
    canvas = Image.new("RGB", (3 * PANEL_SIDE + 4 * GAP, TITLE_HEIGHT + height + GAP), "white")
    draw, font = ImageDraw.Draw(canvas), dejavu_font(FONT_SIZE)
    _paste_centred(canvas, left, 0, height)
    _paste_centred(canvas, right, 2, height)
    draw.text((GAP, 4), f"{panel.name}   IoU {panel.iou:.3f}", fill="black", font=font)
    for column, text in enumerate(("image and mask", f"caption ({panel.origin})", "mask' (target outlined)")):
        draw.text((_left_of(column), 4 + LINE_HEIGHT), text, fill="#555555", font=font)
    top = TITLE_HEIGHT + (height - len(lines) * LINE_HEIGHT) // 2
    draw.multiline_text((_left_of(1) + GAP, top), "\n".join(lines), fill="black", font=font, spacing=4)
    return canvas


def save_panels(panels: Sequence[Panel], folder: Path, step: int) -> list[Path]:
    """Write ``step_000123_<n>.png`` for each panel below ``folder`` and return the paths."""
    return save_named_panels(panels, folder, f"step_{step:06d}")


def save_named_panels(panels: Sequence[Panel], folder: Path, name: str) -> list[Path]:
    """Write ``<name>_<n>.png`` for each panel below ``folder`` and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{index}.png" for index in range(len(panels))]
    for panel, path in zip(panels, paths, strict=True):
        draw_panel(panel).save(path)
    return paths


def mask_at_size(mask_logits: torch.Tensor, height: int, width: int) -> np.ndarray:
    """Resize one mask's logits (Q, Q) bilinearly to (height, width) and cut at 0, as evaluation does; bool."""
    resized = F.interpolate(mask_logits[None, None].float(), (height, width), mode="bilinear", align_corners=False)
    return np.asarray((resized[0, 0] > 0).cpu().numpy())


def choose_regions(sources: Sequence[str], limit: int) -> list[int]:
    """Pick up to ``limit`` positions so that every source comes once before any comes twice."""
    seen: dict[str, int] = {}
    ranked = []
    for position, source in enumerate(sources):
        ranked.append((seen.get(source, 0), position))
        seen[source] = seen.get(source, 0) + 1
    return [position for _, position in sorted(ranked)[:limit]]


def _left_of(column: int) -> int:
    return GAP + column * (PANEL_SIDE + GAP)


def _paste_centred(canvas: Image.Image, picture: Image.Image, column: int, height: int) -> None:
    x = _left_of(column) + (PANEL_SIDE - picture.width) // 2
    canvas.paste(picture, (x, TITLE_HEIGHT + (height - picture.height) // 2))

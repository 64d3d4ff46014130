"""A page of what the model really sees: the tiles, the prompt grid on them, the grounding image with its target."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dual_loop.data.masks import resize_mask
from dual_loop.data.prepare import IMAGENET_MEAN, IMAGENET_STD, Geometry
from dual_loop.data.reader import Reader
from dual_loop.drawing import GIVEN_COLOUR, overlay
from dual_loop.errors import SampleError
from dual_loop.html import Figure, Page
from dual_loop.iteration import evenly_spread
from dual_loop.preflight.data_checks import read_entry
from dual_loop.types import Batch, RegionSample

SIDE = 260


def preview_page(sources: Sequence[Reader], count: int, geometry: Geometry, seed: int) -> str:
    """Return a page with ``count`` entries of every source, evenly spread, prepared exactly as training does."""
    lead = f"vision tiles of {geometry.vision_image_size} pixels, prompt grid {geometry.grid_size} x "
    lead += f"{geometry.grid_size}, grounding image {geometry.grounding_size}, target {geometry.mask_size} x "
    page = Page("What the model really sees", f"{lead}{geometry.mask_size}")
    for source in sources:
        page.heading(f"{source.name}: {len(source):,} entries")
        figures: list[Figure] = []
        for index in evenly_spread(len(source), count):
            try:
                sample, prepared = read_entry(source, index, geometry, seed)
            except SampleError as error:
                page.text(f"{source.entry_id(index)} is skipped ({error.reason}): {error}", "bad")
                continue
            figures += [_region(sample, prepared, place, geometry) for place in range(sample.num_regions)]
        page.gallery(figures, is_wide=True)
    return page.html()


def _region(sample: RegionSample, prepared: Batch, place: int, geometry: Geometry) -> Figure:
    """Draw one region: the image, the last tile with the kept grid cells, the grounding image with the target."""
    grid = prepared.prompt_masks[place].numpy()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (prepared.pixel_values[prepared.tiles_per_view[0] - 1] * std + mean) * 255
    tile = pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    grounding = prepared.g_pixel_values[0].permute(1, 2, 0).contiguous().numpy()
    target = prepared.binary_targets[place].numpy()
    pictures = [
        overlay(sample.image, sample.masks[place], GIVEN_COLOUR, SIDE),
        overlay(tile, resize_mask(grid, tile.shape[:2]), GIVEN_COLOUR, SIDE),
        overlay(grounding, resize_mask(target, grounding.shape[:2]), GIVEN_COLOUR, SIDE),
    ]
    rescued = ", rescued" if bool(prepared.grid_rescued[place]) else ""
    height, width = sample.image.shape[:2]
    lines = [
        prepared.region_names[place],
        f"{width} x {height} pixels, {prepared.tiles_per_view[0]} tile(s), {int(grid.sum())} grid cells{rescued}, "
        f"target {int(target.sum())} of {target.size} pixels",
        f"caption: {prepared.captions[place] or 'none, step 1 writes it'}",
    ]
    if sample.target_image is not None:
        lines.append("frame pair: captioned on the first, segmented on the second")
    return Figure(pictures, lines)

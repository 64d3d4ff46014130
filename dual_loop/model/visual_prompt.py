"""Region prompts: copies of image tokens, put into the embedding sequence where the placeholders stand.

``<vp><IMG_CONTEXT>*K</vp>`` holds K placeholders, one for each true cell of the region's mask on the G x G token grid.
They are filled with copies of the image's own tokens at those cells (Sa2VA's visual prompt; nothing is learned for it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dual_loop.data.masks import pool_mask_to_grid
from dual_loop.errors import PromptError, explain
from dual_loop.model.hardware import send

__all__ = ["pool_mask_to_grid", "insert_image_tokens"]


def insert_image_tokens(
    inputs_embeds: Tensor,
    placeholder: Tensor,
    image_features: Tensor,
    region_tile: Tensor,
    prompt_masks: Tensor,
    has_images: bool = True,
) -> Tensor:
    """Put image and region tokens at the placeholders, in reading order over the flattened batch.

    What says where they go may lie on the host; then nothing waits for the device.

    Args:
        inputs_embeds: (B, L, D) token embeddings.
        placeholder: (B, L) bool, true at ``<IMG_CONTEXT>``.
        image_features: (T, M, D) projected image tokens, row-major on the G x G grid.
        region_tile: (N,) int64, the tile of each region prompt in the order in which they stand in the text; ascending
            where ``has_images``.
        prompt_masks: (N, G, G) bool; the tokens of a region are those under its true cells, row-major.
        has_images: the text holds every tile, before the regions that refer to it; else regions alone.

    Raises:
        PromptError: the number of placeholders is not the number of features (the original repeats or cuts silently),
            or the grid of the masks is not that of the image tokens.
    """
    num_tiles, tokens_per_tile, width = image_features.shape
    grid, tiles, device = prompt_masks.flatten(1).cpu().bool(), region_tile.cpu(), image_features.device
    if grid.shape[1] != tokens_per_tile:
        seen, expected = f"{grid.shape[1]} cells", f"{tokens_per_tile} image tokens"
        fix = "build the grid with the side that the model's geometry gives"
        raise PromptError(explain("the prompt grid does not fit the image tokens", "prompt_masks", seen, expected, fix))
    region, cell = grid.nonzero(as_tuple=True)
    source, expected = tiles[region] * tokens_per_tile + cell, f"{len(region)} cells of regions"
    if has_images:
        # After the tokens of a tile come those of the regions that refer to it.
        image = torch.arange(num_tiles * tokens_per_tile)
        order = torch.cat([image // tokens_per_tile * 2, tiles[region] * 2 + 1]).argsort(stable=True)
        source = torch.cat([image, source])[order]
        expected = f"{num_tiles} x {tokens_per_tile} + {expected} = {len(source)}"
    target = placeholder.flatten().nonzero()[:, 0].cpu()
    if len(target) != len(source):
        what = "image placeholders and image features differ in number"
        fix = "build the prompt from the same prompt masks that are given to the model"
        raise PromptError(explain(what, "input_ids", f"{len(target)} <IMG_CONTEXT> tokens", expected, fix))
    features = image_features.reshape(-1, width)[send(source, device)].to(inputs_embeds.dtype)
    return inputs_embeds.flatten(0, 1).index_copy(0, send(target, device), features).view_as(inputs_embeds)

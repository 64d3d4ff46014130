"""Region prompts: copies of image tokens, put into the embedding sequence where the placeholders stand.

``<vp><IMG_CONTEXT>*K</vp>`` holds K placeholders, one for each true cell of the region's mask on the G x G token grid.
They are filled with copies of the image's own tokens at those cells (Sa2VA's visual prompt; nothing is learned for it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dual_loop.data.masks import pool_mask_to_grid
from dual_loop.errors import PromptError, explain

__all__ = ["pool_mask_to_grid", "region_features", "insert_image_tokens", "fill_placeholders"]


def region_features(image_features: Tensor, region_tile: Tensor, prompt_masks: Tensor) -> Tensor:
    """Collect the image tokens under each region's mask, region by region, row-major inside a region.

    Args:
        image_features: (T, M, D) projected image tokens, row-major on the G x G grid.
        region_tile: (N,) int64, the tile that each region refers to.
        prompt_masks: (N, G, G) bool.

    Returns:
        (number of true cells, D).
    """
    grid = prompt_masks.flatten(1).to(device=image_features.device, dtype=torch.bool)
    if grid.shape[1] != image_features.shape[1]:
        seen, expected = f"{grid.shape[1]} cells", f"{image_features.shape[1]} image tokens"
        fix = "build the grid with the side that the model's geometry gives"
        raise PromptError(explain("the prompt grid does not fit the image tokens", "prompt_masks", seen, expected, fix))
    region, cell = grid.nonzero(as_tuple=True)
    return image_features[region_tile.to(image_features.device)[region], cell]


def insert_image_tokens(
    inputs_embeds: Tensor, placeholder: Tensor, image_features: Tensor, region_tile: Tensor, prompt_masks: Tensor
) -> Tensor:
    """Put image and region tokens at the placeholders, in reading order over the flattened batch.

    Args:
        inputs_embeds: (B, L, D) token embeddings.
        placeholder: (B, L) bool, true at ``<IMG_CONTEXT>``.
        image_features: (T, M, D).
        region_tile: (N,) int64, ascending; the tile of each region prompt in the order in which they stand in the text.
        prompt_masks: (N, G, G) bool.

    Raises:
        PromptError: the number of placeholders is not the number of features (the original repeats or cuts silently).
    """
    num_tiles, tokens_per_tile, width = image_features.shape
    device = image_features.device
    cells = prompt_masks.flatten(1).sum(1).to(device)
    regions = region_features(image_features, region_tile, prompt_masks)
    # After the tokens of a tile come those of the regions that refer to it.
    image_key = torch.arange(num_tiles, device=device).repeat_interleave(tokens_per_tile) * 2
    region_key = region_tile.to(device).repeat_interleave(cells) * 2 + 1
    order = torch.cat([image_key, region_key]).argsort(stable=True)
    features = torch.cat([image_features.reshape(-1, width), regions])[order]
    expected = f"{num_tiles} x {tokens_per_tile} + {len(regions)} cells of regions = {len(features)}"
    return fill_placeholders(inputs_embeds, placeholder, features, expected)


def fill_placeholders(
    inputs_embeds: Tensor, placeholder: Tensor, features: Tensor, expected: str | None = None
) -> Tensor:
    """Put features (F, D) at the F true entries of ``placeholder`` (B, L) of embeddings (B, L, D), row by row.

    Raises:
        PromptError: the numbers differ; ``expected`` says how many there should be.
    """
    count = int(placeholder.sum())
    if count != len(features):
        what = "image placeholders and image features differ in number"
        fix = "build the prompt from the same prompt masks that are given to the model"
        expected = expected or f"{len(features)} cells of regions"
        raise PromptError(explain(what, "input_ids", f"{count} <IMG_CONTEXT> tokens", expected, fix))
    return inputs_embeds.masked_scatter(placeholder[..., None], features.to(inputs_embeds.dtype))

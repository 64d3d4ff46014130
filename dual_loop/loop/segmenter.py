"""Step 2 and 3: image + caption -> mask', and its losses against the mask.

One row an image, one branch a region (see ``model.packing``); the answer with [SEG] is given, so nothing is decoded.
Regions that have a caption of their own add a captioning branch to the same row: supervised steps that keep the
language of step 1 in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dual_loop.config import LoopConfig
from dual_loop.loop.captioner import tile_offsets
from dual_loop.model.object_count import object_multiplicity
from dual_loop.model.packing import pack_rows
from dual_loop.model.prompts import Branch, Prompter
from dual_loop.types import Batch, CaptionRollout


@dataclass
class SegmentationInputs:
    """The model's inputs for one micro-batch, with the counts that its losses will be divided by.

    Attributes:
        data: keyword tensors for ``VideoLLaVASAMModel.forward``.
        counts: items of each loss term, known before the forward pass.
    """

    data: dict[str, Any]
    counts: dict[str, float]


def segmentation_inputs(
    batch: Batch,
    rollout: CaptionRollout,
    vision_features: Tensor,
    prompter: Prompter,
    config: LoopConfig,
    num_objects: int | None = None,
) -> SegmentationInputs:
    """Build the packed rows of step 2 for one batch.

    Args:
        batch: B images with N regions.
        rollout: one caption a region; regions with ``keep`` false stay in the row with weight 0.
        vision_features: (T, M, D_vision) of all views of the batch.
        num_objects: let each image count as so many objects (``loss.num_objects``); None counts every region once.
    """
    tiles, views = _target_tiles(batch)
    rows: list[list[Branch]] = [[] for _ in batch.sources]
    prompt_tile, prompt_masks, seeds = [], [], batch.region_seeds.tolist()
    for region, image in enumerate(batch.region_image.tolist()):
        rows[image].append(_segment_branch(rollout, region, seeds[region], prompter, config))
    for region, image in _supervised_regions(batch, rollout, config):
        mask = batch.prompt_masks[region]
        rows[image].append(
            prompter.caption_branch(int(mask.sum()), rollout.captions[region], config.caption_question, seeds[region])
        )
        prompt_tile.append(views[image][-1])
        prompt_masks.append(mask)
    prefixes = [prompter.image_prefix(len(view)) for view in views]
    packed = pack_rows(prefixes, rows, prompter.tokenizer.pad_token_id or 0)
    device, side = vision_features.device, batch.prompt_masks.shape[-1]
    data: dict[str, Any] = {key: value.to(device) for key, value in packed.items()}
    data["vision_features"] = vision_features[tiles]
    data["region_tile"] = torch.tensor(prompt_tile, dtype=torch.long, device=device)
    empty = torch.zeros(0, side, side, dtype=torch.bool, device=device)
    data["prompt_masks"] = torch.stack(prompt_masks).to(device) if prompt_masks else empty
    data["g_pixel_values"] = batch.g_pixel_values
    data["masks"] = batch.target_masks
    data["region_seeds"] = batch.region_seeds
    data["region_weights"] = torch.tensor(rollout.keep, dtype=torch.float32, device=device)
    if num_objects is not None:
        repeats = object_multiplicity(batch.region_image, len(batch.sources), num_objects, batch.region_seeds)
        data["region_weights"] *= repeats.to(device)
    return SegmentationInputs(data, _counts(data))


def compute_segmentation_loss(
    model: Any,
    batch: Batch,
    rollout: CaptionRollout,
    prompter: Prompter,
    config: LoopConfig | None = None,
    vision_features: Tensor | None = None,
) -> dict[str, Any]:
    """Steps 2 and 3 for one batch: ``{"terms": {name: LossTerm}, "segmentation": Segmentation}``."""
    if vision_features is None:
        vision_features = model.encode_vision(batch.pixel_values)
    num_objects = model.loss_config.num_objects
    inputs = segmentation_inputs(batch, rollout, vision_features, prompter, config or LoopConfig(), num_objects)
    return dict(model(inputs.data, mode="terms"))


def _segment_branch(rollout: CaptionRollout, region: int, seed: int, prompter: Prompter, config: LoopConfig) -> Branch:
    caption = rollout.captions[region]
    branch = prompter.segment_branch(caption, config.segment_question, config.segment_answer, seed)
    if rollout.keep[region]:
        return branch
    # A dropped region stays in the row, so that every rank runs the same graph, but teaches nothing.
    return Branch(branch.input_ids, (-100,) * len(branch.labels))


def _supervised_regions(batch: Batch, rollout: CaptionRollout, config: LoopConfig) -> list[tuple[int, int]]:
    """Return (region, image) of regions whose own caption also trains step 1.

    Only where caption and target are on the same view: the row holds one image.
    """
    if not config.caption_supervision:
        return []
    return [
        (region, image)
        for region, image in enumerate(batch.region_image.tolist())
        if rollout.from_reference[region] and batch.caption_view[image] == batch.target_view[image]
    ]


def _target_tiles(batch: Batch) -> tuple[list[int], list[list[int]]]:
    """Return the tile indices of the target views in row order, and for each row its indices in the new order."""
    starts = tile_offsets(batch.tiles_per_view)
    tiles: list[int] = []
    views: list[list[int]] = []
    for view in batch.target_view:
        count = batch.tiles_per_view[view]
        views.append(list(range(len(tiles), len(tiles) + count)))
        tiles += range(starts[view], starts[view] + count)
    return tiles, views


def _counts(data: dict[str, Any]) -> dict[str, float]:
    objects = float(data["region_weights"].sum())
    tokens = float((data["labels"] != -100).sum())
    return {"mask_loss": objects, "dice_loss": objects, "llm_loss": tokens}


def mask_ious(mask_logits: Tensor, targets: Tensor) -> Tensor:
    """IoU (N,) of predicted masks (logits > 0) and targets at mask resolution; 1 where both are empty."""
    predicted, target = mask_logits > 0, targets > 0
    union = (predicted | target).flatten(1).sum(1)
    intersection = (predicted & target).flatten(1).sum(1)
    return torch.where(union > 0, intersection / union.clamp_min(1), torch.ones_like(union, dtype=torch.float32))


def split_by(values: Sequence[float], flags: Sequence[bool]) -> tuple[list[float], list[float]]:
    """Split ``values`` into those whose flag is true and the others."""
    pairs = list(zip(values, flags, strict=True))
    return [v for v, flag in pairs if flag], [v for v, flag in pairs if not flag]

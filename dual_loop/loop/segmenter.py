"""Step 2 and 3: image + caption -> mask', and its losses against the mask.

One row an image, one branch a region (``loop.rows``); the answer with [SEG] is given, so nothing is decoded. Regions
that have a caption of their own add a captioning branch to the same row: supervised steps that keep the language of
step 1 in place. Captions that earned an advantage add one too (``loop.policy``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dual_loop.config import LoopConfig
from dual_loop.loop.rows import Place, Rows
from dual_loop.model.object_count import object_multiplicity
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


@dataclass
class RelaxedCaption:
    """A caption that step 2 reads through straight-through embeddings.

    Attributes:
        region: its region.
        token_ids: generated ids, up to and with the end of the turn.
        first, last: the part of ``token_ids`` that is the caption, ``[first, last)``.
        reading_ids: the ids that step 2 reads in place of that part.
        place, offset: the branch of step 2 that holds them, and where in the branch.
    """

    region: int
    token_ids: tuple[int, ...]
    first: int
    last: int
    reading_ids: tuple[int, ...]
    place: Place | None = None
    offset: int = 0


def segmentation_inputs(
    batch: Batch,
    rollout: CaptionRollout,
    vision_features: Tensor | None,
    prompter: Prompter,
    config: LoopConfig,
    num_objects: int | None = None,
    region_weights: Tensor | None = None,
    relaxed: Sequence[RelaxedCaption] = (),
    rows: Rows | None = None,
) -> SegmentationInputs:
    """Build the packed rows of step 2 for one batch.

    Args:
        batch: B images with N regions.
        rollout: one caption a region; regions with ``keep`` false stay in the row with weight 0.
        vision_features: (T, M, D_vision) of all views of the batch; None lets the model run its tower on every row.
        num_objects: let each image count as so many objects (``loss.num_objects``); None counts every region once.
        region_weights: (N,) float in 0..1, weight of each region in the mask losses, besides ``keep``; a weight of 0
            also silences the region's answer.
        relaxed: captions that are read through straight-through embeddings; their places are filled in.
        rows: rows that further captioning branches were added to by the caller, or will be after this call through
            ``SegmentationInputs``; None makes new ones.
    """
    rows = rows if rows is not None else Rows(batch, prompter)
    weights = torch.tensor(rollout.keep, dtype=torch.float32)
    if region_weights is not None:
        weights = weights * region_weights.float().cpu()
    _add_segmentation(rows, rollout, weights, config, relaxed)
    for region in _supervised_regions(batch, rollout, config):
        cells, seed = int(batch.prompt_masks[region].sum()), int(batch.region_seeds[region])
        caption = rollout.captions[region]
        rows.add_captioning(region, prompter.caption_branch(cells, caption, config.caption_question, seed))
    data = rows.pack(vision_features)
    data["g_pixel_values"] = batch.g_pixel_values
    if not rows.is_packed:
        _add_row_images(data, batch, rows.row_images(), vision_features is not None)
    data["masks"] = batch.target_masks
    data["region_seeds"] = batch.region_seeds
    data["region_weights"] = weights.to(batch.pixel_values.device)
    if num_objects is not None:
        repeats = object_multiplicity(batch.region_image, len(batch.sources), num_objects, batch.region_seeds)
        data["region_weights"] *= repeats.to(batch.pixel_values.device)
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


def _add_segmentation(
    rows: Rows,
    rollout: CaptionRollout,
    weights: Tensor,
    config: LoopConfig,
    relaxed: Sequence[RelaxedCaption],
) -> None:
    """Add a branch a region, or (``segment_form = turns``) one branch an image with a turn for each region."""
    special = {caption.region: caption for caption in relaxed}
    turns: dict[int, list[tuple[int, Branch, int]]] = {}
    for region, image in enumerate(rows.batch.region_image.tolist()):
        is_first = config.segment_form == "branches" or image not in turns
        branch, offset = _segment_branch(rows, rollout, region, config, special.get(region), is_first)
        if float(weights[region]) == 0.0:
            # A dropped region stays in the row, so that every rank runs the same graph, but teaches nothing.
            branch = Branch(branch.input_ids, (-100,) * len(branch.labels))
        if config.segment_form == "turns":
            turns.setdefault(image, []).append((region, branch, offset))
            continue
        place = rows.add_segmentation(region, branch)
        if region in special:
            special[region].place, special[region].offset = place, offset
    for parts in turns.values():
        ids = sum((branch.input_ids for _, branch, _ in parts), ())
        labels = sum((branch.labels for _, branch, _ in parts), ())
        place, start = rows.add_segmentation(parts[0][0], Branch(ids, labels)), 0
        for region, branch, offset in parts:
            if region in special:
                special[region].place, special[region].offset = place, start + offset
            start += len(branch.input_ids)


def _segment_branch(
    rows: Rows,
    rollout: CaptionRollout,
    region: int,
    config: LoopConfig,
    relaxed: RelaxedCaption | None,
    is_first: bool,
) -> tuple[Branch, int]:
    names = config.segment_question, config.segment_answer
    seed = int(rows.batch.region_seeds[region])
    if relaxed is not None:
        return rows.prompter.relaxed_segment_branch(relaxed.reading_ids, *names, seed, is_first)
    return rows.prompter.segment_branch(rollout.captions[region], *names, seed, is_first), 0


def _add_row_images(data: dict[str, Any], batch: Batch, row_images: Sequence[int], is_shared: bool) -> None:
    """Say which image each row segments: by its number, or (nothing shared) with a copy of its pixels."""
    if is_shared:
        data["row_image"] = torch.tensor(row_images, dtype=torch.long)
    else:
        data["g_pixel_values"] = batch.g_pixel_values[row_images]


def _supervised_regions(batch: Batch, rollout: CaptionRollout, config: LoopConfig) -> list[int]:
    """Return the regions whose own caption also trains step 1."""
    if not config.caption_supervision:
        return []
    return [region for region in range(batch.num_regions) if rollout.from_reference[region]]


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

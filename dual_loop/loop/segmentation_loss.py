"""Steps 2 and 3 on their own: what given captions lead to, and the losses of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dual_loop.config import LoopConfig, LossConfig
from dual_loop.loop.packing import pack_turns, segmentation_turns, supervised_turns
from dual_loop.loop.task import plain_terms
from dual_loop.model.object_count import object_multiplicity
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import Batch, RegionCaption, StepOutput


def compute_segmentation_loss(
    model: Sa2VA,
    batch: Batch,
    captions: Sequence[RegionCaption],
    prompter: Prompter,
    loop: LoopConfig | None = None,
    loss: LossConfig | None = None,
) -> StepOutput:
    """Segment one caption a region of one batch and return masks and loss terms, with a graph."""
    loop, loss = loop or LoopConfig(), loss or LossConfig()
    seen = model.see(batch)
    weights = torch.tensor([caption.is_kept for caption in captions], dtype=torch.float32)
    turns = segmentation_turns(batch, captions, weights, prompter, loop)
    turns += supervised_turns(batch, captions, prompter, loop)
    if loss.num_objects is not None:
        image = batch.region_image.cpu()
        weights = weights * object_multiplicity(image, batch.num_images, loss.num_objects, batch.region_seeds)
    vision = None if model.trains_vision else seen.vision
    packed = pack_turns(batch, captions, turns, prompter, vision=vision, levels=seen.levels, weights=weights)
    hidden = model.read(model.embed(packed), packed)
    masks = model.segment(hidden, packed)
    return StepOutput(plain_terms(model, hidden, masks, packed, loss), masks)

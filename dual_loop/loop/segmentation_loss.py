"""Steps 2 and 3 on their own: what given captions lead to, and the losses of it."""

from __future__ import annotations

from collections.abc import Sequence

from dual_loop.config import LoopConfig, LossConfig
from dual_loop.loop.packing import RowPlan, pack_step
from dual_loop.loop.task import plain_terms
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
    own, count = list(captions), loss.num_objects
    packed = pack_step(model, batch, model.see(batch), own, RowPlan.for_captions(own), prompter, loop, count)
    hidden = model.read(model.embed(packed), packed)
    masks = model.segment(hidden, packed)
    return StepOutput(plain_terms(model, hidden, masks, packed, loss), masks)

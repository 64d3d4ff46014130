"""Sums and counts that one micro-batch adds to the records; a key ``x/sum`` goes with ``x/count``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dual_loop.config import GATES
from dual_loop.metrics import iou_table, own_and_margin, own_image_only
from dual_loop.types import PackedBatch, Segmentation


@torch.no_grad()
def step_metrics(packed: PackedBatch, masks: Segmentation) -> dict[str, float]:
    """Return what a step gives: IoU of mask' and mask by where the caption is from, lengths, and counters.

    Of everything that step 1 wrote it is counted how often each gate closed on it, and how often it was cut off.
    """
    batch, captions = packed.batch, packed.captions
    rejected = torch.tensor([caption.rejected is not None for caption in captions])
    # A rejected caption is an empty mask, whatever step 2 reads in its place.
    predicted = (masks.mask_logits > 0) & ~rejected.to(masks.mask_logits.device)[:, None, None]
    own = torch.arange(batch.num_regions)
    table = own_image_only(iou_table(predicted, batch.target_masks > 0).cpu(), own, batch.region_image)
    ious, margins = (values.tolist() for values in own_and_margin(table, own))
    pairs = list(zip(captions, ious, margins, strict=True))
    generated = [caption for caption in captions if not caption.is_reference]
    written = [one for caption in captions for one in caption.written]
    return {
        "regions": float(len(ious)),
        "tokens": float(packed.input_ids.numel()),
        **ratio("cycle_iou", [iou for caption, iou, _ in pairs if not caption.is_reference]),
        **ratio("reference_iou", [iou for caption, iou, _ in pairs if caption.is_reference]),
        **ratio("uniqueness", [m for caption, _, m in pairs if not caption.is_reference and m == m]),
        **ratio("caption_tokens", [len(caption.token_ids) for caption in generated]),
        **ratio("caption_words", [len(caption.text.split()) for caption in generated]),
        "caption/rejected": float(sum(caption.rejected is not None for caption in captions)),
        "prompt/grid_rescued": float(batch.grid_rescued.sum()),
        **{f"gate/{name}": float(sum(one.gate == name for one in written)) for name in GATES},
        **ratio("gated", [float(one.gate is not None) for one in written]),
        **ratio("truncated", [float(one.truncated) for one in written]),
        **packed.metrics,
    }


def ratio(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the two halves of an average."""
    return {f"{name}/sum": float(sum(values)), f"{name}/count": float(len(values))}

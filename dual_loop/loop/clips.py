"""Clips: one [SEG] that is segmented on several frames, as Sa2VA trains on video.

Sa2VA's language model reads all frames of a clip behind each other (``Prompter.image_prefix``); the hidden state at
[SEG] then prompts SAM 2 on each of them. The same here, but for the captioned frame, which step 1 alone reads.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dual_loop.model.hardware import send
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import PackedBatch


@torch.no_grad()
def add_later_frames(packed: PackedBatch, model: Sa2VA) -> None:
    """Let the [SEG] of clips be segmented on later frames too, as Sa2VA trains on video: one prompt for all frames.

    A later frame stands behind the images of ``packed.batch`` as a further one, its objects behind the N regions with
    points and targets of their own: losses average over objects and frames. Whoever compares regions takes the first N.
    """
    batch, frames = packed.batch, packed.batch.later_frames
    owners = batch.region_image.tolist()
    shown = [
        (k, region) for k, frame in enumerate(frames) for region, image in enumerate(owners) if image == frame.image
    ]
    number, region = torch.tensor(shown).T
    # How the batch is split must not change the points: a frame is told by its place in its own clip.
    place = torch.tensor([frames[k].view - batch.target_view[frames[k].image] for k, _ in shown])
    pixels, regions = torch.stack([frame.g_pixel_values for frame in frames]), send(region, model.device)
    weights = packed.region_weights[regions]
    packed.batch = replace(
        batch,
        g_pixel_values=torch.cat([batch.g_pixel_values, pixels]),
        target_masks=torch.cat([batch.target_masks, *(frame.target_masks for frame in frames)]),
        region_image=torch.cat([batch.region_image, batch.num_images + number]),
        region_seeds=torch.cat([batch.region_seeds, (batch.region_seeds[region] + place) % 2**63]),
        full_masks=[*batch.full_masks, *(masks for frame in frames for masks in frame.full_masks)],
        later_frames=[],
    )
    if packed.levels is not None:
        levels = zip(packed.levels, model.encode_grounding(pixels), strict=True)
        packed.levels = [torch.cat(both) for both in levels]
    packed.seg_images = torch.cat([packed.seg_positions[0], send(batch.num_images + number, model.device)])
    packed.seg_positions = torch.cat([packed.seg_positions, packed.seg_positions[:, regions]], dim=1)
    packed.region_weights = torch.cat([packed.region_weights, weights])
    for name in ("mask_loss", "dice_loss"):
        packed.counts[name] += float(weights.sum())

"""The loop on one screen: mask -> caption -> mask' -> loss.

The trainer calls :meth:`DualLoop.begin_window` once an optimiser step and :meth:`DualLoop.step` once a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dual_loop.config import LoopConfig
from dual_loop.loop.captioner import Captioner
from dual_loop.loop.segmenter import SegmentationInputs, mask_ious, segmentation_inputs, split_by
from dual_loop.model.prompts import Prompter
from dual_loop.model.video_llava_sam import VideoLLaVASAMModel
from dual_loop.types import Batch, CaptionRollout, StepOutput


@dataclass
class MicroBatch:
    """One micro-batch after step 1: its captions and the ready inputs of step 2."""

    batch: Batch
    rollout: CaptionRollout
    inputs: SegmentationInputs


class DualLoop:
    """Runs steps 1 to 3.

    Args:
        model: the unwrapped model, which captions.
        prompter: token ids of prompts.
        config: settings of steps 1 and 2.
    """

    def __init__(self, model: VideoLLaVASAMModel, prompter: Prompter, config: LoopConfig) -> None:
        self.model, self.prompter, self.config = model, prompter, config
        self.captioner = Captioner(model, prompter, config)

    def begin_window(self, batches: Sequence[Batch]) -> list[MicroBatch]:
        """Step 1 for all micro-batches of an optimiser step; the parameters do not change inside it.

        The frozen vision tower runs here, once an image; step 2 uses the same features.
        """
        features = [self.model.encode_vision(batch.pixel_values) for batch in batches]
        rollouts = self.captioner.roll_out(batches, [f.detach() for f in features])
        return [self._micro_batch(*parts) for parts in zip(batches, rollouts, features, strict=True)]

    def _micro_batch(self, batch: Batch, rollout: CaptionRollout, features: Tensor) -> MicroBatch:
        num_objects = self.model.loss_config.num_objects
        inputs = segmentation_inputs(batch, rollout, features, self.prompter, self.config, num_objects)
        return MicroBatch(batch, rollout, inputs)

    def step(self, wrapped_model: Any, micro: MicroBatch) -> StepOutput:
        """Steps 2 and 3: segment every caption and compare mask' with mask.

        Args:
            wrapped_model: the model as the trainer wraps it (DDP), so that gradients are shared.
        """
        output = wrapped_model(micro.inputs.data, mode="terms")
        segmentation = output["segmentation"]
        with torch.no_grad():
            ious = mask_ious(segmentation.mask_logits, micro.batch.target_masks).tolist()
        metrics = self._metrics(micro, ious)
        return StepOutput(output["terms"], metrics, segmentation, micro.rollout.captions)

    def _metrics(self, micro: MicroBatch, ious: list[float]) -> dict[str, float]:
        reference, cycle = split_by(ious, micro.rollout.from_reference)
        lengths = [
            len(ids)
            for ids, own in zip(micro.rollout.token_ids, micro.rollout.from_reference, strict=True)
            if not own
        ]
        return {
            "regions": float(len(ious)),
            "tokens": float(micro.inputs.data["input_ids"].numel()),
            "cycle_iou/sum": sum(cycle),
            "cycle_iou/count": float(len(cycle)),
            "reference_iou/sum": sum(reference),
            "reference_iou/count": float(len(reference)),
            "caption_tokens/sum": float(sum(lengths)),
            "caption_tokens/count": float(len(lengths)),
            "caption/rejected": float(micro.rollout.num_rejected),
            "prompt/grid_rescued": float(micro.batch.grid_rescued.sum()),
        }

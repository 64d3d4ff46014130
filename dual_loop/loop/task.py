"""The loop on one screen: mask -> caption -> mask' -> loss.

The trainer calls :meth:`DualLoop.begin_window` once an optimiser step and :meth:`DualLoop.step` once a micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dual_loop.config import LoopConfig, PolicyConfig, RewardConfig
from dual_loop.loop.alignment import mask_prompts
from dual_loop.loop.audit import Auditor
from dual_loop.loop.captioner import Captioner, prompt_texts
from dual_loop.loop.critic import Critic
from dual_loop.loop.estimators import build_estimator
from dual_loop.loop.feature_cache import FeatureCache
from dual_loop.loop.gates import CaptionGates
from dual_loop.loop.judge import Judge
from dual_loop.loop.policy import (
    CaptionPolicy,
    PolicyPlan,
    add_policy_branches,
    policy_inputs,
    relax,
    soft_caption_inputs,
)
from dual_loop.loop.rewards import RewardSet, contrasts, iou_matrix
from dual_loop.loop.rows import Rows
from dual_loop.loop.segmenter import RelaxedCaption, SegmentationInputs, mask_ious, segmentation_inputs, split_by
from dual_loop.loop.teacher import MaskTeacher
from dual_loop.model.adapters import adapters_disabled, trainable_parameters
from dual_loop.model.ema import ExponentialMovingAverage, StartingWeights
from dual_loop.model.grounding import GroundingFeatures
from dual_loop.model.prompts import Prompter
from dual_loop.model.soft_captions import temperature_at
from dual_loop.model.video_llava_sam import VideoLLaVASAMModel, evaluating
from dual_loop.types import Batch, CaptionRollout, Exchange, SingleProcess, StepOutput

logger = logging.getLogger("dual_loop")


@dataclass
class MicroBatch:
    """One micro-batch after step 1: its captions, the ready inputs of step 2, and what step 1 has to report."""

    batch: Batch
    rollout: CaptionRollout
    inputs: SegmentationInputs
    metrics: dict[str, float] = field(default_factory=dict)


class DualLoop:
    """Runs steps 1 to 3.

    Args:
        model: the unwrapped model, which captions. Its weights at this moment are the frozen listener of the audits.
        prompter: token ids of prompts.
        config: settings of steps 1 and 2.
        policy, reward: what the captioner learns from, and what captions earn.
        exchange: sums and texts of all ranks; None for one process.
        judge: asked by the caption reward, if there is one.
    """

    def __init__(
        self,
        model: VideoLLaVASAMModel,
        prompter: Prompter,
        config: LoopConfig,
        policy: PolicyConfig | None = None,
        reward: RewardConfig | None = None,
        exchange: Exchange | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.model, self.prompter, self.config = model, prompter, config
        self.policy_config, self.reward_config = policy or PolicyConfig(), reward or RewardConfig()
        self.estimator = build_estimator(self.policy_config, self.reward_config)
        gates = CaptionGates(self.reward_config.gates, prompter.find_marker, prompt_texts())
        self.captioner = Captioner(model, prompter, config, gates, self.policy_config.temperature)
        exchange = exchange or SingleProcess()
        self.policy = CaptionPolicy(
            self.estimator,
            RewardSet(self.reward_config, judge),
            Critic(model, prompter, config),
            exchange,
            config,
            self.policy_config,
            self._listening,
        )
        self.teacher = MaskTeacher(model, None, model.loss_config)
        speed = model.speed
        self.num_images = 0  # of an epoch, where the caller knows it: what the feature cache announces
        self.cache: FeatureCache | None = None
        if speed.feature_cache is not None:
            self.cache = FeatureCache(model, speed.feature_cache, speed.feature_cache_gib)
        is_seldom_read = self.reward_config.listener != "frozen"
        self.starting = StartingWeights(trainable_parameters(model), speed.start_on_disk and is_seldom_read)
        self.auditor = Auditor(model, prompter, config, self.starting, exchange)

    def use_average(self, average: ExponentialMovingAverage) -> None:
        """Take ``average`` as the teacher of ``loss.distill_weight`` and the listener ``average``."""
        self.teacher.average = average

    def _listening(self) -> AbstractContextManager[None]:
        """Lend the model the weights that score captions (``reward.listener``)."""
        if self.reward_config.listener == "frozen":
            return self.starting.swapped()
        if self.reward_config.listener == "average":
            if self.teacher.average is None:
                raise RuntimeError("the weight average is to listen: call DualLoop.use_average first")
            return self.teacher.average.swapped()
        return nullcontext()

    def begin_window(self, batches: Sequence[Batch], progress: float = 0.0, audit: bool = False) -> list[MicroBatch]:
        """Step 1 for all micro-batches of an optimiser step; the parameters do not change inside it.

        The frozen vision tower runs here, once an image; step 2 uses the same features.

        Args:
            batches: the accumulation window of this rank.
            progress: share of the run that is done, 0..1, for schedules.
            audit: also measure the anti-cheat panel.
        """
        if self.cache is not None and not self.cache.is_announced:
            logger.info("%s", self.cache.announcement(batches[0], self.num_images))
        is_shared = self.model.speed.share_towers
        needs_more = audit or self.policy.needs_scores or self.estimator.is_relaxed
        features = [self._vision(batch) if is_shared or needs_more else None for batch in batches]
        plain = [feature.detach() for feature in features if feature is not None]
        draws = self.estimator.draws
        seen: list[Tensor | None] = [*plain] if is_shared else [None] * len(batches)
        rollouts = self.captioner.roll_out(batches, seen, greedy=draws.greedy, num_samples=draws.samples)
        self.auditor.remember(rollouts)
        grounding = [self._grounding(batch, audit) for batch in batches]
        plans = self.policy.plan(batches, plain, rollouts, grounding)
        read = features if is_shared else [None] * len(batches)
        parts = zip(batches, rollouts, read, plans, grounding, strict=True)
        micros = [self._micro_batch(*part, progress) for part in parts]
        inputs = [micro.inputs for micro in micros]
        for micro, metrics in zip(micros, self.teacher.teach(batches, inputs), strict=True):
            micro.metrics.update(metrics)
        if audit:
            micros[0].metrics.update(self.auditor.audit(batches, plain, rollouts, inputs))
        return micros

    def step(self, wrapped_model: Any, micro: MicroBatch) -> StepOutput:
        """Steps 2 and 3: segment every caption and compare mask' with mask.

        Args:
            wrapped_model: the model as the trainer wraps it (DDP), so that gradients are shared.
        """
        output = wrapped_model(micro.inputs.data, mode="terms")
        metrics = {**self._metrics(micro, output["segmentation"].mask_logits), **micro.metrics}
        return StepOutput(output["terms"], metrics, output["segmentation"], micro.rollout.captions)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs of this rank, as JSON values."""
        counts = [self.captioner.num_generated, self.captioner.num_rejected]
        return {"captioner": counts, "auditor": self.auditor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.captioner.num_generated, self.captioner.num_rejected = state["captioner"]
        self.auditor.load_state_dict(state["auditor"])

    # ---- inside a window -------------------------------------------------------------------------------------------

    def _vision(self, batch: Batch) -> Tensor:
        """Run the vision tower on all tiles of the batch, or read what it computed before."""
        return self.cache.vision(batch) if self.cache is not None else self.model.encode_vision(batch.pixel_values)

    @torch.no_grad()
    def _grounding(self, batch: Batch, audit: bool) -> GroundingFeatures | None:
        """Run SAM 2's frozen encoder once, where more than one pass will read its features."""
        encoder = self.model.grounding_encoder.vision_encoder
        is_frozen = not any(parameter.requires_grad for parameter in encoder.parameters())
        if not self.model.speed.share_towers:
            return None
        if self.cache is not None:
            return self.cache.grounding(batch)
        several = audit or self.policy.needs_scores or self.model.loss_config.distill_weight > 0
        return self.model.encode_grounding(batch.g_pixel_values) if is_frozen and several else None

    def _micro_batch(
        self,
        batch: Batch,
        rollout: CaptionRollout,
        features: Tensor | None,
        plan: PolicyPlan,
        grounding: GroundingFeatures | None,
        progress: float,
    ) -> MicroBatch:
        rows, question = (
            Rows(batch, self.prompter, is_packed=self.model.speed.pack_branches),
            self.config.caption_question,
        )
        places = add_policy_branches(rows, plan.captions, question)
        relaxed = self._relaxed(rollout, plan.metrics) if self.estimator.is_relaxed else []
        num_objects = self.model.loss_config.num_objects
        prompts = (self.prompter, self.config, num_objects)
        inputs = segmentation_inputs(batch, rollout, features, *prompts, plan.region_weights, relaxed, rows)
        if grounding is not None:
            inputs.data["grounding_features"] = grounding
        if relaxed:
            config = self.policy_config
            temperature = temperature_at(progress, config.gumbel_temperature, config.gumbel_temperature_end)
            inputs.data["captioning"] = soft_caption_inputs(rows, relaxed, features, question, config, temperature)
        if self.estimator.is_rewarded:
            policy = policy_inputs(rows, plan.captions, places, question, self.policy_config)
            self._add_policy(inputs, policy)
        if self.model.loss_config.align_weight > 0:
            inputs.data["align_targets"] = mask_prompts(self.model, batch.target_masks)
            inputs.counts["align_loss"] = inputs.counts["mask_loss"]
        return MicroBatch(batch, rollout, inputs, plan.metrics)

    def _add_policy(self, inputs: SegmentationInputs, policy: dict[str, Any]) -> None:
        inputs.counts["policy_loss"] = float(len(policy["targets"]))
        if policy["kl_weight"] > 0:
            inputs.counts["kl_loss"] = inputs.counts["policy_loss"]
            with torch.no_grad(), evaluating(self.model), adapters_disabled(self.model):
                hidden = self.model.hidden_states({k: v for k, v in inputs.data.items() if k != "captioning"})
                policy["reference_log_probs"] = self.model.token_log_probs(hidden, policy)
        inputs.data["policy"] = policy

    def _relaxed(self, rollout: CaptionRollout, metrics: dict[str, float]) -> list[RelaxedCaption]:
        found, missed = [], 0
        for region, samples in enumerate(rollout.samples):
            if rollout.from_reference[region] or rollout.rejected[region] or not rollout.keep[region]:
                continue
            caption = relax(self.prompter, region, samples[0])
            missed += caption is None
            found += [caption] if caption is not None else []
        metrics["gumbel/not_aligned"] = float(missed)
        return found

    @torch.no_grad()
    def _metrics(self, micro: MicroBatch, mask_logits: Tensor) -> dict[str, float]:
        batch, rollout = micro.batch, micro.rollout
        own = torch.arange(batch.num_regions, device=mask_logits.device)
        ious = mask_ious(mask_logits, batch.target_masks)
        matrix = iou_matrix(mask_logits, own, batch.target_masks, batch.region_image.to(mask_logits.device))
        unique = contrasts(matrix, own)
        generated = torch.tensor([not given for given in rollout.from_reference], device=unique.device)
        unique = unique[generated & ~unique.isnan()]
        reference, cycle = split_by(ious.tolist(), rollout.from_reference)
        pairs = list(zip(rollout.token_ids, rollout.captions, rollout.from_reference, strict=True))
        lengths = [len(ids) for ids, _, given in pairs if not given]
        words = [len(text.split()) for _, text, given in pairs if not given]
        return {
            "regions": float(len(ious)),
            "tokens": float(micro.inputs.data["input_ids"].numel()),
            **_ratio("cycle_iou", cycle),
            **_ratio("reference_iou", reference),
            **_ratio("uniqueness", unique.tolist()),
            **_ratio("caption_tokens", lengths),
            **_ratio("caption_words", words),
            "caption/rejected": float(rollout.num_rejected),
            "prompt/grid_rescued": float(batch.grid_rescued.sum()),
        }


def _ratio(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}/sum": float(sum(values)), f"{name}/count": float(len(values))}

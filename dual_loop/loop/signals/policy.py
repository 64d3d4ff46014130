"""From sampled captions to what the captioner learns: rewards, advantages, and the model inputs of both estimators.

The order inside one optimiser step: the critic segments the captions that need a score, the rewards are taken, the
estimator turns them into advantages, and captions with an advantage become captioning branches of the training rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dual_loop.config import GATES, LoopConfig, PolicyConfig
from dual_loop.loop.captioner import clean_caption, sample_seed
from dual_loop.loop.critic import AskedCaption, Critic
from dual_loop.loop.estimators import Estimator, GroupAdvantages, combine_advantages
from dual_loop.loop.rewards import RewardSet
from dual_loop.loop.rows import Place, Rows
from dual_loop.loop.segmenter import RelaxedCaption
from dual_loop.model.grounding import GroundingFeatures
from dual_loop.model.prompts import Prompter
from dual_loop.types import Batch, CaptionRollout, Exchange, WrittenCaption

NOISE_DRAW = 1_000_003
"""Number of the draw whose seed gives a relaxed caption its Gumbel noise; no sample has it."""


@dataclass
class PolicyCaption:
    """A sampled caption with an advantage: what the policy loss is taken of."""

    region: int
    token_ids: tuple[int, ...]
    advantage: float


@dataclass
class PolicyPlan:
    """What one micro-batch teaches beside its masks.

    Attributes:
        captions: sampled captions that earned an advantage other than 0.
        region_weights: (N,) float in 0..1 of the cycle filter, None without one.
        metrics: sums and counts for the records.
    """

    captions: list[PolicyCaption] = field(default_factory=list)
    region_weights: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class CaptionPolicy:
    """Scores captions and turns scores into plans.

    Args:
        estimator: how rewards become advantages.
        rewards: what captions earn.
        critic: segments captions.
        exchange: sums over ranks.
        loop, policy: settings.
        listener: puts the weights that score captions into the model for the length of a ``with`` block.
    """

    def __init__(
        self,
        estimator: Estimator,
        rewards: RewardSet,
        critic: Critic,
        exchange: Exchange,
        loop: LoopConfig,
        policy: PolicyConfig,
        listener: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.estimator, self.rewards, self.critic, self.exchange = estimator, rewards, critic, exchange
        self.loop, self.policy, self.listener = loop, policy, listener

    @property
    def needs_scores(self) -> bool:
        """Whether captions are segmented before training on them."""
        return self.estimator.is_rewarded or self.loop.cycle_keep is not None

    def plan(
        self,
        batches: Sequence[Batch],
        features: Sequence[Tensor],
        rollouts: Sequence[CaptionRollout],
        grounding: Sequence[GroundingFeatures | None],
    ) -> list[PolicyPlan]:
        """Return a plan for each micro-batch of an optimiser step; every rank must call this once a step."""
        plans = [PolicyPlan(metrics=self._gate_metrics(rollout)) for rollout in rollouts]
        asked_before = dict(self.rewards.judge.counters) if self.rewards.judge else {}
        all_scores: list[dict[AskedCaption, Tensor]] = [{} for _ in batches]
        if self.needs_scores:
            with self.listener():
                parts = zip(batches, features, rollouts, grounding, strict=True)
                all_scores = [self._scores(*part) for part in parts]
        groups = []
        for plan, batch, rollout, scores in zip(plans, batches, rollouts, all_scores, strict=True):
            plan.region_weights = self._filter(batch, rollout, scores, plan.metrics)
            groups.append(self._advantages(batch, rollout, scores, plan.metrics))
        if self.estimator.is_rewarded:
            combined = combine_advantages(groups, self.rewards.weights, self.exchange.reduce)
            for plan, rollout, values in zip(plans, rollouts, combined, strict=True):
                plan.captions = _taught(rollout, values)
        if self.rewards.judge is not None:
            now = self.rewards.judge.counters
            plans[0].metrics.update({name: float(now[name] - asked_before[name]) for name in now})
        return plans

    def _scores(
        self, batch: Batch, features: Tensor, rollout: CaptionRollout, grounding: GroundingFeatures | None
    ) -> dict[AskedCaption, Tensor]:
        """Return the row of the IoU matrix (N,) of every caption that the filter or the rewards ask for."""
        asked = []
        if self.loop.cycle_keep is not None:
            asked += [AskedCaption(n, text) for n, text in enumerate(rollout.captions) if not rollout.from_reference[n]]
        if self.estimator.is_rewarded:
            for region in range(batch.num_regions):
                written = [rollout.greedy[region], *rollout.samples[region]]
                asked += [AskedCaption(region, c.text) for c in written if c is not None and c.gate is None]
        matrix = self.critic.score(batch, features, asked, grounding)
        return dict(zip(asked, matrix, strict=True))

    def _filter(
        self,
        batch: Batch,
        rollout: CaptionRollout,
        scores: Mapping[AskedCaption, Tensor],
        metrics: dict[str, float],
    ) -> Tensor | None:
        """Return the weight of each region's caption in step 2: by its cycle IoU, 1 for reference captions."""
        keep, drop = self.loop.cycle_keep, self.loop.cycle_drop
        if keep is None:
            return None
        weights = torch.ones(batch.num_regions)
        for region, text in enumerate(rollout.captions):
            if not rollout.from_reference[region]:
                iou = float(scores[AskedCaption(region, text)][region])
                weights[region] = min(1.0, max(0.0, (iou - drop) / (keep - drop)))
        own = [float(w) for w, given in zip(weights.tolist(), rollout.from_reference, strict=True) if not given]
        metrics.update({"filter_weight/sum": sum(own), "filter_weight/count": float(len(own))})
        metrics["caption/filtered"] = float(sum(weight == 0.0 for weight in own))
        return weights

    def _advantages(
        self,
        batch: Batch,
        rollout: CaptionRollout,
        scores: Mapping[AskedCaption, Tensor],
        metrics: dict[str, float],
    ) -> GroupAdvantages:
        """Return the advantages of the N x K samples of one micro-batch."""
        if not self.estimator.is_rewarded:
            return GroupAdvantages({}, {}, 0, 0)
        num_samples = self.estimator.draws.samples
        sampled = [(n, caption) for n, captions in enumerate(rollout.samples) for caption in captions]
        rewards = self._reward(batch, sampled, scores)
        by_group = {name: value.reshape(-1, num_samples) for name, value in rewards.items()}
        greedy = [(n, caption) for n, caption in enumerate(rollout.greedy) if caption is not None]
        baseline = self._reward(batch, greedy, scores) if greedy else {}
        truncated = torch.tensor([caption.truncated for _, caption in sampled]).reshape(-1, num_samples)
        usable = ~truncated if self.policy.mask_truncated else torch.ones_like(truncated)
        advantages = self.estimator.advantages(by_group, baseline, usable)
        for name, value in rewards.items():
            applies = value[~value.isnan()]
            metrics[f"reward_{name}/sum"], metrics[f"reward_{name}/count"] = float(applies.sum()), float(len(applies))
        metrics["zero_variance/sum"] = float(advantages.num_zero_variance)
        metrics["zero_variance/count"] = float(advantages.num_groups)
        return advantages

    def _reward(
        self,
        batch: Batch,
        captions: Sequence[tuple[int, WrittenCaption]],
        scores: Mapping[AskedCaption, Tensor],
    ) -> dict[str, Tensor]:
        """Return what (region, caption) pairs earn: objective -> (R,)."""
        regions = torch.tensor([region for region, _ in captions], dtype=torch.long)
        images = batch.region_image.cpu()
        nothing = torch.zeros(len(captions), batch.num_regions)
        matrix = nothing.masked_fill(images[regions][:, None] != images[None], float("nan"))
        for row, (region, caption) in enumerate(captions):
            if caption.gate is None:
                matrix[row] = scores[AskedCaption(region, caption.text)]
        references = [[own] if (own := batch.captions[region]) else [] for region, _ in captions]
        return self.rewards.score(
            [caption.text for _, caption in captions],
            regions,
            matrix,
            references,
            [caption.gate for _, caption in captions],
            [batch.region_names[region] for region, _ in captions],
        )

    def _gate_metrics(self, rollout: CaptionRollout) -> dict[str, float]:
        written = rollout.written
        metrics = {f"gate/{name}": float(sum(c.gate == name for c in written)) for name in GATES}
        metrics["gated/sum"] = float(sum(caption.gate is not None for caption in written))
        metrics["truncated/sum"] = float(sum(caption.truncated for caption in written))
        metrics["gated/count"] = metrics["truncated/count"] = float(len(written))
        return metrics


def _taught(rollout: CaptionRollout, advantages: Tensor) -> list[PolicyCaption]:
    return [
        PolicyCaption(region, caption.token_ids, value)
        for region, captions in enumerate(rollout.samples)
        for caption, value in zip(captions, advantages[region].tolist(), strict=True)
        if value != 0.0 and caption.token_ids
    ]


# ---- inputs of the model ---------------------------------------------------------------------------------------------


def add_policy_branches(rows: Rows, captions: Sequence[PolicyCaption], question: str) -> list[Place]:
    """Add one captioning branch a caption to ``rows`` and return their places."""
    return [rows.add_captioning(c.region, _sampled_branch(rows, c.region, c.token_ids, question)) for c in captions]


def policy_inputs(
    rows: Rows, captions: Sequence[PolicyCaption], places: Sequence[Place], question: str, config: PolicyConfig
) -> dict[str, Any]:
    """Return where the P tokens of all captions are predicted, what they are, and their advantages.

    Returns:
        ``rows, columns, targets`` (P,) int64: the hidden state at (row, column) predicts ``targets``;
        ``advantages`` (P,) float32; ``temperature``, ``weight``, ``kl_weight``.
    """
    positions: list[tuple[int, int]] = []
    targets: list[int] = []
    advantages: list[float] = []
    for caption, place in zip(captions, places, strict=True):
        first = rows.start_of(place) + _question_length(rows, caption.region, question) - 1
        positions += [(place.row, first + number) for number in range(len(caption.token_ids))]
        targets += caption.token_ids
        advantages += [caption.advantage] * len(caption.token_ids)
    index = torch.tensor(positions, dtype=torch.long).reshape(-1, 2)
    return {
        "rows": index[:, 0],
        "columns": index[:, 1],
        "targets": torch.tensor(targets, dtype=torch.long),
        "advantages": torch.tensor(advantages, dtype=torch.float32),
        "temperature": config.temperature,
        "weight": config.weight,
        "kl_weight": config.kl_weight,
    }


def relax(prompter: Prompter, region: int, caption: WrittenCaption) -> RelaxedCaption | None:
    """Find the part of generated ids that is the caption; None where cleaning changed more than its ends."""
    ids = caption.token_ids

    def text_of(start: int, end: int) -> str:
        return prompter.decode_caption(list(ids[start:end]))[0]

    last = next((n for n in range(1, len(ids) + 1) if clean_caption(text_of(0, n)) == caption.text), None)
    if last is None or not caption.text:
        return None
    first = 0
    while clean_caption(text_of(first + 1, last)) == caption.text:
        first += 1
    if text_of(first, last).strip() != caption.text:
        return None
    table = prompter.with_space()
    return RelaxedCaption(region, ids, first, last, (table[ids[first]], *ids[first + 1 : last]))


def soft_caption_inputs(
    rows: Rows,
    relaxed: Sequence[RelaxedCaption],
    vision_features: Tensor | None,
    question: str,
    config: PolicyConfig,
    temperature: float,
) -> dict[str, Any]:
    """Return the captioning rows of relaxed captions, and where their embeddings go in the rows of step 2.

    Returns:
        The model's inputs of rows that hold the captioning turns alone, with ``rows, columns, targets`` (P,) as in
        :func:`policy_inputs`; ``is_first`` (P,) bool, tokens that are read with a space before them;
        ``into_rows, into_columns`` (P,) int64 in the rows of step 2; ``uniform`` (P, top_k + 1) random numbers of each
        region's own seed; ``temperature, top_k``.
    """
    own = Rows(rows.batch, rows.prompter, captions_only=True)
    index: list[tuple[int, int, int, int]] = []
    targets: list[int] = []
    is_first: list[bool] = []
    uniform: list[Tensor] = []
    places = [own.add_captioning(c.region, _sampled_branch(own, c.region, c.token_ids, question)) for c in relaxed]
    for caption, place in zip(relaxed, places, strict=True):
        assert caption.place is not None  # set when the branch of step 2 was built
        start = own.start_of(place) + _question_length(own, caption.region, question) - 1
        into = rows.start_of(caption.place) + caption.offset
        count = caption.last - caption.first
        index += [(place.row, start + caption.first + k, caption.place.row, into + k) for k in range(count)]
        targets += caption.token_ids[caption.first : caption.last]
        is_first += [k == 0 for k in range(count)]
        seed = sample_seed(int(rows.batch.region_seeds[caption.region]), NOISE_DRAW)
        generator = torch.Generator().manual_seed(seed)
        uniform.append(torch.rand(count, config.gumbel_top_k + 1, generator=generator))
    positions = torch.tensor(index, dtype=torch.long).reshape(-1, 4)
    return {
        **own.pack(vision_features),
        **dict(zip(("rows", "columns", "into_rows", "into_columns"), positions.unbind(1), strict=True)),
        "targets": torch.tensor(targets, dtype=torch.long),
        "is_first": torch.tensor(is_first, dtype=torch.bool),
        "with_space": torch.tensor(rows.prompter.with_space(), dtype=torch.long),
        "uniform": torch.cat(uniform),
        "temperature": temperature,
        "top_k": config.gumbel_top_k,
    }


def _sampled_branch(rows: Rows, region: int, token_ids: Sequence[int], question: str) -> Any:
    cells, seed = int(rows.batch.prompt_masks[region].sum()), int(rows.batch.region_seeds[region])
    return rows.prompter.sampled_branch(cells, token_ids, question, seed)


def _question_length(rows: Rows, region: int, question: str) -> int:
    cells, seed = int(rows.batch.prompt_masks[region].sum()), int(rows.batch.region_seeds[region])
    return len(rows.prompter.caption_question(cells, question, seed))

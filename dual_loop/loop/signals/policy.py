"""The policy signal: captions are sampled, scored, and raised or lowered by what they were worth.

============  ==========================================================
name          advantage of a sampled caption
============  ==========================================================
scst          reward minus the greedy caption's reward (1612.00563)
grpo          reward minus the mean of the group (2402.03300)
============  ==========================================================

Both make one update a roll-out, so the policy that is updated is the one that sampled: no importance ratio, no
clipping, unlike PPO and GRPO as published.

With ``policy.kl_weight`` the captioner is held near itself without the adapter, also where no estimator is on: then at
the tokens of the captions that step 2 reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from dual_loop import losses
from dual_loop.config import Config
from dual_loop.loop.judge import Judge
from dual_loop.loop.rewards import RewardSet
from dual_loop.loop.scorer import RegionText
from dual_loop.loop.signals.base import MicroBatch, Signal, predicting_positions, spoken_turns
from dual_loop.losses import full_precision
from dual_loop.metrics import own_image_only, ratio
from dual_loop.model.adapters import adapters_disabled
from dual_loop.model.hardware import send
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA, evaluating
from dual_loop.types import LossTerm, PackedBatch, RankComm, RegionTurn, Segmentation, WrittenCaption

LEAST_SIZE = 0.05
"""Root mean square of advantages below which an objective is not scaled up to the others' size."""
map_chunks = partial(losses.map_chunks, chunk=256)
"""The own logits, the reference's and their softmax exist of one part: 256 x 151,674 x 4 bytes are 155 MB, each."""
_EPSILON = 1e-6

Center = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]
"""(rewards (N, K), greedy captions' rewards (N,), takes part (N, K)) -> (advantages (N, K), takes part (N, K))."""


@dataclass
class GroupAdvantages:
    """Advantages of the N x K samples of one micro-batch.

    Attributes:
        values: objective -> (N, K) float32, 0 where a caption does not take part.
        takes_part: objective -> (N, K) bool.
        num_groups: regions with at least one caption that takes part.
        num_zero_variance: groups among these whose advantages are 0 in every objective: they teach nothing.
    """

    values: dict[str, Tensor]
    takes_part: dict[str, Tensor]
    num_groups: int
    num_zero_variance: int


@dataclass
class SampledTokens:
    """The P tokens of the captions that are read again, and what they earned.

    Attributes:
        positions: (2, P) int64, rows and columns of the hidden states that predict them.
        targets: (P,) int64, the tokens. advantages, earned: (P,) float32, each those of its caption.
        reference: (P, D) hidden states without the adapter, None without a divergence.
    """

    positions: Tensor
    targets: Tensor
    advantages: Tensor
    earned: Tensor
    reference: Tensor | None = None


class CaptionPolicy(Signal):
    """Teaches the captioner by rewards, and holds it near its reference.

    Args:
        estimator: ``scst`` or ``grpo``; another teaches nothing by rewards, and the divergence is all there is.
    """

    name = "policy"

    def __init__(
        self, model: Sa2VA, prompter: Prompter, config: Config, estimator: str, comm: RankComm, judge: Judge | None
    ) -> None:
        self.model, self.prompter, self.comm = model, prompter, comm
        self.config, self.question = config.policy, config.loop.caption_question
        self.rewards = RewardSet(config.reward, judge) if estimator in ("scst", "grpo") else None
        group = against_scaled_group if config.policy.advantage_scale == "group" else against_group
        self.center: Center = against_greedy if estimator == "scst" else group
        self.num_samples = 0 if self.rewards is None else config.policy.captions_per_region
        self.needs_greedy = estimator == "scst"
        self.spoken: list[tuple[list[tuple[int, tuple[int, ...]]], list[RegionTurn], Tensor]] = []

    def asks(self, micro: MicroBatch) -> Iterable[RegionText]:
        if self.rewards is None:
            return []
        return [(n, one.text) for n, own in enumerate(micro.captions) for one in own.written if one.gate is None]

    def plan(self, window: Sequence[MicroBatch]) -> None:
        self.spoken, worths = [], None if self.rewards is None else self._worths(window, self.rewards)
        for number, micro in enumerate(window):
            written = [
                (region, one.token_ids)
                for region, own in enumerate(micro.captions)
                for one in (own.samples or own.written)
            ]
            worth = torch.zeros(2, len(written)) if worths is None else worths[number]
            kept = [place for place, (_, ids) in enumerate(written) if ids]
            spoken = [written[place] for place in kept]
            turns = spoken_turns(micro.batch, spoken, self.prompter, self.question)
            micro.plan.turns += turns
            self.spoken.append((spoken, turns, worth[:, kept]))

    def _worths(self, window: Sequence[MicroBatch], rewards: RewardSet) -> list[Tensor]:
        """Return for each micro-batch the advantages of its samples and what they earned, (2, N * K)."""
        asked_before = dict(rewards.judge.counters) if rewards.judge else {}
        groups, earned = zip(*(self._advantages(micro, rewards) for micro in window), strict=True)
        if rewards.judge:
            counters = rewards.judge.counters.items()
            window[0].plan.metrics.update({name: float(value - asked_before[name]) for name, value in counters})
        advantages = combine_advantages(groups, rewards.weights, self.comm.reduce)
        return [torch.stack([own.flatten(), worth]) for own, worth in zip(advantages, earned, strict=True)]

    def lessons(self, window: Sequence[MicroBatch], progress: float) -> None:
        for micro, (spoken, turns, worth) in zip(window, self.spoken, strict=True):
            rows, device = micro.rows, self.model.device
            lengths = torch.tensor([len(ids) for _, ids in spoken], dtype=torch.long)
            flat = [token for _, ids in spoken for token in ids]
            found = SampledTokens(
                send(predicting_positions(turns, spoken), device),
                send(torch.tensor(flat, dtype=torch.long), device),
                *send(worth.repeat_interleave(lengths, dim=1), device),
            )
            rows.lessons[self.name] = found
            if self.rewards is not None:
                rows.counts["policy_loss"] = float(len(flat))
            if self.config.kl_weight > 0:
                rows.counts["kl_loss"] = float(len(flat))
                with torch.no_grad(), evaluating(self.model), adapters_disabled(self.model):
                    hidden = self.model.read(self.model.embed(rows), rows)
                found.reference = hidden[found.positions[0], found.positions[1]]

    def terms(self, model: Sa2VA, hidden: Tensor, masks: Segmentation, packed: PackedBatch) -> dict[str, LossTerm]:
        found = cast(SampledTokens, packed.lessons[self.name])
        log_probs, divergence, entropy = self.token_figures(model, hidden, found)
        packed.metrics |= {"policy_entropy/sum": entropy.sum(), "policy_entropy/count": float(len(entropy))}
        terms = {}
        if self.rewards is not None:
            surrogate, count = policy_loss(log_probs, found.advantages, self.config.weight).total, float(len(log_probs))
            # Its gradient is that of what was earned, its value says nothing: what was earned is shown in its place.
            value = -self.config.weight * found.earned.sum()
            terms["policy_loss"] = LossTerm(value + (surrogate - surrogate.detach()), count)
        if found.reference is not None:
            terms["kl_loss"] = LossTerm(divergence.sum() * self.config.kl_weight, float(len(divergence)))
        return terms

    def token_figures(self, model: Sa2VA, hidden: Tensor, found: SampledTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Return of P tokens, at the temperature of their sampling, three times (P,) float32.

        The log-probability with graph; the divergence KL(policy || reference) with graph, 0 without a reference; the
        entropy without graph. The last two are of the whole distribution at the token's place, in nats.
        """
        rows, columns = found.positions

        def of(part: Tensor, targets: Tensor, *reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            own = (model.answer_logits(part).float() / self.config.temperature).log_softmax(-1)
            log_probs = own.gather(1, targets[:, None])[:, 0]
            divergence = torch.zeros_like(log_probs)
            if reference:
                with torch.no_grad():
                    other = model.answer_logits(reference[0]).float() / self.config.temperature
                divergence = losses.divergence(own, other.log_softmax(-1))
            return log_probs, divergence, -(own.detach().exp() * own.detach()).sum(-1)

        given = [] if found.reference is None else [found.reference]
        parts = map_chunks(of, hidden[rows, columns], found.targets, *given)
        log_probs, divergence, entropy = (torch.cat(own) for own in zip(*parts, strict=True))
        return log_probs, divergence, entropy

    def log_probs(self, model: Sa2VA, hidden: Tensor, found: SampledTokens) -> Tensor:
        """Return the log-probabilities (P,) float32 of the sampled tokens, at the temperature of their sampling."""
        return self.token_figures(model, hidden, found)[0]

    def _advantages(self, micro: MicroBatch, rewards: RewardSet) -> tuple[GroupAdvantages, Tensor]:
        """Return the advantages of the N x K samples of one micro-batch, and the weighted sum that each earned."""
        sampled = [(region, caption) for region, own in enumerate(micro.captions) for caption in own.samples]
        earned, plan = earn(micro, sampled, rewards), micro.plan
        greedy = [(region, own.greedy) for region, own in enumerate(micro.captions) if own.greedy is not None]
        baseline = earn(micro, greedy, rewards) if greedy else {}
        truncated = torch.tensor([caption.truncated for _, caption in sampled]).reshape(-1, self.num_samples)
        usable = ~truncated if self.config.mask_truncated else torch.ones_like(truncated)
        by_group = {name: value.reshape(-1, self.num_samples) for name, value in earned.items()}
        advantages = center_rewards(self.center, by_group, baseline, usable)
        for name, value in earned.items():
            plan.metrics |= ratio(f"reward_{name}", value[~value.isnan()].tolist())
        plan.metrics["zero_variance/sum"] = float(advantages.num_zero_variance)
        plan.metrics["zero_variance/count"] = float(advantages.num_groups)
        nothing = torch.stack([value.isnan() for value in by_group.values()]).all(0).all(1)
        plan.metrics["caption/no_reward"] = float(nothing.sum())
        paid = [rewards.weights[name] * value.nan_to_num(0.0) for name, value in earned.items()]
        return advantages, torch.stack(paid).sum(0)


def earn(micro: MicroBatch, captions: Sequence[tuple[int, WrittenCaption]], rewards: RewardSet) -> dict[str, Tensor]:
    """Return what (region, caption) pairs of a micro-batch earn: objective -> (R,)."""
    batch, regions = micro.batch, torch.tensor([region for region, _ in captions], dtype=torch.long)
    table = own_image_only(torch.zeros(len(captions), batch.num_regions), regions, batch.region_image)
    for row, (region, caption) in enumerate(captions):
        if caption.gate is None:
            table[row] = micro.scores[region, caption.text]
    references = [batch.references[region] for region, _ in captions]
    texts, gates = [one.text for _, one in captions], [one.gate for _, one in captions]
    names = [batch.region_names[region] for region, _ in captions]
    return rewards.score(texts, regions, table, references, gates, names)


def against_greedy(reward: Tensor, baseline: Tensor | None, takes_part: Tensor) -> tuple[Tensor, Tensor]:
    """Self-critical advantages (SCST, 1612.00563): reward minus that of the greedy caption of the same region.

    Differs from the published form in using K samples a region instead of one, and in its token-level average.
    """
    if baseline is None:
        raise ValueError("self-critical advantages need the greedy captions' rewards")
    return reward - baseline[:, None], takes_part & ~baseline.isnan()[:, None]


def against_group(reward: Tensor, baseline: Tensor | None, takes_part: Tensor) -> tuple[Tensor, Tensor]:
    """Group-relative advantages (GRPO, 2402.03300): reward minus the group's mean, so that they sum to 0.

    As in Dr.GRPO (2503.20783) not divided by the group's deviation, which favours groups that are nearly solved. A
    group with fewer than two captions teaches nothing.
    """
    takes_part = takes_part & (takes_part.sum(1, keepdim=True) > 1)
    known = torch.where(takes_part, reward, 0.0)
    count = takes_part.sum(1, keepdim=True).clamp_min(1)
    centred = torch.where(takes_part, reward - known.sum(1, keepdim=True) / count, 0.0)
    # Equal rewards give exactly 0, whatever the rounding of their mean.
    low = torch.where(takes_part, reward, float("inf")).amin(1, keepdim=True)
    high = torch.where(takes_part, reward, float("-inf")).amax(1, keepdim=True)
    return torch.where(high > low, centred, 0.0), takes_part


def against_scaled_group(reward: Tensor, baseline: Tensor | None, takes_part: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`against_group`, divided by the group's standard deviation as GRPO was published."""
    centred, takes_part = against_group(reward, baseline, takes_part)
    count = takes_part.sum(1, keepdim=True).clamp_min(1)
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return centred / (deviation + _EPSILON), takes_part


def center_rewards(
    center: Center, rewards: Mapping[str, Tensor], baseline: Mapping[str, Tensor], usable: Tensor
) -> GroupAdvantages:
    """Turn rewards into advantages, objective by objective.

    Args:
        rewards: objective -> (N, K) float32, NaN where the objective does not apply.
        baseline: objective -> (N,) float32, what the greedy captions earned; empty where none were written.
        usable: (N, K) bool, False for captions that must not take part (truncated).
    """
    values, parts = {}, {}
    for name, reward in rewards.items():
        advantage, takes_part = center(reward, baseline.get(name), usable & ~reward.isnan())
        values[name], parts[name] = torch.where(takes_part, advantage, 0.0), takes_part
    any_part = torch.stack([part.any(1) for part in parts.values()]).any(0)
    teaches = torch.stack([(value != 0).any(1) for value in values.values()]).any(0)
    return GroupAdvantages(values, parts, int(any_part.sum()), int((any_part & ~teaches).sum()))


def combine_advantages(
    groups: Sequence[GroupAdvantages],
    weights: Mapping[str, float],
    reduce: Callable[[Mapping[str, float]], dict[str, float]],
) -> list[Tensor]:
    """Add the advantages of all objectives, each brought to the same size first: (N, K) float32 for each micro-batch.

    With several objectives each is divided by the root mean square of its advantages over all captions that take part,
    of all micro-batches and ranks, or by :data:`LEAST_SIZE` where that is more: else the objective with the widest
    range rules (reward-decoupled normalisation, as in BalCapRL 2605.07394; there over groups, here over the step), and
    an objective that is nearly always the same would have its few differences blown up. All are then multiplied by the
    weighted mean of these divisors, so that a second objective does not change the size of the policy gradient against
    the other losses: with advantages of size 1 the policy loss drowned the mask losses (docs/experiments.md). A single
    objective keeps its values. ``reduce`` is called exactly once, with keys that depend on ``weights`` alone, where
    there are several.
    """
    scales = dict.fromkeys(weights, 1.0)
    if len(weights) > 1:
        sums: dict[str, float] = {}
        for name in weights:
            sums[f"{name}/square"] = sum(float(group.values[name].double().square().sum()) for group in groups)
            sums[f"{name}/count"] = float(sum(int(group.takes_part[name].sum()) for group in groups))
        total = reduce(sums)
        squares = {name: total[f"{name}/square"] / max(total[f"{name}/count"], 1.0) for name in weights}
        sizes = {name: max(square**0.5, LEAST_SIZE) for name, square in squares.items()}
        common = sum(weights[name] * sizes[name] for name in weights) / sum(weights.values())
        scales = {name: common / sizes[name] for name in weights}
    return [
        torch.stack([group.values[name] * (weight * scales[name]) for name, weight in weights.items()]).sum(0)
        for group in groups
    ]


def policy_loss(log_probs: Tensor, advantages: Tensor, weight: float = 1.0) -> LossTerm:
    """Score-function loss of P sampled tokens: ``-sum(A * log p)``, whose gradient raises what earned an advantage.

    The average is over tokens, as in DAPO (2503.14476), not over sequences first. No token at all gives a zero with
    graph.

    Args:
        log_probs: (P,) float, log-probability of each sampled token, with graph.
        advantages: (P,) float, that of the token's caption; gets no gradient.
    """
    values = full_precision(log_probs)
    return LossTerm(-(values * advantages.detach().to(values)).sum() * weight, float(log_probs.numel()))


def kl_divergence(log_probs: Tensor, reference_log_probs: Tensor, weight: float = 1.0) -> LossTerm:
    """Estimate the divergence from a reference at sampled tokens alone: ``exp(r - p) - (r - p) - 1``, summed.

    The estimator called k3 (J. Schulman, "Approximating KL divergence", 2020): never negative, exactly 0 where both
    agree, unbiased for samples of the policy. A figure and no loss: its gradient, expected over those samples, is that
    of the other direction, KL(reference || policy). Training takes :func:`~dual_loop.losses.divergence`. Exponents are
    cut at 20, where float32 still holds the square.

    Args:
        log_probs: (P,) float, with graph. reference_log_probs: (P,) float, without.
    """
    values = full_precision(log_probs)
    difference = (reference_log_probs.detach().to(values) - values).clamp(max=20.0)
    return LossTerm((difference.exp() - difference - 1.0).sum() * weight, float(log_probs.numel()))

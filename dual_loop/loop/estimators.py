"""How rewards reach the captioner: one protocol, and the loop never asks which of them it holds.

============  ===========================  ==========================================================
name          written for each region      what teaches step 1
============  ===========================  ==========================================================
none          a greedy caption             nothing (captions of the data set still do)
scst          greedy and K samples         reward minus the greedy caption's reward (1612.00563)
grpo          greedy and K samples         reward minus the mean of the group (2402.03300)
gumbel        one sample                   the mask loss itself, through straight-through embeddings
gumbel+scst   greedy and K samples         both
gumbel+grpo   K samples                    both
============  ===========================  ==========================================================

All score-function estimators here make one update a roll-out, so the policy that is updated is the one that sampled:
no importance ratio, no clipping, unlike PPO and GRPO as published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dual_loop.config import PolicyConfig, RewardConfig, caption_gradient

Reduce = Callable[[Mapping[str, float]], dict[str, float]]
_EPSILON = 1e-6


@dataclass(frozen=True)
class Draws:
    """What the captioner must write for each region: a greedy caption or not, and K samples."""

    greedy: bool
    samples: int


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


class Estimator(Protocol):
    """Turns rewards into advantages.

    Attributes:
        name: as in ``policy.caption_gradient``.
        draws: what step 1 must write.
        is_rewarded: whether there is a policy loss.
        is_relaxed: whether step 2 reads the first sample through straight-through embeddings.
    """

    @property
    def name(self) -> str: ...
    @property
    def draws(self) -> Draws: ...
    @property
    def is_rewarded(self) -> bool: ...
    @property
    def is_relaxed(self) -> bool: ...

    def advantages(
        self, rewards: Mapping[str, Tensor], baseline: Mapping[str, Tensor], usable: Tensor
    ) -> GroupAdvantages:
        """Return the advantages of sampled captions.

        Args:
            rewards: objective -> (N, K) float32, NaN where the objective does not apply.
            baseline: objective -> (N,) float32, what the greedy captions earned; empty where none were written.
            usable: (N, K) bool, False for captions that must not take part (truncated).
        """
        ...


Center = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CaptionEstimator:
    """An estimator put together from its parts.

    Attributes:
        center: (rewards, baseline, takes part) -> (advantages, takes part); None where there is no policy loss.
    """

    name: str
    draws: Draws
    is_relaxed: bool
    center: Center | None

    @property
    def is_rewarded(self) -> bool:
        return self.center is not None

    def advantages(
        self, rewards: Mapping[str, Tensor], baseline: Mapping[str, Tensor], usable: Tensor
    ) -> GroupAdvantages:
        """See :class:`Estimator`."""
        if self.center is None:
            return GroupAdvantages({}, {}, 0, 0)
        values, parts = {}, {}
        for name, reward in rewards.items():
            takes_part = usable & ~reward.isnan()
            advantage, takes_part = self.center(reward, baseline.get(name), takes_part)
            values[name] = torch.where(takes_part, advantage, 0.0)
            parts[name] = takes_part
        any_part = torch.stack([part.any(1) for part in parts.values()]).any(0)
        teaches = torch.stack([(value != 0).any(1) for value in values.values()]).any(0)
        return GroupAdvantages(values, parts, int(any_part.sum()), int((any_part & ~teaches).sum()))


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


def build_estimator(config: PolicyConfig, reward: RewardConfig | None = None) -> Estimator:
    """Return the estimator that ``policy.caption_gradient`` names; ``reward`` decides what ``auto`` means."""
    name, count = caption_gradient(config, reward or RewardConfig()), config.captions_per_region
    group = against_scaled_group if config.advantage_scale == "group" else against_group
    table: dict[str, tuple[Draws, bool, Center | None]] = {
        "none": (Draws(True, 0), False, None),
        "scst": (Draws(True, count), False, against_greedy),
        "grpo": (Draws(True, count), False, group),
        "gumbel": (Draws(False, 1), True, None),
        "gumbel+scst": (Draws(True, count), True, against_greedy),
        "gumbel+grpo": (Draws(False, count), True, group),
    }
    return CaptionEstimator(name, *table[name])


def combine_advantages(groups: Sequence[GroupAdvantages], weights: Mapping[str, float], reduce: Reduce) -> list[Tensor]:
    """Add the advantages of all objectives, each brought to the same size first.

    With several objectives each is divided by the root mean square of its advantages over all captions that take part,
    of all micro-batches and ranks: else the objective with the widest range rules (reward-decoupled normalisation, as
    in BalCapRL 2605.07394; there over groups, here over the step). All are then multiplied by the weighted mean of
    these root mean squares, so that a second objective does not change the size of the policy gradient against the
    other losses: with advantages of size 1 the policy loss drowned the mask losses (docs/experiments.md). A single
    objective keeps its values.

    Args:
        groups: one for each micro-batch.
        weights: objective -> weight.
        reduce: adds sums over ranks; called exactly once, with keys that depend on ``weights`` alone, where there are
            several objectives.

    Returns:
        For each micro-batch (N, K) float32.
    """
    scales = dict.fromkeys(weights, 1.0)
    if len(weights) > 1:
        sums: dict[str, float] = {}
        for name in weights:
            sums[f"{name}/square"] = sum(float(group.values[name].double().square().sum()) for group in groups)
            sums[f"{name}/count"] = float(sum(int(group.takes_part[name].sum()) for group in groups))
        total = reduce(sums)
        sizes = {n: (total[f"{n}/square"] / max(total[f"{n}/count"], 1.0)) ** 0.5 for n in weights}
        common = sum(weights[name] * sizes[name] for name in weights) / sum(weights.values())
        scales = {name: common / max(sizes[name], _EPSILON) for name in weights}
    return [
        torch.stack([group.values[name] * (weight * scales[name]) for name, weight in weights.items()]).sum(0)
        for group in groups
    ]

"""What a caption earns. Every reward is a number a caption, NaN where it does not apply.

* cycle: IoU of the mask that the caption led to with the region's mask.
* contrast: the same minus the best IoU with another region of the image: a caption must pick its own mask.
* caption: likeness to reference captions, where the data set has some (``combined_caption_reward``).
* length: 1 inside a range of words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dual_loop.config import RewardConfig
from dual_loop.errors import ConfigError, DualLoopError, explain
from dual_loop.loop.judge import Judge, JudgeQuestion
from dual_loop.metrics import meteor_exact_stem

METEOR_SHARE, JUDGE_SHARE = 0.25, 0.75


class RewardError(DualLoopError):
    """A caption cannot be rewarded: no reward that is on applies to it."""


def own_and_margin(table: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the IoU (R,) of each caption's mask with its own region, and that minus the best of the other regions.

    Args:
        table: (R, N) float, the IoU of each caption's mask with every region; NaN for regions of other images.
        regions: (R,) int64, the region of each caption.

    Returns:
        Both (R,); the margin is in -1..1, NaN where the image has no other region.
    """
    own = table.gather(1, regions[:, None])[:, 0]
    is_own = torch.zeros_like(table, dtype=torch.bool).scatter(1, regions[:, None], True)
    others = table.masked_fill(is_own | table.isnan(), float("-inf"))
    best = others.amax(1) if table.shape[1] else table.new_zeros(len(table))
    return own, torch.where(best.isinf(), float("nan"), own - best)


def combined_caption_reward(
    generated: Sequence[str], references: Sequence[Sequence[str]], judge: Judge | None = None
) -> list[float]:
    """Return how well captions agree with reference captions: 0..1, NaN where there is no reference.

    The score is ``metrics.meteor_exact_stem`` over the references. With a judge: 0.25 of it and 0.75 of the judge's
    mark; where the judge gave none (``judge_failure = skip``), the score alone.

    Args:
        generated: R captions.
        references: for each the captions of its region, possibly none.
        judge: an LLM behind an OpenAI-compatible endpoint.

    Raises:
        ValueError: the lengths differ.
        JudgeError: the judge failed and the policy is ``error``.
    """
    if len(generated) != len(references):
        seen = f"{len(generated)} and {len(references)}"
        raise ValueError(explain("captions and references differ in number", "combined_caption_reward", seen))
    scores = [
        meteor_exact_stem(caption, own) if own else float("nan")
        for caption, own in zip(generated, references, strict=True)
    ]
    asked = [index for index, own in enumerate(references) if own]
    if judge is None or not asked:
        return scores
    marks = judge.ask([JudgeQuestion(generated[index], tuple(references[index])) for index in asked])
    for index, mark in zip(asked, marks, strict=True):
        if mark is not None:
            scores[index] = METEOR_SHARE * scores[index] + JUDGE_SHARE * mark
    return scores


def length_rewards(captions: Sequence[str], min_words: int, max_words: int) -> list[float]:
    """Return 1 for captions of ``min_words..max_words`` words, falling linearly to 0 at none and at twice as many.

    BalCapRL (2605.07394) conditions other rewards on the length instead; here the length is an objective of its own,
    whose advantage is normalised before it is added, so that a weight has one meaning.
    """
    rewards = []
    for caption in captions:
        count = len(caption.split())
        below, above = count / min_words, (2 * max_words - count) / max_words
        rewards.append(max(0.0, min(1.0, below, above)))
    return rewards


class RewardSet:
    """The rewards that are on, with their weights.

    Args:
        config: weights and length range.
        judge: for the caption reward.

    Raises:
        ConfigError: a negative weight, or no reward at all.
    """

    def __init__(self, config: RewardConfig, judge: Judge | None = None) -> None:
        weights = {
            "cycle": config.cycle_weight,
            "contrast": config.contrast_weight,
            "caption": config.caption_weight,
            "length": config.length_weight,
        }
        negative = [name for name, weight in weights.items() if weight < 0 or math.isnan(weight)]
        if negative:
            where = ", ".join(f"reward.{name}_weight" for name in negative)
            raise ConfigError(explain("a reward has a negative weight", where, expected="0 (off) or more"))
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        if not self.weights:
            fix = "set --cycle_reward_weight 1"
            raise ConfigError(explain("no reward is on", "reward", "all weights are 0", "at least one", fix))
        self.config, self.judge = config, judge

    def score(
        self,
        captions: Sequence[str],
        regions: Tensor,
        table: Tensor,
        references: Sequence[Sequence[str]],
        gates: Sequence[str | None],
        names: Sequence[str],
    ) -> dict[str, Tensor]:
        """Return what R captions earn in every objective that is on.

        Args:
            captions: R texts.
            regions: (R,) int64, their regions.
            table: (R, N), the IoU of each caption's mask with every region; NaN for regions of other images.
            references: for each caption the captions of its region.
            gates: for each caption the gate that closed on it; such a caption earns 0 wherever a reward applies.
            names: for each caption the name of its region, for messages.

        Returns:
            objective -> (R,) float32, NaN where it does not apply.

        Raises:
            RewardError: no objective applies to a caption.
        """
        own, margin = own_and_margin(table, regions)
        makers: dict[str, Callable[[], Tensor]] = {
            "cycle": own.float,
            "contrast": margin.float,
            "caption": lambda: self._caption_scores(captions, references, gates),
            "length": lambda: torch.tensor(length_rewards(captions, self.config.min_words, self.config.max_words)),
        }
        closed = torch.tensor([gate is not None for gate in gates], dtype=torch.bool)
        rewards = {}
        for name in self.weights:
            value = makers[name]()
            rewards[name] = torch.where(closed & ~value.isnan(), torch.zeros_like(value), value)
        applies = torch.stack([~reward.isnan() for reward in rewards.values()]).any(0)
        if len(captions) and not bool(applies.all()):
            raise RewardError(
                explain(
                    "no reward applies to a caption",
                    names[int((~applies).nonzero()[0])],
                    f"only {', '.join(self.weights)} {'is' if len(self.weights) == 1 else 'are'} on",
                    "at least one reward that applies to every region",
                    "set --cycle_reward_weight, or --regions_per_image 2 and images with several masks for contrast, "
                    "or give the region a caption",
                )
            )
        return rewards

    def _caption_scores(
        self, captions: Sequence[str], references: Sequence[Sequence[str]], gates: Sequence[str | None]
    ) -> Tensor:
        """Return likeness to references; the judge is not asked about captions that earn nothing anyway."""
        scores = torch.tensor([0.0 if own else float("nan") for own in references])
        is_open = [index for index, gate in enumerate(gates) if gate is None and references[index]]
        found = combined_caption_reward(
            [captions[index] for index in is_open], [references[index] for index in is_open], self.judge
        )
        scores[is_open] = torch.tensor(found, dtype=scores.dtype)
        return scores

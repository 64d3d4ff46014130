"""What a caption earns. Every reward is a number a caption, NaN where it does not apply.

* cycle: IoU of the mask that the caption led to with the region's mask.
* contrast: the same minus the best IoU with another region of the image: a caption must pick its own mask.
* caption: likeness to reference captions, where the data set has some (``combined_caption_reward``).
* length: 1 inside a range of words.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dual_loop.caption_metrics import meteor_exact_stem
from dual_loop.config import RewardConfig
from dual_loop.errors import ConfigError, explain
from dual_loop.loop.judge import Judge, JudgeQuestion
from dual_loop.metrics import own_and_margin

logger = logging.getLogger("dual_loop")

METEOR_SHARE, JUDGE_SHARE = 0.25, 0.75


LEAST = {"contrast": -1.0}
"""The least that a reward can be, where that is not 0."""


class RewardError(ConfigError):
    """The rewards that are set make no sense."""


def combined_caption_reward(
    generated: Sequence[str], references: Sequence[Sequence[str]], judge: Judge | None = None
) -> list[float]:
    """Return how well captions agree with reference captions: 0..1, NaN where there is no reference.

    The score is ``meteor_exact_stem`` over the references. With a judge: 0.25 of it and 0.75 of the judge's
    mark; where the judge gave none (``judge_failure = skip``), the score alone.

    Raises:
        ValueError: the lengths differ.
        JudgeError: the judge failed and the policy is ``error``.
    """
    if len(generated) != len(references):
        seen = f"{len(generated)} and {len(references)}"
        raise ValueError(explain("captions and references differ in number", "combined_caption_reward", seen))
    pairs = zip(generated, references, strict=True)
    scores = [meteor_exact_stem(caption, own) if own else float("nan") for caption, own in pairs]
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
    counts = [len(caption.split()) for caption in captions]
    return [max(0.0, min(1.0, count / min_words, (2 * max_words - count) / max_words)) for count in counts]


class RewardSet:
    """The rewards that are on, with their weights; the judge takes part in the caption reward.

    The cycle reward is on where it has a weight, or where nothing else is (``cycle_weight`` None).

    Raises:
        RewardError: a negative weight, or no reward at all.
    """

    def __init__(self, config: RewardConfig, judge: Judge | None = None) -> None:
        weights = {n: getattr(config, f"{n}_weight") for n in ("cycle", "contrast", "caption", "length")}
        if weights["cycle"] is None:
            weights["cycle"] = 0.0 if any(weights.values()) else 1.0
        negative = [name for name, weight in weights.items() if weight < 0 or math.isnan(weight)]
        if negative:
            where = ", ".join(f"reward.{name}_weight" for name in negative)
            raise RewardError(explain("a reward has a negative weight", where, expected="0 (off) or more"))
        self.weights = {name: float(weight) for name, weight in weights.items() if weight > 0}
        if not self.weights:
            fix = "set --cycle_reward_weight 1"
            raise RewardError(explain("no reward is on", "reward", "all weights are 0", "at least one", fix))
        self.config, self.judge, self._has_warned = config, judge, False

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
            regions: (R,) int64. references, names: of the region of each caption.
            table: (R, N), the IoU of each caption's mask with every region; NaN for regions of other images.
            gates: for each caption the gate that closed on it; such a caption earns the least that a reward can be.

        Returns:
            objective -> (R,) float32, NaN where it does not apply.
        """
        own, margin = own_and_margin(table, regions)

        def caption_scores() -> list[float]:
            # The judge is not asked about captions that earn nothing anyway.
            heard = [own if gate is None else () for own, gate in zip(references, gates, strict=True)]
            scores = combined_caption_reward(captions, heard, self.judge)
            return [0.0 if own and not h else score for score, own, h in zip(scores, references, heard, strict=True)]

        makers: dict[str, Callable[[], Tensor]] = {
            "cycle": own.float,
            "contrast": margin.float,
            "caption": lambda: torch.tensor(caption_scores()),
            "length": lambda: torch.tensor(length_rewards(captions, self.config.min_words, self.config.max_words)),
        }
        closed = torch.tensor([gate is not None for gate in gates], dtype=torch.bool)
        rewards = {}
        for name in self.weights:
            value = makers[name]()
            rewards[name] = torch.where(closed & ~value.isnan(), LEAST.get(name, 0.0), value)
        nothing = torch.stack([reward.isnan() for reward in rewards.values()]).all(0)
        if not self._has_warned and bool(nothing.any()):
            self._has_warned, where = True, names[int(nothing.nonzero()[0])]
            seen, fix = f"on: {', '.join(self.weights)}", "set --cycle_reward_weight, or give the region a caption"
            text = explain("Warning: no reward applies to a region; it is counted and teaches nothing", where, seen)
            logger.warning("%s; %s", text, fix)
        return rewards

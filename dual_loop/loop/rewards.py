"""What a caption earns. Every reward is a number a caption, NaN where it does not apply.

* cycle: IoU of the mask that the caption led to with the region's mask.
* contrast: the same minus the best IoU with another region of the image: a caption must pick its own mask.
* caption: likeness to reference captions, where the data set has some (``combined_caption_reward``).
* length: 1 inside a range of words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dual_loop.config import RewardConfig
from dual_loop.errors import ConfigError, DualLoopError, explain
from dual_loop.loop.judge import Judge, JudgeQuestion
from dual_loop.metrics import meteor_exact_stem

METEOR_SHARE, JUDGE_SHARE = 0.25, 0.75
CHUNK = 64
"""Predicted masks that are compared at once."""


class RewardError(DualLoopError):
    """A caption cannot be rewarded: no reward that is on applies to it."""


@torch.no_grad()
def iou_matrix(mask_logits: Tensor, caption_region: Tensor, targets: Tensor, region_image: Tensor) -> Tensor:
    """Return the IoU of each caption's mask with every region of the same image.

    Args:
        mask_logits: (R, Q, Q) float; the mask is where they are above 0.
        caption_region: (R,) int64, the region that each caption belongs to.
        targets: (N, Q, Q) bool or 0/1.
        region_image: (N,) int64, the image of each region.

    Returns:
        (R, N) float32: NaN for regions of other images, 1 where both masks are empty.
    """
    flat = (targets > 0).flatten(1).float()
    areas, rows = flat.sum(1), []
    for logits in mask_logits.split(CHUNK):
        predicted = (logits > 0).flatten(1).float()
        intersection = predicted @ flat.T
        union = predicted.sum(1)[:, None] + areas[None] - intersection
        rows.append(torch.where(union > 0, intersection / union.clamp_min(1), torch.ones_like(union)))
    matrix = torch.cat(rows) if rows else flat.new_zeros(0, len(flat))
    same_image = region_image[caption_region][:, None] == region_image[None]
    return matrix.masked_fill(~same_image, float("nan"))


def cycle_ious(matrix: Tensor, caption_region: Tensor) -> Tensor:
    """Return the IoU (R,) of each caption's mask with its own region, from :func:`iou_matrix`."""
    return matrix.gather(1, caption_region[:, None])[:, 0]


def contrasts(matrix: Tensor, caption_region: Tensor) -> Tensor:
    """Return own IoU minus the largest other IoU of the image: (R,) in -1..1, NaN where there is no other region."""
    own = torch.zeros_like(matrix, dtype=torch.bool).scatter(1, caption_region[:, None], True)
    others = matrix.masked_fill(own | matrix.isnan(), float("-inf"))
    best = others.amax(1) if matrix.shape[1] else matrix.new_zeros(len(matrix))
    return torch.where(best.isinf(), float("nan"), cycle_ious(matrix, caption_region) - best)


def picks_own(matrix: Tensor, caption_region: Tensor) -> Tensor:
    """Return 1.0 where the own region has the strictly largest IoU, else 0.0: (R,), NaN without another region."""
    contrast = contrasts(matrix, caption_region)
    return torch.where(contrast.isnan(), contrast, (contrast > 0).float())


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
        caption_region: Tensor,
        matrix: Tensor,
        references: Sequence[Sequence[str]],
        gates: Sequence[str | None],
        names: Sequence[str],
    ) -> dict[str, Tensor]:
        """Return what R captions earn in every objective that is on.

        Args:
            captions: R texts.
            caption_region: (R,) int64, their regions.
            matrix: (R, N) of :func:`iou_matrix`.
            references: for each caption the captions of its region.
            gates: for each caption the gate that closed on it; such a caption earns 0 wherever a reward applies.
            names: for each caption the name of its region, for messages.

        Returns:
            objective -> (R,) float32, NaN where it does not apply.

        Raises:
            RewardError: no objective applies to a caption.
        """
        given = (captions, caption_region, matrix, references, gates)
        values = {name: self._values(name, *given) for name in self.weights}
        closed = torch.tensor([gate is not None for gate in gates], dtype=torch.bool)
        rewards = {
            name: torch.where(closed & ~value.isnan(), torch.zeros_like(value), value) for name, value in values.items()
        }
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

    def _values(
        self,
        name: str,
        captions: Sequence[str],
        caption_region: Tensor,
        matrix: Tensor,
        references: Sequence[Sequence[str]],
        gates: Sequence[str | None],
    ) -> Tensor:
        if name == "cycle":
            return cycle_ious(matrix, caption_region).float()
        if name == "contrast":
            return contrasts(matrix, caption_region).float()
        if name == "length":
            return torch.tensor(length_rewards(captions, self.config.min_words, self.config.max_words))
        # The judge is not asked about captions that earn nothing anyway.
        scores = torch.tensor([0.0 if own else float("nan") for own in references])
        open_ones = [index for index, gate in enumerate(gates) if gate is None and references[index]]
        found = combined_caption_reward(
            [captions[index] for index in open_ones], [references[index] for index in open_ones], self.judge
        )
        scores[open_ones] = torch.tensor(found, dtype=scores.dtype)
        return scores

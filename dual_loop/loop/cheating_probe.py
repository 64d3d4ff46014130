"""The anti-cheat panel: is the captioner still speaking a language that others understand?

A captioner and a segmenter that train together can agree on a private code: captions that only this segmenter reads.
Every figure here would show it. The one that cannot be fooled is the frozen listener: the same captions, segmented by
the weights that training started from.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dual_loop.config import LoopConfig
from dual_loop.loop.captioner import Captioner
from dual_loop.loop.critic import AskedCaption, Critic
from dual_loop.loop.rows import Rows
from dual_loop.loop.segmenter import SegmentationInputs, mask_ious
from dual_loop.loop.teacher import plain_inputs
from dual_loop.metrics import distinct_ngrams
from dual_loop.model.adapters import adapters_disabled
from dual_loop.model.ema import StartingWeights
from dual_loop.model.prompts import Prompter
from dual_loop.model.video_llava_sam import VideoLLaVASAMModel, evaluating
from dual_loop.types import Batch, CaptionRollout, Exchange

REMEMBERED_CAPTIONS = 512
LEAST_PREFERENCE = 0.02
"""Mean difference in IoU from which a listener prefers one captioner's words to another's."""


class Auditor:
    """Measures the panel on the micro-batches of one optimiser step; runs without graph, in eval mode.

    Args:
        model: the unwrapped model.
        prompter, config: prompts of both steps.
        starting: the weights that training started from.
        exchange: sums and texts of all ranks.
    """

    def __init__(
        self,
        model: VideoLLaVASAMModel,
        prompter: Prompter,
        config: LoopConfig,
        starting: StartingWeights,
        exchange: Exchange,
    ) -> None:
        self.model, self.prompter, self.config = model, prompter, config
        self.starting, self.exchange = starting, exchange
        self.recent: deque[str] = deque(maxlen=REMEMBERED_CAPTIONS)
        # Rejections are part of what is measured here, never a reason to stop.
        greedy = dataclasses.replace(config, temperature=0.0, on_rejected="fallback", max_rejected_fraction=1.0)
        self.captioner = Captioner(model, prompter, greedy, is_silent=True)
        self.critic = Critic(model, prompter, config)

    def remember(self, rollouts: Sequence[CaptionRollout]) -> None:
        """Keep the generated captions that step 2 reads, for vocabulary and distinct n-grams."""
        for rollout in rollouts:
            pairs = zip(rollout.captions, rollout.from_reference, strict=True)
            self.recent.extend(caption for caption, given in pairs if not given)

    @torch.no_grad()
    def audit(
        self,
        batches: Sequence[Batch],
        features: Sequence[Tensor],
        rollouts: Sequence[CaptionRollout],
        inputs: Sequence[SegmentationInputs],
    ) -> dict[str, float]:
        """Return sums and counts of the panel over this rank's micro-batches; every rank must call this together.

        Keys: ``own_cycle_iou``, ``frozen_cycle_iou`` (the same captions, live and starting weights, eval mode);
        ``kl`` (divergence of the captioner from itself without the adapter, in nats a token, exact over the
        vocabulary, along the captions that were written); ``seg_probability`` (of [SEG] at its place, when it is not
        forced), ``seg_emitted`` (share of answers that greedy decoding would write up to [SEG]); ``vocabulary``,
        ``distinct_1``, ``distinct_2`` over the last captions of all ranks; ``own_preference``, ``frozen_preference``
        (IoU of today's captions minus that of the captions that the starting weights write of the same regions, by the
        live and by the starting listener); ``flag/private_code``: the live listener prefers today's captions and the
        starting one those of the start, both beyond chance.
        """
        sums = dict.fromkeys((f"{name}/{part}" for name in _RATIOS for part in ("sum", "count")), 0.0)
        with evaluating(self.model):
            for batch, rollout, one in zip(batches, rollouts, inputs, strict=True):
                self._listen(batch, rollout, one, sums, "own")
            with self.starting.swapped():
                for batch, rollout, one in zip(batches, rollouts, inputs, strict=True):
                    self._listen(batch, rollout, one, sums, "frozen")
            for batch, feature, rollout in zip(batches, features, rollouts, strict=True):
                self._diverge(batch, feature, rollout, sums)
        sums.update(self._language())
        sums.update(self._prefer(batches, features, rollouts))
        return sums

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"recent": list(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.recent = deque(state["recent"], maxlen=REMEMBERED_CAPTIONS)

    def _listen(
        self, batch: Batch, rollout: CaptionRollout, inputs: SegmentationInputs, sums: dict[str, float], who: str
    ) -> None:
        data = plain_inputs(inputs.data)
        logits = self.model(data, mode="predict")["segmentation"].mask_logits
        ious = mask_ious(logits, batch.target_masks).tolist()
        generated = [iou for iou, given in zip(ious, rollout.from_reference, strict=True) if not given]
        sums[f"{who}_cycle_iou/sum"] += sum(generated)
        sums[f"{who}_cycle_iou/count"] += float(len(generated))
        if who == "own":
            probability, emitted = self._seg_probability(data)
            sums["seg_probability/sum"] += float(probability.sum())
            sums["seg_emitted/sum"] += float(emitted.sum())
            sums["seg_probability/count"] += float(len(probability))
            sums["seg_emitted/count"] += float(len(emitted))

    def _seg_probability(self, data: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return for each [SEG] its probability at its place, and whether greedy decoding would get there."""
        hidden, ids = self.model.hidden_states(data), data["input_ids"]
        row, column = (ids == self.prompter.seg_id).nonzero(as_tuple=True)
        lead = self._answer_lead()
        probability = self.model.answer_logits(hidden[row, column - 1]).float().softmax(-1)[:, self.prompter.seg_id]
        emitted = torch.ones_like(probability, dtype=torch.bool)
        for back in range(lead + 1):
            predicted = self.model.answer_logits(hidden[row, column - 1 - back]).argmax(-1)
            emitted &= predicted == ids[row, column - back]
        return probability, emitted

    def _answer_lead(self) -> int:
        """Return how many tokens of the answer stand before [SEG], for the first answer of the bank in use."""
        branch = self.prompter.segment_branch("x", self.config.segment_question, self.config.segment_answer)
        answer = [token for token in branch.labels if token != -100]
        return answer.index(self.prompter.seg_id)

    def _diverge(self, batch: Batch, features: Tensor, rollout: CaptionRollout, sums: dict[str, float]) -> None:
        """Add the exact divergence from the adapter-free captioner along the generated captions."""
        rows, spans = Rows(batch, self.prompter, captions_only=True), []
        for region, ids in enumerate(rollout.token_ids):
            if rollout.from_reference[region] or not ids:
                continue
            cells, seed = int(batch.prompt_masks[region].sum()), int(batch.region_seeds[region])
            branch = self.prompter.sampled_branch(cells, ids, self.config.caption_question, seed)
            place = rows.add_captioning(region, branch)
            spans.append((place, len(branch.input_ids) - len(ids) + 1, len(ids)))
        if not spans:
            return
        data = rows.pack(features)
        index = [(p.row, rows.start_of(p) + skip - 1 + k) for p, skip, count in spans for k in range(count)]
        row, column = torch.tensor(index, device=features.device).unbind(1)
        live = self.model.hidden_states(data)[row, column]
        with adapters_disabled(self.model):
            reference = self.model.hidden_states(data)[row, column]
        for own, bare in zip(live.split(CHUNK), reference.split(CHUNK), strict=True):
            own_log = self.model.answer_logits(own).float().log_softmax(-1)
            bare_log = self.model.answer_logits(bare).float().log_softmax(-1)
            sums["kl/sum"] += float((own_log.exp() * (own_log - bare_log)).sum())
        sums["kl/count"] += float(len(row))

    def _language(self) -> dict[str, float]:
        texts = self.exchange.gather(list(self.recent))
        values = {"vocabulary": float(len({word for text in texts for word in text.lower().split()}))}
        values.update({f"distinct_{n}": distinct_ngrams(texts, n) for n in (1, 2)})
        # The same on every rank: sums over ranks divide out again.
        return {f"{name}/{part}": v for name, value in values.items() for part, v in (("sum", value), ("count", 1.0))}

    def _prefer(
        self,
        batches: Sequence[Batch],
        features: Sequence[Tensor],
        rollouts: Sequence[CaptionRollout],
    ) -> dict[str, float]:
        """Let both listeners hear today's captions and those that the starting captioner writes of the same regions.

        Where both wrote the same the preference is 0, so the comparison has little noise: it is paired by region.
        """
        with self.starting.swapped():
            first = self.captioner.roll_out(batches, features)
        own = self._preferences(batches, features, rollouts, first)
        with self.starting.swapped():
            frozen = self._preferences(batches, features, rollouts, first)
        sums: dict[str, float] = {}
        for name, values in (("own_preference", own), ("frozen_preference", frozen)):
            sums[f"{name}/sum"], sums[f"{name}/count"] = float(sum(values)), float(len(values))
            sums[f"{name}/squares"] = float(sum(value * value for value in values))
        total = self.exchange.reduce({**sums, "ranks": 1.0})
        sums = {name: value for name, value in sums.items() if not name.endswith("/squares")}
        is_private = _beyond_chance(total, "own_preference", 1.0) and _beyond_chance(total, "frozen_preference", -1.0)
        # A counter: the ranks' parts add up to 1.
        return {**sums, "flag/private_code": 1.0 / total["ranks"] if is_private else 0.0}

    def _preferences(
        self,
        batches: Sequence[Batch],
        features: Sequence[Tensor],
        rollouts: Sequence[CaptionRollout],
        first: Sequence[CaptionRollout],
    ) -> list[float]:
        """Return for each generated caption its IoU minus that of the starting captioner's caption."""
        found = []
        for batch, feature, now, before in zip(batches, features, rollouts, first, strict=True):
            regions = [n for n, given in enumerate(now.from_reference) if not given]
            texts = [(n, now.captions[n], before.captions[n]) for n in regions]
            asked = [AskedCaption(n, text) for n, *pair in texts for text in pair]
            matrix = self.critic.score(batch, feature, asked)
            own = [float(matrix[row, caption.region]) for row, caption in enumerate(asked)]
            found += [new - old for new, old in zip(own[0::2], own[1::2], strict=True)]
        return found


def _beyond_chance(total: Mapping[str, float], name: str, sign: float) -> bool:
    """Tell whether a mean preference has ``sign``, at least 0.02 of size, and twice its standard error."""
    count = total[f"{name}/count"]
    if count < 2:
        return False
    mean = sign * total[f"{name}/sum"] / count
    variance = max(total[f"{name}/squares"] / count - mean * mean, 0.0) / (count - 1)
    return mean >= LEAST_PREFERENCE and mean > 2 * variance**0.5


CHUNK = 64
"""Tokens whose logits are held at once: 64 x 151,674 x 4 bytes are 39 MB, twice."""

_RATIOS = ("own_cycle_iou", "frozen_cycle_iou", "kl", "seg_probability", "seg_emitted")

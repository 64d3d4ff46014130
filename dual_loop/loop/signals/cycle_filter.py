"""The cycle filter: a generated caption teaches step 2 by how good it seems."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dual_loop.config import LISTENERS, Config
from dual_loop.loop.scorer import RegionText
from dual_loop.loop.signals.base import MicroBatch, Signal
from dual_loop.loop.spoken import log_likelihoods, trust
from dual_loop.metrics import ratio
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA


class CycleFilter(Signal):
    """Weighs generated captions by a score in 0..1: 1 from ``loop.cycle_keep`` on, 0 up to ``loop.cycle_drop``.

    Between the two the weight is linear. ``loop.cycle_score`` says what the score is: the IoU of the caption's own
    mask, or ``loop.spoken.trust`` of captioner and ``reward.listener``.
    """

    name = "cycle_filter"

    def __init__(self, model: Sa2VA, prompter: Prompter, config: Config) -> None:
        self.model, self.prompter, self.loop = model, prompter, config.loop
        self.reads, listener = config.loop.cycle_score == "likelihood", config.reward.listener
        self.is_own, self.is_apart = listener == "own", listener not in LISTENERS
        self.heard: list[Tensor] = []

    def asks(self, micro: MicroBatch) -> Iterable[RegionText]:
        if self.reads and not self.is_apart:
            return []
        return [(region, micro.captions[region].text) for region in micro.generated]

    def listen(self, window: Sequence[MicroBatch]) -> None:
        self.heard = [self._read(micro) for micro in window] if self.reads else []

    def plan(self, window: Sequence[MicroBatch]) -> None:
        keep, drop = self.loop.cycle_keep, self.loop.cycle_drop
        assert keep is not None, "the filter is on"
        for number, micro in enumerate(window):
            regions, captions = micro.generated, micro.captions
            scores = [float(micro.scores[region, text][region]) for region, text in self.asks(micro)]
            if self.reads:
                heard, ious = self.heard[number], torch.tensor(scores) if self.is_apart else None
                scores = trust(heard if self.is_own else self._read(micro), heard, ious).tolist()
                scores = [0.0 if captions[n].rejected else score for n, score in zip(regions, scores, strict=True)]
            own = [min(1.0, max(0.0, (score - drop) / (keep - drop))) for score in scores]
            for region, weight in zip(regions, own, strict=True):
                micro.plan.weights[region] *= weight
            micro.plan.metrics |= ratio("filter_weight", own)
            micro.plan.metrics["caption/filtered"] = float(own.count(0.0))

    def _read(self, micro: MicroBatch) -> Tensor:
        spoken = [(region, micro.captions[region].token_ids) for region in micro.generated]
        return log_likelihoods(self.model, self.prompter, micro.batch, micro.seen, spoken, self.loop.caption_question)

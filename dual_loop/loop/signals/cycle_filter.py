"""The cycle filter: a generated caption teaches step 2 by how well its own mask comes back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dual_loop.loop.scorer import RegionText
from dual_loop.loop.signals.base import MicroBatch, Signal
from dual_loop.metrics import ratio


class CycleFilter(Signal):
    """Weighs generated captions by their cycle IoU: 1 from ``keep`` on, 0 up to ``drop``, linear between.

    Args:
        keep, drop: ``loop.cycle_keep`` and ``loop.cycle_drop``, IoUs in 0..1.
    """

    name = "cycle_filter"

    def __init__(self, keep: float, drop: float) -> None:
        self.keep, self.drop = keep, drop

    def asks(self, micro: MicroBatch) -> Iterable[RegionText]:
        return [(region, caption.text) for region, caption in enumerate(micro.captions) if not caption.is_reference]

    def plan(self, window: Sequence[MicroBatch]) -> None:
        for micro in window:
            own = []
            for region, text in self.asks(micro):
                iou = float(micro.scores[region, text][region])
                own.append(min(1.0, max(0.0, (iou - self.drop) / (self.keep - self.drop))))
                micro.plan.weights[region] *= own[-1]
            micro.plan.metrics |= ratio("filter_weight", own)
            micro.plan.metrics["caption/filtered"] = float(own.count(0.0))

"""The cycle filter: a generated caption teaches step 2 by how well its own mask comes back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dual_loop.loop.scorer import RegionText
from dual_loop.loop.signals.base import Signal, Window
from dual_loop.types import Batch, RegionCaption


class CycleFilter(Signal):
    """Weighs generated captions by their cycle IoU: 1 from ``keep`` on, 0 up to ``drop``, linear between.

    Args:
        keep, drop: ``loop.cycle_keep`` and ``loop.cycle_drop``, IoUs in 0..1.
    """

    name = "cycle_filter"

    def __init__(self, keep: float, drop: float) -> None:
        self.keep, self.drop = keep, drop

    def asks(self, batch: Batch, captions: Sequence[RegionCaption]) -> Iterable[RegionText]:
        return [(region, caption.text) for region, caption in enumerate(captions) if not caption.is_reference]

    def plan(self, window: Window) -> None:
        for captions, scores, plan in zip(window.captions, window.scores, window.plans, strict=True):
            own = []
            for region, caption in enumerate(captions):
                if not caption.is_reference:
                    iou = float(scores[region, caption.text][region])
                    own.append(min(1.0, max(0.0, (iou - self.drop) / (self.keep - self.drop))))
                    plan.weights[region] *= own[-1]
            plan.metrics.update({"filter_weight/sum": sum(own), "filter_weight/count": float(len(own))})
            plan.metrics["caption/filtered"] = float(sum(weight == 0.0 for weight in own))

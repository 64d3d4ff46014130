"""The held-out set before and after training: figures of both, gains with their intervals, and cheating flags."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

from dual_loop.errors import ConfigError, explain
from dual_loop.evaluation.bootstrap import paired_bootstrap
from dual_loop.evaluation.cheating_flags import find_flags
from dual_loop.evaluation.figures import cycle_gains, summarise
from dual_loop.evaluation.measure import MeasuredRegion


class EvaluationSummary(TypedDict, total=False):
    """What ``summary.json`` says of the held-out set, as far as it was measured; a gain is mean and 95 % interval."""

    before: dict[str, float | None]
    after: dict[str, float | None]
    gain: dict[str, dict[str, float]]
    flags: list[str]


def plain_figures(results: Sequence[MeasuredRegion]) -> dict[str, float | None]:
    """Return all figures as JSON holds them: None where there is nothing to average."""
    return {name: None if math.isnan(value) else value for name, value in summarise(results).items()}


def evaluation_summary(
    before: Sequence[MeasuredRegion] | None, after: Sequence[MeasuredRegion] | None
) -> EvaluationSummary:
    """Return what is said of the regions that were measured before and after."""
    summary = EvaluationSummary()
    if before is not None:
        summary["before"] = plain_figures(before)
    if after is not None:
        summary["after"] = plain_figures(after)
    if before is not None and after is not None:
        change = gain(before, after)
        summary["gain"] = {**({"gIoU": change} if change else {}), **cycle_gains(before, after)}
        summary["flags"] = find_flags(before, after)
    return summary


def gain(before: Sequence[MeasuredRegion], after: Sequence[MeasuredRegion]) -> dict[str, float]:
    """Return mean gain in gIoU with its 95 % interval: paired by region and sentence, resampled by image.

    Nothing where no region has a sentence.

    Raises:
        ConfigError: the two did not measure the same regions.
    """
    if [(b.name, len(b.ious)) for b in before] != [(a.name, len(a.ious)) for a in after]:
        what, fix = "different regions", "keep --eval_dir and --eval_max_samples the same when resuming"
        seen = f"{len(before)} and {len(after)} regions"
        raise ConfigError(explain(f"the evaluations before and after measured {what}", "data.eval_dir", seen, fix=fix))
    if not any(result.ious for result in before):
        return {}
    first, second = ([iou for result in results for iou in result.ious] for results in (before, after))
    return paired_bootstrap(first, second, groups=[result.image for result in before for _ in result.ious])

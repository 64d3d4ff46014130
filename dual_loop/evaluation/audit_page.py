"""The page of an audit: worst masks, ambiguous captions, best pairs; ranked, with pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dual_loop.data.masks import decode_rle
from dual_loop.drawing import GIVEN_COLOUR, PREDICTED_COLOUR, overlay
from dual_loop.evaluation.figures import DataFigures, figure_rows
from dual_loop.evaluation.measure import MeasuredRegion
from dual_loop.evaluation.runner import SkippedEntry
from dual_loop.html import Figure, Page
from dual_loop.types import RegionSample

PICTURE_SIDE = 300
BINS = 10


def audit_page(
    regions: Sequence[MeasuredRegion],
    load: Callable[[MeasuredRegion], RegionSample],
    *,
    lead: str,
    figures: Mapping[str, DataFigures],
    kept: int,
    left_out: Mapping[str, int],
    skipped: Sequence[SkippedEntry],
    examples: int = 24,
) -> str:
    """Return the page as HTML.

    Args:
        regions: all of them, with the loop closed.
        load: reads the sample of a region again, for its picture.
        kept, left_out: how many captions became pseudo-labels, and why the others did not.
    """
    page = Page("Audit: does every caption lead back to its mask?", lead)
    ious = [region.cycle_iou for region in regions]
    mean, good = (f"{100 * sum(values) / len(ious):.1f} %" for values in (ious, (iou >= 0.7 for iou in ious)))
    tiles = {"regions": f"{len(regions):,}", "mean cycle IoU": mean, "cycle IoU of 0.7 or more": good}
    page.tiles({**tiles, "kept as pseudo-labels": f"{kept:,}"})
    page.heading("Figures", "in per cent, with 95 % intervals over images")
    rows = [(data, *row) for data, tasks in figures.items() for row in figure_rows({"loop": tasks["loop"]})]
    page.table(("data", "figure", "value", "interval"), rows)
    counts = np.bincount([min(int(iou * BINS), BINS - 1) for iou in ious], minlength=BINS).tolist()
    page.heading("Cycle IoU", "how many regions came back how well")
    bars = ["█" * round(30 * count / max(counts)) for count in counts]
    steps = [f"{k / BINS:.1f} to {(k + 1) / BINS:.1f}" for k in range(BINS)]
    page.table(("IoU", "regions", ""), list(zip(steps, counts, bars, strict=True)))
    page.heading("Left out of the pseudo-labels", "by the first reason that applies")
    page.table(("reason", "captions"), sorted(left_out.items()) or [("nothing", 0)])
    if skipped:
        page.heading("Skipped", "entries that could not be read")
        page.table(("entry", "reason", "message"), [(s["entry"], s["reason"], s["message"]) for s in skipped[:200]])
    ranked = sorted(regions, key=lambda region: region.cycle_iou)
    margins = [(region.uniqueness, region) for region in regions if region.uniqueness is not None]
    ambiguous = [region for margin, region in sorted(margins, key=lambda pair: pair[0]) if margin <= 0]
    for title, note, found in (
        ("Worst masks", "the mask that came back (blue) misses the given one (orange)", ranked),
        ("Ambiguous captions", "the caption leads to another region at least as well as to its own", ambiguous),
        ("Best pairs", "caption and mask lead to each other", ranked[::-1]),
    ):
        shown = found[:examples]
        page.heading(f"{title} ({len(shown)})", note if shown else "none")
        if shown:
            page.gallery([_figure(region, load(region)) for region in shown])
    return page.html()


def _figure(region: MeasuredRegion, sample: RegionSample) -> Figure:
    assert region.cycle is not None  # the audit closes the loop
    back, target = decode_rle(region.cycle.mask, region.name), decode_rle(region.target, region.name)
    pictures = [
        overlay(sample.image, sample.masks[region.own], GIVEN_COLOUR, PICTURE_SIDE),
        overlay(sample.segmentation_image, back, PREDICTED_COLOUR, PICTURE_SIDE, outline=target),
    ]
    margin = region.uniqueness
    lines = [f"“{region.caption}”" + (f" (rejected: {region.rejected})" if region.rejected else "")]
    lines += [f"reference: {text}" for text in region.references[:1]]
    lines += [f"IoU {region.cycle_iou:.3f}" + ("" if margin is None else f", uniqueness {margin:+.3f}"), region.name]
    return Figure(pictures, lines)

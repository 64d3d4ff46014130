"""The page of an audit: worst masks, ambiguous captions, best pairs; ranked, with pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dual_loop.data.masks import decode_rle
from dual_loop.drawing import GIVEN_COLOUR, PREDICTED_COLOUR, data_uri, overlay
from dual_loop.evaluation.regions import Record, cycle_iou, uniqueness
from dual_loop.html import Figure, Page
from dual_loop.types import RegionSample

PICTURE_SIDE = 300
BINS = 10

Loader = Callable[[Record], RegionSample]


def audit_page(
    records: Sequence[Record],
    load: Loader,
    *,
    lead: str,
    figures: Mapping[str, Any],
    kept: int,
    left_out: Mapping[str, int],
    skipped: Sequence[Mapping[str, str]],
    examples: int = 24,
) -> str:
    """Return the page as HTML.

    Args:
        records: of all regions.
        load: reads the sample of a record again, for its picture.
        lead: what was audited, with which weights.
        figures: of the loop, by data set (``evaluation.figures``).
        kept, left_out: how many captions became pseudo-labels, and why the others did not.
        skipped: entries that could not be read.
        examples: pictures of each kind.
    """
    page = Page("Audit: does every caption lead back to its mask?", lead)
    ious = [cycle_iou(record) for record in records]
    mean = sum(ious) / len(ious)
    page.tiles(
        {
            "regions": f"{len(records):,}",
            "mean cycle IoU": f"{100 * mean:.1f} %",
            "cycle IoU of 0.7 or more": f"{100 * sum(iou >= 0.7 for iou in ious) / len(ious):.1f} %",
            "kept as pseudo-labels": f"{kept:,}",
        }
    )
    _figure_table(page, figures)
    _histogram(page, ious)
    page.heading("Left out of the pseudo-labels", "by the first reason that applies")
    page.table(("reason", "captions"), sorted(left_out.items()) or [("nothing", 0)])
    if skipped:
        page.heading("Skipped", "entries that could not be read")
        page.table(("entry", "reason", "message"), [(s["entry"], s["reason"], s["message"]) for s in skipped[:200]])
    ranked = sorted(records, key=cycle_iou)
    margins = [(record, value) for record in records if (value := uniqueness(record)) is not None]
    ambiguous = [record for record, value in sorted(margins, key=lambda pair: pair[1]) if value <= 0]
    _gallery(
        page, "Worst masks", "the mask that came back (blue) misses the given one (orange)", ranked[:examples], load
    )
    note = "the caption leads to another region of the image at least as well as to its own"
    _gallery(page, "Ambiguous captions", note, ambiguous[:examples], load)
    _gallery(page, "Best pairs", "caption and mask lead to each other", ranked[::-1][:examples], load)
    return page.html()


def _figure_table(page: Page, figures: Mapping[str, Any]) -> None:
    rows = []
    for name, tasks in figures.items():
        for figure, value in tasks["loop"].items():
            if isinstance(value, dict):
                numbers = [f"{100 * value[key]:.1f}" for key in ("value", "ci95_low", "ci95_high")]
                rows.append((name, figure, numbers[0], f"{numbers[1]} to {numbers[2]}"))
    page.heading("Figures", "in per cent, with 95 % intervals over images")
    page.table(("data", "figure", "value", "interval"), rows)


def _histogram(page: Page, ious: Sequence[float]) -> None:
    counts = [0] * BINS
    for iou in ious:
        counts[min(int(iou * BINS), BINS - 1)] += 1
    most = max(counts)
    page.heading("Cycle IoU", "how many regions came back how well")
    rows = [(f"{k / BINS:.1f} to {(k + 1) / BINS:.1f}", n, "█" * round(30 * n / most)) for k, n in enumerate(counts)]
    page.table(("IoU", "regions", ""), rows)


def _gallery(page: Page, title: str, note: str, records: Sequence[Record], load: Loader) -> None:
    page.heading(f"{title} ({len(records)})", note if records else "none")
    if records:
        page.gallery([_figure(record, load(record)) for record in records])


def _figure(record: Record, sample: RegionSample) -> Figure:
    target = decode_rle(record["target"], record["name"])
    given = sample.masks[record["own"]]
    back = decode_rle(record["cycle"]["mask"], record["name"])
    pictures = [
        overlay(sample.image, given, GIVEN_COLOUR, PICTURE_SIDE),
        overlay(sample.segmentation_image, back, PREDICTED_COLOUR, PICTURE_SIDE, outline=target),
    ]
    margin = uniqueness(record)
    numbers = f"IoU {cycle_iou(record):.3f}" + ("" if margin is None else f", uniqueness {margin:+.3f}")
    text = f"“{record['caption']}”" + (f" (rejected: {record['rejected']})" if record["rejected"] else "")
    lines = [text, numbers, record["name"]]
    if record["references"]:
        lines.insert(1, f"reference: {record['references'][0]}")
    return Figure([data_uri(picture) for picture in pictures], lines, alt=f"{record['name']}: {record['caption']}")

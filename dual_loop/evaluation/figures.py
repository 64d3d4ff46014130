"""From region records to figures with intervals; pure, so that any number of ranks and resumes gives the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dual_loop.evaluation.caption_scores import score_captions
from dual_loop.evaluation.regions import Record, cycle_iou, uniqueness
from dual_loop.metrics import PRECISION_THRESHOLDS, SegmentationSums, bootstrap_ratio, distinct_ngrams, iou

Figure = dict[str, float | None]


def figures_of(records: Sequence[Record], tasks: Sequence[str]) -> dict[str, Any]:
    """Return the figures of one data set: ``{"referring": {...}, "captioning": {...}, "loop": {...}}``.

    Every figure is ``{"value", "ci95_low", "ci95_high"}``: fractions of 1 with the 95 % percentile interval of a
    bootstrap over images (None where it has no mean of single values, such as BLEU).
    """
    makers: dict[str, Callable[[Sequence[Record]], dict[str, Any]]] = {
        "referring": referring_figures,
        "captioning": captioning_figures,
        "loop": loop_figures,
    }
    found = {task: makers[task](records) for task in tasks}
    return {"regions": len(records), "images": len({r["image"] for r in records}), **found}


def referring_figures(records: Sequence[Record]) -> dict[str, Any]:
    """gIoU, cIoU, Pr@t over sentences; ``without_mask`` is the share of answers that asked for no mask."""
    pairs = [(record["image"], sentence) for record in records for sentence in record["sentences"]]
    if not pairs:
        return {"sentences": 0}
    images = [image for image, _ in pairs]
    inner = np.array([sentence["intersection"] for _, sentence in pairs], np.int64)
    outer = np.array([sentence["union"] for _, sentence in pairs], np.int64)
    sums = SegmentationSums()
    sums.update(inner, outer)
    values = sums.as_dict()
    ious = iou(inner, outer)
    ones = np.ones(len(pairs))
    found: dict[str, Any] = {"sentences": len(pairs)}
    found["gIoU"] = _figure(values["gIoU"], ious, ones, images)
    found["cIoU"] = _figure(values["cIoU"], inner, outer, images)
    for threshold in PRECISION_THRESHOLDS:
        name = f"Pr@{threshold:g}"
        found[name] = _figure(values[name], ious >= threshold, ones, images)
    missing = np.array([sentence["num_masks"] == 0 for _, sentence in pairs], float)
    found["without_mask"] = _figure(float(missing.mean()), missing, ones, images)
    return found


def captioning_figures(records: Sequence[Record]) -> dict[str, Any]:
    """CIDEr-D, BLEU, ROUGE-L, METEOR where references are; length and variety of all captions."""
    texts = [record["caption"] for record in records]
    counted = [float(len(text.split())) for text in texts]
    images = [record["image"] for record in records]
    found: dict[str, Any] = {"captions": len(texts)}
    if not texts:
        return found
    found["words"] = _figure(float(np.mean(counted)), counted, np.ones(len(counted)), images)
    rejected = np.array([record["rejected"] is not None for record in records], float)
    found["rejected"] = _figure(float(rejected.mean()), rejected, np.ones(len(rejected)), images)
    for length in (1, 2):
        found[f"distinct_{length}"] = _plain(distinct_ngrams(texts, length))
    own = [record for record in records if record["references"]]
    found["with_references"] = len(own)
    scores = score_captions([record["caption"] for record in own], [record["references"] for record in own])
    found["tokenizer"] = scores.tokenizer
    own_images = [record["image"] for record in own]
    for name, value in scores.corpus.items():
        single = scores.single.get(name)
        found[name] = _plain(value) if single is None else _figure(value, single, np.ones(len(single)), own_images)
    if scores.missing:
        found["missing"] = scores.missing
    return found


def loop_figures(records: Sequence[Record]) -> dict[str, Any]:
    """Cycle IoU of all captions; uniqueness and the share that picks its own region, in images with several."""
    cycles = [(record, record["cycle"]) for record in records if "cycle" in record]
    if not cycles:
        return {"captions": 0}
    images = [record["image"] for record, _ in cycles]
    ious = [cycle_iou(record) for record, _ in cycles]
    inner = np.array([cycle["intersection"] for _, cycle in cycles], float)
    outer = np.array([cycle["union"] for _, cycle in cycles], float)
    ones = np.ones(len(cycles))
    ratio = float(inner.sum() / outer.sum()) if outer.sum() else 1.0
    found: dict[str, Any] = {"captions": len(cycles)}
    found["cycle_gIoU"] = _figure(float(np.mean(ious)), ious, ones, images)
    found["cycle_cIoU"] = _figure(ratio, inner, outer, images)
    several = [(record["image"], uniqueness(record)) for record, _ in cycles]
    several = [(image, value) for image, value in several if value is not None]
    found["in_company"] = len(several)
    if several:
        margins = np.array([value for _, value in several])
        company = [image for image, _ in several]
        found["uniqueness"] = _figure(float(margins.mean()), margins, np.ones(len(margins)), company)
        found["picks_own"] = _figure(float((margins > 0).mean()), margins > 0, np.ones(len(margins)), company)
    return found


def _figure(value: float, numerators: Any, denominators: Any, images: Sequence[str]) -> Figure:
    low, high = bootstrap_ratio(numerators, denominators, images)
    return {"value": value, "ci95_low": low, "ci95_high": high}


def _plain(value: float) -> Figure:
    return {"value": value, "ci95_low": None, "ci95_high": None}


def markdown_table(results: dict[str, Any]) -> str:
    """Return the figures of all data sets as Markdown, in per cent but for CIDEr-D and words (as they are)."""
    lines = []
    for data, tasks in results.items():
        lines += [f"**{data}**: {tasks['regions']} regions, {tasks['images']} images", ""]
        lines += ["| figure | value | 95 % interval |", "| --- | --- | --- |"]
        for figures in (value for value in tasks.values() if isinstance(value, dict)):
            for name, figure in figures.items():
                if isinstance(figure, dict) and "value" in figure:
                    lines.append(_row(name, figure))
        lines.append("")
    return "\n".join(lines)


def _row(name: str, figure: Figure) -> str:
    scale = 1.0 if name in ("CIDEr-D", "words") else 100.0
    value, low, high = (None if x is None else x * scale for x in figure.values())
    interval = (
        "-" if low is None or high is None else f"{low:.1f} to {high:.1f}" if scale > 1 else f"{low:.2f} to {high:.2f}"
    )
    assert value is not None  # only limits may be missing
    return f"| {name} | {value:.1f} | {interval} |" if scale > 1 else f"| {name} | {value:.2f} | {interval} |"

"""From measured regions to figures; pure, so that any number of ranks and resumes gives the same.

* gIoU and cIoU: segmentation from the data set's own captions, one sample a sentence, at the original size; of those
  without a target (gRefCOCO) an empty mask has IoU 1 and any other 0.
* cycle_gIoU: the model's own caption of the region is segmented; mean IoU against the region's mask.
* cycle_gIoU_frozen: the same captions, segmented by the weights that training started from.
* cycle_gIoU_independent: the same captions, segmented by weights that were trained apart.
* uniqueness, uniqueness_frozen: IoU of that mask with its own region minus the best with another region of the image.
* caption_exact: share of generated captions that equal one of the region's captions (lower case, no final stop).
* caption_words, vocabulary, distinct_1, distinct_2: length and variety of the generated captions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from dual_loop.caption_metrics import distinct_ngrams
from dual_loop.data.masks import decode_rle
from dual_loop.evaluation.bootstrap import bootstrap_ratio, paired_bootstrap
from dual_loop.evaluation.caption_scores import score_captions
from dual_loop.evaluation.measure import MeasuredRegion, SegmentedSentence
from dual_loop.metrics import PRECISION_THRESHOLDS, iou


class Figure(TypedDict):
    """A figure, as a fraction of 1, with the 95 % percentile interval of a bootstrap over images.

    The interval is None where the figure is no mean of single values, such as BLEU.
    """

    value: float
    ci95_low: float | None
    ci95_high: float | None


TaskFigures = dict[str, "Figure | int | str | dict[str, str]"]
"""The figures of one task by name, with counts and what is missing; JSON holds them as they are."""
DataFigures = dict[str, "int | TaskFigures"]
"""``regions`` and ``images`` of one data set, and its figures by task."""


def summarise(regions: Sequence[MeasuredRegion]) -> dict[str, float]:
    """Return the figures that the head of this module explains; NaN where nothing was measured."""
    sentences = [sentence for region in regions for sentence in region.answers]
    union = sum(sentence.union for sentence in sentences)
    captions = [region.caption for region in regions]
    return {
        "gIoU": _mean(value for region in regions for value in region.ious),
        "cIoU": sum(sentence.intersection for sentence in sentences) / union if union else float("nan"),
        "cycle_gIoU": _mean(region.cycle_iou for region in regions),
        "caption_exact": _mean(region.exact for region in regions),
        "cycle_gIoU_frozen": _mean(region.frozen_iou for region in regions),
        "uniqueness": _mean(region.uniqueness for region in regions),
        "uniqueness_frozen": _mean(region.frozen_uniqueness for region in regions),
        "caption_words": _mean(len(caption.split()) for caption in captions),
        "vocabulary": float(len({word for caption in captions for word in caption.lower().split()})),
        "distinct_1": distinct_ngrams(captions, 1),
        "distinct_2": distinct_ngrams(captions, 2),
        **({"cycle_gIoU_independent": _mean(heard)} if (heard := _independent(regions)) else {}),
    }


def cycle_gains(before: Sequence[MeasuredRegion], after: Sequence[MeasuredRegion]) -> dict[str, dict[str, float]]:
    """Return the gains in cycle gIoU by listener; before training the frozen listener is the model itself.

    Where the start also sampled captions: ``cycle_gIoU_sampled``, what these gain over its greedy ones without any
    training, and ``frozen_beyond_sampled``, what the frozen listener hears of the trained captions beyond these.
    """
    images = [result.image for result in before]
    old = [result.cycle_iou for result in before]
    gains = {"cycle_gIoU": paired_bootstrap(old, [result.cycle_iou for result in after], groups=images)}
    frozen = [result.frozen_iou for result in after if result.frozen_iou is not None]
    if len(frozen) == len(old):
        gains["cycle_gIoU_frozen"] = paired_bootstrap(old, frozen, groups=images)
    drawn = [result.sampled.iou for result in before if result.sampled is not None]
    if len(drawn) == len(frozen) == len(old):
        gains["cycle_gIoU_sampled"] = paired_bootstrap(old, drawn, groups=images)
        gains["frozen_beyond_sampled"] = paired_bootstrap(drawn, frozen, groups=images)
    first, last = _independent(before), _independent(after)
    if len(first) == len(last) == len(old):
        gains["cycle_gIoU_independent"] = paired_bootstrap(first, last, groups=images)
    return gains


def _independent(regions: Sequence[MeasuredRegion]) -> list[float]:
    return [region.independent.iou for region in regions if region.independent is not None]


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def figures_of(regions: Sequence[MeasuredRegion], tasks: Sequence[str]) -> DataFigures:
    """Return the figures of one data set, for some of the tasks in :data:`MAKERS`."""
    found: DataFigures = {"regions": len(regions), "images": len({region.image for region in regions})}
    return {**found, **{task: MAKERS[task](regions) for task in tasks}}


def referring_figures(regions: Sequence[MeasuredRegion]) -> TaskFigures:
    """gIoU, cIoU, Pr@t over sentences; ``without_mask`` is the share of answers that asked for no mask.

    Where expressions have no target, as in GRES (2306.00968): gIoU and cIoU are over all, Pr@t over those with one;
    ``N_acc`` is the share of those without that get an empty mask, ``T_acc`` of the others that do not. Groups of a
    data set (``MeasuredRegion.group``) have gIoU and cIoU of their own.
    """
    if not any(region.answers for region in regions):
        return {"sentences": 0}
    figures = _overlaps(regions)
    for group in sorted({region.group for region in regions} - {""}):
        figures |= {f"{k} {group}": v for k, v in _overlaps([one for one in regions if one.group == group]).items()}
    shown = [(region.image, sentence) for region in regions for sentence in region.sentences]
    own_images, found = [image for image, _ in shown], [sentence for _, sentence in shown]
    if shown:
        ious = iou([one.intersection for one in found], [one.union for one in found])
        figures |= {f"Pr@{least:g}": _figure(ious >= least, own_images) for least in PRECISION_THRESHOLDS}
        figures["without_mask"] = _figure([sentence.num_masks == 0 for sentence in found], own_images)
    return {
        **figures,
        **_no_target_accuracy([(region.image, one) for region in regions for one in region.without_target], shown),
    }


def _overlaps(regions: Sequence[MeasuredRegion]) -> TaskFigures:
    images = [region.image for region in regions for _ in region.answers]
    inner, outer = (
        np.array([getattr(answer, area) for region in regions for answer in region.answers], float)
        for area in ("intersection", "union")
    )
    ious = _figure(iou(inner, outer), images)
    return {"sentences": len(images), "gIoU": ious, "cIoU": _figure(inner, images, outer)}


def captioning_figures(regions: Sequence[MeasuredRegion]) -> TaskFigures:
    """CIDEr-D, BLEU, ROUGE-L, METEOR where references are; length and variety of all captions."""
    if not regions:
        return {"captions": 0}
    texts, images = [region.caption for region in regions], [region.image for region in regions]
    own = [region for region in regions if region.references]
    scores = score_captions([region.caption for region in own], [region.references for region in own])
    own_images = [region.image for region in own]
    found: TaskFigures = {
        "captions": len(texts),
        "words": _figure([len(text.split()) for text in texts], images),
        "rejected": _figure([region.rejected is not None for region in regions], images),
        **{f"distinct_{length}": _plain(distinct_ngrams(texts, length)) for length in (1, 2)},
        "with_references": len(own),
        "tokenizer": scores.tokenizer,
    }
    for name, value in scores.corpus.items():
        found[name] = _figure(scores.single[name], own_images) if name in scores.single else _plain(value)
    return {**found, "missing": scores.missing} if scores.missing else found


def loop_figures(regions: Sequence[MeasuredRegion]) -> TaskFigures:
    """Cycle IoU of all captions, by each listener; uniqueness and the share that picks its own, in company."""
    loops = [(region.image, region.cycle) for region in regions if region.cycle is not None]
    if not loops:
        return {"captions": 0}
    images = [image for image, _ in loops]
    several = [(region.image, region.uniqueness) for region in regions if region.uniqueness is not None]
    company, margins = [image for image, _ in several], np.array([margin for _, margin in several])
    found: TaskFigures = {
        "captions": len(loops),
        "cycle_gIoU": _figure([loop.iou for _, loop in loops], images),
        "cycle_cIoU": _figure([loop.intersection for _, loop in loops], images, [loop.union for _, loop in loops]),
        "in_company": len(several),
    }
    apart = [(region.image, region.independent.iou) for region in regions if region.independent is not None]
    if apart:
        found["cycle_gIoU_independent"] = _figure([value for _, value in apart], [image for image, _ in apart])
    if several:
        found |= {"uniqueness": _figure(margins, company), "picks_own": _figure(margins > 0, company)}
    return found


def no_target_figures(regions: Sequence[MeasuredRegion]) -> TaskFigures:
    """N_acc: share of expressions without a target that get an empty mask; T_acc: of those with one that do not.

    As in GRES (2306.00968), whose expressions without a target were written for their image; here they are another's.
    """
    asked = [(region.image, region.no_target) for region in regions if region.no_target is not None]
    if not asked:
        return {"expressions": 0}
    sentences = [(region.image, sentence) for region in regions for sentence in region.sentences]
    return {"expressions": len(asked), **_no_target_accuracy(asked, sentences)}


def _no_target_accuracy(
    absent: Sequence[tuple[str, SegmentedSentence]], shown: Sequence[tuple[str, SegmentedSentence]]
) -> TaskFigures:
    """Return N_acc and T_acc of answers with the images they are of; nothing where no expression lacks a target."""
    figures: TaskFigures = {}
    if absent:
        figures["N_acc"] = _figure([one.union == 0 for _, one in absent], [image for image, _ in absent])
    if absent and shown:
        is_given = [bool(decode_rle(one.mask, one.text).any()) for _, one in shown]
        figures["T_acc"] = _figure(is_given, [image for image, _ in shown])
    return figures


def video_figures(regions: Sequence[MeasuredRegion]) -> TaskFigures:
    """J, F and J&F over the expressions of videos, where masks are public; ``without_mask`` as for ``referring``."""
    videos = [region.image for region in regions]
    is_empty = [answer.num_masks == 0 for region in regions for answer in region.sentences]
    scored = [(region.image, region.jaccard, region.boundary) for region in regions if region.jaccard is not None]
    figures: TaskFigures = {"expressions": len(regions), "scored": len(scored)}
    if scored:
        images, *values = zip(*scored, strict=True)
        both = np.array(values, float)
        figures |= {
            name: _figure(own, images) for name, own in zip(("J&F", "J", "F"), (both.mean(0), *both), strict=True)
        }
    return {**figures, "without_mask": _figure(is_empty, videos)}


MAKERS: Mapping[str, Callable[[Sequence[MeasuredRegion]], TaskFigures]] = {
    "referring": referring_figures,
    "captioning": captioning_figures,
    "loop": loop_figures,
    "no_target": no_target_figures,
    "video": video_figures,
}


def _figure(values: npt.ArrayLike, images: Sequence[str], totals: npt.ArrayLike | None = None) -> Figure:
    """Return the mean of ``values``, or their sum over that of ``totals`` (1 where that is 0), with its interval."""
    top = np.asarray(values, float)
    bottom = np.ones(len(top)) if totals is None else np.asarray(totals, float)
    low, high = bootstrap_ratio(top, bottom, images)
    return {"value": float(top.sum() / bottom.sum()) if bottom.any() else 1.0, "ci95_low": low, "ci95_high": high}


def _plain(value: float) -> Figure:
    return {"value": value, "ci95_low": None, "ci95_high": None}


def figure_rows(tasks: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and interval of every figure in the :data:`DataFigures` of one data set, counts left out.

    In per cent, but for CIDEr-D and words (as they are); ``-`` where there is no interval.
    """
    for figures in tasks.values():
        for name, figure in figures.items() if isinstance(figures, Mapping) else ():
            if isinstance(figure, Mapping) and "value" in figure:
                scale, digits = (1, 2) if name in ("CIDEr-D", "words") else (100, 1)
                value, low, high = (
                    "-" if number is None else f"{scale * number:.{digits}f}"
                    for number in (figure["value"], figure["ci95_low"], figure["ci95_high"])
                )
                yield name, value, "-" if low == "-" else f"{low} to {high}"


def markdown_table(results: Mapping[str, DataFigures]) -> str:
    """Return the figures of all data sets as Markdown, as :func:`figure_rows` gives them."""
    lines = []
    for data, tasks in results.items():
        kinds = ("expressions", "videos") if "video" in tasks else ("regions", "images")
        lines += [f"**{data}**: {tasks['regions']} {kinds[0]}, {tasks['images']} {kinds[1]}", ""]
        lines += ["| figure | value | 95 % interval |", "| --- | --- | --- |"]
        lines += [f"| {' | '.join(row)} |" for row in figure_rows(tasks)]
        lines.append("")
    return "\n".join(lines)

"""Held-out figures of both directions and of the loop, per region and over any number of ranks.

* gIoU and cIoU: segmentation from the data set's own captions, one sample a sentence, at the original size.
* cycle_gIoU: the model's own caption of the region is segmented; mean IoU against the region's mask.
* cycle_gIoU_frozen: the same captions, segmented by the weights that training started from.
* uniqueness, uniqueness_frozen: IoU of that mask with its own region minus the best with another region of the image.
* caption_exact: share of generated captions that equal one of the region's captions (lower case, no final stop).
* caption_words, vocabulary, distinct_1, distinct_2: length and variety of the generated captions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dual_loop.config import Config
from dual_loop.data.refcoco import RefCoco
from dual_loop.errors import ConfigError, explain
from dual_loop.evaluation.protocols import PRESETS
from dual_loop.evaluation.regions import Listener, Record, RegionMeter, uniqueness
from dual_loop.iteration import in_chunks
from dual_loop.metrics import caption_exact, distinct_ngrams, iou
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import RegionSample

IMAGES_PER_BATCH = 8


@dataclass
class RegionResult:
    """What was measured on one region.

    Attributes:
        name: ``source/sample_id#region_id``.
        image: name of the image; bootstrap resamples images.
        caption: what the model wrote.
        exact: whether it equals one of the region's captions; None where the region has none.
        intersection, union: pixels, with the region's own caption, one entry a sentence.
        cycle_intersection, cycle_union: pixels, with the model's caption.
        frozen_intersection, frozen_union: the same with the starting weights as the listener; None where not measured.
        uniqueness, frozen_uniqueness: own IoU minus the best IoU with another region of the image, at the image's size;
            None where the image has no other region, or where not measured.
    """

    name: str
    image: str
    caption: str
    exact: bool | None
    intersection: list[float]
    union: list[float]
    cycle_intersection: float
    cycle_union: float
    frozen_intersection: float | None = None
    frozen_union: float | None = None
    uniqueness: float | None = None
    frozen_uniqueness: float | None = None

    @property
    def ious(self) -> list[float]:
        return [float(value) for value in iou(self.intersection, self.union)]

    @property
    def cycle_iou(self) -> float:
        return float(iou(self.cycle_intersection, self.cycle_union))

    @property
    def frozen_iou(self) -> float | None:
        if self.frozen_intersection is None or self.frozen_union is None:
            return None
        return float(iou(self.frozen_intersection, self.frozen_union))


def held_out_source(config: Config) -> RefCoco:
    """Open the evaluation set: RefCOCO layout under ``data.eval_dir``, split ``data.eval_split``."""
    data = config.data
    if data.eval_dir is None:
        raise ConfigError(explain("no evaluation set is given", "data.eval_dir", fix="set --eval_dir"))
    return RefCoco(
        data.eval_dir,
        datasets=data.eval_datasets,
        split=data.eval_split,
        max_samples=data.eval_max_samples,
        index_dir=data.index_dir,
    )


def evaluate_held_out(
    model: Sa2VA,
    prompter: Prompter,
    config: Config,
    rank: int = 0,
    world_size: int = 1,
    frozen_listener: Listener | None = None,
) -> list[RegionResult]:
    """Measure this rank's share of the evaluation set (entries ``rank::world_size``, nothing padded or repeated).

    Every region of an image is measured. Join the ranks' lists before calling :func:`summarise`.
    """
    source = held_out_source(config)
    samples = (source.load_all(index) for index in range(rank, len(source), world_size))
    return evaluate_samples(model, prompter, config, samples, frozen_listener)


def evaluate_samples(
    model: Sa2VA,
    prompter: Prompter,
    config: Config,
    samples: Iterable[RegionSample],
    frozen_listener: Listener | None = None,
) -> list[RegionResult]:
    """Measure every region of every sample as the command ``evaluate`` does, with [SEG] given in the answer.

    ``frozen_listener`` lends other weights to the model; the captions that were just written are then segmented once
    more with those.
    """
    meter = RegionMeter(model, prompter, config, PRESETS["dual_loop"], frozen_listener=frozen_listener)
    chunks = in_chunks(samples, IMAGES_PER_BATCH)
    return [_result(record) for chunk in chunks for record in meter.measure(chunk, config.data.eval_split)]


def _result(record: Record) -> RegionResult:
    cycle, frozen, references = record["cycle"], record.get("frozen"), record["references"]
    return RegionResult(
        name=record["name"],
        image=record["image"],
        caption=record["caption"],
        exact=caption_exact(record["caption"], references) if references else None,
        intersection=[float(sentence["intersection"]) for sentence in record["sentences"]],
        union=[float(sentence["union"]) for sentence in record["sentences"]],
        cycle_intersection=float(cycle["intersection"]),
        cycle_union=float(cycle["union"]),
        frozen_intersection=None if frozen is None else float(frozen["intersection"]),
        frozen_union=None if frozen is None else float(frozen["union"]),
        uniqueness=uniqueness(record),
        frozen_uniqueness=None if frozen is None else uniqueness(record, "frozen"),
    )


def summarise(results: Sequence[RegionResult]) -> dict[str, float]:
    """Return the figures that the head of this module explains; NaN where nothing was measured."""
    ious = [iou for result in results for iou in result.ious]
    unions = sum(sum(result.union) for result in results)
    exact = [result.exact for result in results if result.exact is not None]
    return {
        "gIoU": _mean(ious),
        "cIoU": sum(sum(result.intersection) for result in results) / unions if unions else float("nan"),
        "cycle_gIoU": _mean([result.cycle_iou for result in results]),
        "cycle_gIoU_frozen": _mean_of([result.frozen_iou for result in results]),
        "uniqueness": _mean_of([result.uniqueness for result in results]),
        "uniqueness_frozen": _mean_of([result.frozen_uniqueness for result in results]),
        "caption_exact": _mean([float(value) for value in exact]),
        "caption_words": _mean([float(len(result.caption.split())) for result in results]),
        "vocabulary": float(len({word for result in results for word in result.caption.lower().split()})),
        "distinct_1": distinct_ngrams([result.caption for result in results], 1),
        "distinct_2": distinct_ngrams([result.caption for result in results], 2),
        "regions": float(len(results)),
    }


def _mean_of(values: Sequence[float | None]) -> float:
    return _mean([value for value in values if value is not None])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")

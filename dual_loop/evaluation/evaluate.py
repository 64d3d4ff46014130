"""Held-out figures of both directions and of the loop, per region and over any number of ranks.

* gIoU and cIoU: segmentation from the data set's own captions, one sample a sentence, at the original size.
* cycle_gIoU: the model's own caption of the region is segmented; mean IoU against the region's mask.
* cycle_gIoU_frozen: the same captions, segmented by the weights that training started from.
* uniqueness, uniqueness_frozen: IoU of that mask with its own region minus the best with another region of the image.
* caption_exact: share of generated captions that equal one of the region's captions (lower case, no final stop).
* caption_words, vocabulary, distinct_1, distinct_2: length and variety of the generated captions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dual_loop.config import Config
from dual_loop.data.prepare import batch_from_samples
from dual_loop.data.refcoco import RefCoco
from dual_loop.errors import ConfigError, explain
from dual_loop.iteration import in_chunks
from dual_loop.loop.captioner import Captioner
from dual_loop.loop.rewards import own_and_margin
from dual_loop.loop.scorer import Scorer, join_masks, own_image_only
from dual_loop.metrics import caption_exact, distinct_ngrams, iou, iou_table, mask_overlap
from dual_loop.model.build import geometry
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA, evaluating
from dual_loop.types import Batch, RegionCaption, RegionSample

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
        uniqueness, frozen_uniqueness: own IoU minus the best IoU with another region of the image, at mask resolution;
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


Listener = Callable[[], AbstractContextManager[None]]
"""Puts other weights into the model for the length of a ``with`` block (``StartingWeights.swapped``)."""


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
    """Measure every region of every sample; greedy captions, [SEG] given in the answer.

    ``frozen_listener`` lends other weights to the model; the captions that were just written are then segmented once
    more with those.
    """
    # Rejections are part of what is measured here, never a reason to stop.
    greedy = dataclasses.replace(config.loop, temperature=0.0, on_rejected="fallback", max_rejected_fraction=1.0)
    results: list[RegionResult] = []
    sizes, scorer = geometry(config), Scorer(model, prompter, greedy)
    with evaluating(model), torch.no_grad():
        for chunk in in_chunks(samples, IMAGES_PER_BATCH):
            batch = batch_from_samples(chunk, sizes, seed=config.train.seed).to(model.device)
            seen = model.see(batch)
            [written] = Captioner(model, prompter, greedy, is_silent=True).write([seen], [batch], use_references=False)
            texts = [None if caption.rejected else caption.text for caption in written]
            rounds = [texts, *_reference_rounds(chunk)]
            areas, uniqueness = [], []
            for number, own in enumerate(rounds):
                logits = join_masks(scorer.segment(batch, seen, list(enumerate(own))), model.mask_size)
                areas.append(_compare(logits, batch, chunk))
                if number == 0:
                    uniqueness = _uniqueness(logits, batch)
            part = _collect(batch, chunk, written, areas, uniqueness)
            if frozen_listener is not None:
                with frozen_listener():
                    logits = join_masks(scorer.segment(batch, seen, list(enumerate(texts))), model.mask_size)
                _add_frozen(part, _compare(logits, batch, chunk), _uniqueness(logits, batch))
            results += part
    return results


def _add_frozen(
    results: Sequence[RegionResult], areas: Sequence[tuple[float, float]], uniqueness: Sequence[float | None]
) -> None:
    for result, (intersection, union), unique in zip(results, areas, uniqueness, strict=True):
        result.frozen_intersection, result.frozen_union, result.frozen_uniqueness = intersection, union, unique


def _uniqueness(mask_logits: torch.Tensor, batch: Batch) -> list[float | None]:
    own = torch.arange(len(mask_logits))
    table = own_image_only(iou_table(mask_logits > 0, batch.target_masks > 0).cpu(), own, batch.region_image)
    return [None if value != value else value for value in own_and_margin(table, own)[1].tolist()]


def _reference_rounds(chunk: Sequence[RegionSample]) -> list[list[str | None]]:
    """One round a sentence number: round k segments the k-th sentence of every region (its last, where fewer)."""
    captions = [expressions for sample in chunk for expressions in sample.captions]
    rounds = max((len(expressions) for expressions in captions), default=0)
    return [[e[min(k, len(e) - 1)] if e else None for e in captions] for k in range(rounds)]


def _compare(mask_logits: torch.Tensor, batch: Batch, chunk: Sequence[RegionSample]) -> list[tuple[float, float]]:
    """Resize logits (N, Q, Q) to each image's size and return (intersection, union) in pixels for each region."""
    areas: list[tuple[float, float]] = []
    start = 0
    for sample in chunk:
        logits = mask_logits[start : start + sample.num_regions].float()
        start += sample.num_regions
        target = torch.from_numpy(np.ascontiguousarray(sample.segmentation_masks))
        predicted = resize_logits(
            logits, (target.shape[-2], target.shape[-1]), batch_side=batch.g_pixel_values.shape[-1]
        )
        inner, outer = mask_overlap(predicted.cpu() > 0, target)
        areas += list(zip(inner.tolist(), outer.tolist(), strict=True))
    return areas


def resize_logits(logits: torch.Tensor, size: tuple[int, int], batch_side: int) -> torch.Tensor:
    """Bring mask logits (N, Q, Q) to (N, H, W) as Sa2VA predicts: bilinear to S x S, then bilinear to the image."""
    full = F.interpolate(logits[:, None], size=(batch_side, batch_side), mode="bilinear", align_corners=False)
    return F.interpolate(full, size=size, mode="bilinear", align_corners=False)[:, 0]


def _collect(
    batch: Batch,
    chunk: Sequence[RegionSample],
    written: Sequence[RegionCaption],
    areas: list[list[tuple[float, float]]],
    uniqueness: Sequence[float | None],
) -> list[RegionResult]:
    expressions = [e for sample in chunk for e in sample.captions]
    images = [f"{sample.source}/{sample.sample_id}" for sample in chunk for _ in sample.captions]
    results = []
    for region, name in enumerate(batch.region_names):
        own = [areas[1 + k][region] for k in range(len(expressions[region]))]
        cycle = areas[0][region]
        caption = written[region].text
        exact = caption_exact(caption, expressions[region]) if expressions[region] else None
        results.append(
            RegionResult(
                *(name, images[region], caption, exact),
                *([a for a, _ in own], [b for _, b in own], cycle[0], cycle[1]),
                uniqueness=uniqueness[region],
            )
        )
    return results


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


def write_results(path: Any, results: Sequence[RegionResult]) -> None:
    """Write one JSON line a region."""
    with open(path, "w", encoding="utf-8") as handle:
        for result in results:
            handle.write(json.dumps(dataclasses.asdict(result)) + "\n")

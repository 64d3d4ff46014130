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
from dual_loop.loop.captioner import generate_caption_from_mask
from dual_loop.loop.rewards import contrasts, iou_matrix
from dual_loop.loop.segmenter import segmentation_inputs
from dual_loop.metrics import caption_exact, distinct_ngrams, mask_iou
from dual_loop.model.build import geometry
from dual_loop.model.prompts import Prompter
from dual_loop.model.video_llava_sam import VideoLLaVASAMModel, evaluating
from dual_loop.types import Batch, CaptionRollout, RegionSample

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
        return [_iou(i, u) for i, u in zip(self.intersection, self.union, strict=True)]

    @property
    def cycle_iou(self) -> float:
        return _iou(self.cycle_intersection, self.cycle_union)

    @property
    def frozen_iou(self) -> float | None:
        if self.frozen_intersection is None or self.frozen_union is None:
            return None
        return _iou(self.frozen_intersection, self.frozen_union)


def _iou(intersection: float, union: float) -> float:
    """Empty against empty counts 1, as in LISA and GRES."""
    return intersection / union if union > 0 else 1.0


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
    model: VideoLLaVASAMModel,
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
    model: VideoLLaVASAMModel,
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
    greedy = dataclasses.replace(
        config.loop,
        temperature=0.0,
        on_rejected="fallback",
        max_rejected_fraction=1.0,
        caption_supervision=False,
        segment_form="branches",
    )
    results: list[RegionResult] = []
    sizes = geometry(config)
    with evaluating(model), torch.no_grad():
        for chunk in in_chunks(samples, IMAGES_PER_BATCH):
            batch = batch_from_samples(chunk, sizes, seed=config.train.seed).to(model.device)
            features = model.encode_vision(batch.pixel_values)
            written = generate_caption_from_mask(model, prompter, batch, greedy)
            rounds = [written, *_reference_rounds(chunk)]
            areas, uniqueness = [], []
            for rollout in rounds:
                inputs = segmentation_inputs(batch, rollout, features, prompter, greedy)
                logits = model(inputs.data, mode="predict")["segmentation"].mask_logits
                areas.append(_compare(logits, batch, chunk))
                uniqueness.append(_uniqueness(logits, batch))
            part = _collect(batch, chunk, written, areas, uniqueness[0])
            if frozen_listener is not None:
                inputs = segmentation_inputs(batch, written, features, prompter, greedy)
                with frozen_listener():
                    logits = model(inputs.data, mode="predict")["segmentation"].mask_logits
                _add_frozen(part, _compare(logits, batch, chunk), _uniqueness(logits, batch))
            results += part
    return results


def _add_frozen(
    results: Sequence[RegionResult], areas: Sequence[tuple[float, float]], uniqueness: Sequence[float | None]
) -> None:
    for result, (intersection, union), unique in zip(results, areas, uniqueness, strict=True):
        result.frozen_intersection, result.frozen_union, result.frozen_uniqueness = intersection, union, unique


def _uniqueness(mask_logits: torch.Tensor, batch: Batch) -> list[float | None]:
    own = torch.arange(len(mask_logits), device=mask_logits.device)
    matrix = iou_matrix(mask_logits, own, batch.target_masks, batch.region_image.to(mask_logits.device))
    return [None if value != value else value for value in contrasts(matrix, own).tolist()]


def _reference_rounds(chunk: Sequence[RegionSample]) -> list[CaptionRollout]:
    """One roll-out a sentence number: round k segments the k-th sentence of every region (its last, where fewer)."""
    captions = [expressions for sample in chunk for expressions in sample.captions]
    rounds = max((len(expressions) for expressions in captions), default=0)
    return [_given_captions([e[min(k, len(e) - 1)] if e else "" for e in captions]) for k in range(rounds)]


def _given_captions(captions: list[str]) -> CaptionRollout:
    count = len(captions)
    return CaptionRollout(captions, [[] for _ in captions], [None] * count, [True] * count, [True] * count)


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
        intersection, union = mask_iou(predicted.cpu() > 0, target)
        areas += list(zip(intersection.tolist(), union.tolist(), strict=True))
    return areas


def resize_logits(logits: torch.Tensor, size: tuple[int, int], batch_side: int) -> torch.Tensor:
    """Bring mask logits (N, Q, Q) to (N, H, W) as Sa2VA predicts: bilinear to S x S, then bilinear to the image."""
    full = F.interpolate(logits[:, None], size=(batch_side, batch_side), mode="bilinear", align_corners=False)
    return F.interpolate(full, size=size, mode="bilinear", align_corners=False)[:, 0]


def _collect(
    batch: Batch,
    chunk: Sequence[RegionSample],
    written: CaptionRollout,
    areas: list[list[tuple[float, float]]],
    uniqueness: Sequence[float | None],
) -> list[RegionResult]:
    expressions = [e for sample in chunk for e in sample.captions]
    images = [f"{sample.source}/{sample.sample_id}" for sample in chunk for _ in sample.captions]
    results = []
    for region, name in enumerate(batch.region_names):
        own = [areas[1 + k][region] for k in range(len(expressions[region]))]
        cycle = areas[0][region]
        caption = written.captions[region]
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

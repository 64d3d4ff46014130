"""Measures both directions and the loop on samples: one plain record a region, ready for a line of JSON.

A record holds everything that figures are made of, so figures can be computed again without a model::

    {"name": "refcoco/refcoco/12#ref5", "image": "refcoco/refcoco/12", "data": "refcoco:val",
     "target": RLE,                                       the true mask
     "references": ["a red star"], "caption": "a red star", "rejected": null,
     "sentences": [{"text": "a red star", "num_masks": 1, "intersection": 90, "union": 100, "mask": RLE}],
     "cycle": {"intersection": 80, "union": 100, "mask": RLE, "ious": [0.8, 0.1]},   IoU with each region of the image
     "own": 0,                                            this region's place in "ious"
     "entry": 12}                                         number of the entry in its data set
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dual_loop.config import Config
from dual_loop.data.masks import decode_rle, encode_rle
from dual_loop.data.prepare import batch_from_samples
from dual_loop.errors import SampleError, explain
from dual_loop.evaluation.protocols import Protocol
from dual_loop.loop.captioner import Captioner
from dual_loop.loop.scorer import Scorer
from dual_loop.metrics import iou, mask_overlap
from dual_loop.model.build import geometry
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA, evaluating
from dual_loop.types import Batch, RegionSample, Seen

Record = dict[str, Any]
Listener = Callable[[], AbstractContextManager[None]]
"""Puts other weights into the model for the length of a ``with`` block (``StartingWeights.swapped``)."""


class RegionMeter:
    """Captions regions, segments captions and sentences, and compares.

    Args:
        model, prompter, config: the model in use.
        protocol: how sentences are asked for.
        tasks: some of ``referring``, ``captioning``, ``loop``.
        autocast: the precision to compute in.
        frozen_listener: lends other weights to the model; captions are then segmented with those as well, for the
            entry ``frozen`` of a record, which has the form of ``cycle``.
    """

    def __init__(
        self,
        model: Sa2VA,
        prompter: Prompter,
        config: Config,
        protocol: Protocol,
        tasks: Sequence[str] = ("referring", "captioning", "loop"),
        autocast: AbstractContextManager[Any] | None = None,
        frozen_listener: Listener | None = None,
    ) -> None:
        self.model, self.prompter, self.config, self.protocol = model, prompter, config, protocol
        self.tasks, self.autocast, self.frozen_listener = set(tasks), autocast or nullcontext(), frozen_listener
        self.geometry = geometry(config)
        self.settings = dataclasses.replace(
            config.loop,
            temperature=0.0,
            on_rejected="fallback",
            max_rejected_fraction=1.0,
            segment_form="branches",
            segment_question=protocol.question,
        )
        self.captioner = Captioner(model, prompter, self.settings, is_silent=True)
        self.scorer = Scorer(model, prompter, self.settings)

    @torch.no_grad()
    def measure(self, samples: Sequence[RegionSample], data: str) -> list[Record]:
        """Return a record for every region of ``samples``; ``data`` names where they come from."""
        batch = batch_from_samples(list(samples), self.geometry, seed=self.config.train.seed).to(self.model.device)
        records = _empty_records(samples, batch, data)
        with evaluating(self.model), self.autocast:
            seen = self.model.see(batch)
            if self.tasks & {"captioning", "loop"}:
                [captions] = self.captioner.write([seen], [batch], use_references=False)
                for record, caption in zip(records, captions, strict=True):
                    assert caption.greedy is not None  # greedy captions were asked for
                    record.update(caption=caption.greedy.text, rejected=caption.rejected)
            if "loop" in self.tasks:
                self._close_loop(records, samples, batch, seen, "cycle")
                if self.frozen_listener is not None:
                    with self.frozen_listener():
                        self._close_loop(records, samples, batch, seen, "frozen")
            if "referring" in self.tasks:
                self._refer(records, samples, batch, seen)
        return records

    def _close_loop(
        self, records: list[Record], samples: Sequence[RegionSample], batch: Batch, seen: Seen, name: str
    ) -> None:
        texts = [(n, record["caption"] if record["rejected"] is None else None) for n, record in enumerate(records)]
        logits = self.scorer.segment(batch, seen, texts, generated=self.protocol.seg == "generated")
        masks = self._masks(logits, samples)
        start = 0
        for sample in samples:
            for place in range(sample.num_regions):
                record, mask = records[start + place], masks[start + place]
                areas = [_overlap(mask, target) for target in sample.segmentation_masks]
                ious = [float(iou(*area)) for area in areas]
                intersection, union = areas[place]
                record[name] = {"intersection": intersection, "union": union, "ious": ious, "mask": encode_rle(mask)}
                record["own"] = place
            start += sample.num_regions

    def _refer(
        self, records: list[Record], samples: Sequence[RegionSample], batch: Batch, seen: Seen
    ) -> None:
        texts = [[self.protocol.clean(text) for text in record["references"]] for record in records]
        targets = [target for sample in samples for target in sample.segmentation_masks]
        # Round k asks for the k-th sentence of every region that has one.
        for number in range(max((len(own) for own in texts), default=0)):
            asked = [(n, own[number] if number < len(own) else None) for n, own in enumerate(texts)]
            logits = self.scorer.segment(batch, seen, asked, generated=self.protocol.seg == "generated")
            masks = self._masks(logits, samples)
            for record, own, found, mask, target in zip(records, texts, logits, masks, targets, strict=True):
                if number < len(own):
                    intersection, union = _overlap(mask, target)
                    record["sentences"].append(
                        {
                            "text": own[number],
                            "num_masks": len(found),
                            "intersection": intersection,
                            "union": union,
                            "mask": encode_rle(mask),
                        }
                    )

    def _masks(self, logits: Sequence[torch.Tensor], samples: Sequence[RegionSample]) -> list[np.ndarray]:
        """Return one mask (H, W) bool a region at its image's size, several joined as the protocol says."""
        sizes = [s.segmentation_image.shape[:2] for s in samples for _ in range(s.num_regions)]
        masks = []
        for found, size in zip(logits, sizes, strict=True):
            if not len(found):
                masks.append(np.zeros(size, bool))
                continue
            chosen = found[:1] if self.protocol.join == "first" else found
            full = resize_logits(chosen.float(), (size[0], size[1]), self.geometry.grounding_size)
            masks.append(np.asarray((full > 0).any(0).cpu().numpy()))
        return masks


def compare_predictions(sample: RegionSample, data: str, predictions: dict[str, Record]) -> list[Record]:
    """Return records of masks that were saved before, compared with the true masks of ``sample``.

    Args:
        sample: with its true masks and expressions.
        data: where it comes from.
        predictions: by region name, ``{"sentences": [{"mask": RLE}, ...]}`` in the order of the expressions.

    Raises:
        SampleError: a run-length code is broken or of another size.
    """
    records = []
    for place, region in enumerate(sample.region_ids):
        name = f"{sample.source}/{sample.sample_id}#{region}"
        target = sample.segmentation_masks[place]
        record = {**_record(sample, place, name, data), "sentences": []}
        saved = predictions.get(name, {}).get("sentences", [])
        for number, text in enumerate(sample.captions[place]):
            mask = np.zeros(target.shape, bool)
            if number < len(saved):
                mask = _checked(decode_rle(saved[number]["mask"], name), target, name)
            intersection, union = _overlap(mask, target)
            entry = {"text": text, "num_masks": int(number < len(saved)), "intersection": intersection, "union": union}
            record["sentences"].append({**entry, "mask": encode_rle(mask)})
        records.append(record)
    return records


def resize_logits(logits: torch.Tensor, size: tuple[int, int], batch_side: int) -> torch.Tensor:
    """Bring mask logits (N, Q, Q) to (N, H, W) as Sa2VA predicts: bilinear to S x S, then bilinear to the image."""
    full = F.interpolate(logits[:, None], size=(batch_side, batch_side), mode="bilinear", align_corners=False)
    return F.interpolate(full, size=size, mode="bilinear", align_corners=False)[:, 0]


def uniqueness(record: Record, listener: str = "cycle") -> float | None:
    """Return own IoU minus the best IoU with another region of the image; None where there is no other."""
    ious, own = record[listener]["ious"], record["own"]
    others = [value for place, value in enumerate(ious) if place != own]
    return ious[own] - max(others) if others else None


def cycle_iou(record: Record) -> float:
    """Return the IoU of the mask that the record's caption led to with the region."""
    return float(iou(record["cycle"]["intersection"], record["cycle"]["union"]))


def _overlap(mask: np.ndarray, target: np.ndarray) -> tuple[int, int]:
    inner, outer = mask_overlap(mask[None], target[None])
    return int(inner[0]), int(outer[0])


def _checked(mask: np.ndarray, target: np.ndarray, name: str) -> np.ndarray:
    if mask.shape != target.shape:
        message = explain("a saved mask has another size than its image", name, mask.shape, target.shape)
        raise SampleError("size_mismatch", message)
    return mask


def _empty_records(samples: Sequence[RegionSample], batch: Batch, data: str) -> list[Record]:
    places = [(sample, place) for sample in samples for place in range(sample.num_regions)]
    pairs = zip(places, batch.region_names, strict=True)
    return [{**_record(sample, place, name, data), "sentences": []} for (sample, place), name in pairs]


def _record(sample: RegionSample, place: int, name: str, data: str) -> Record:
    return {
        "name": name,
        "image": f"{sample.source}/{sample.sample_id}",
        "data": data,
        "target": encode_rle(sample.segmentation_masks[place]),
        "references": list(sample.captions[place]),
    }

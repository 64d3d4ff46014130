"""The one measurer of both directions and of the loop, for ``dual-loop evaluate``, ``audit`` and training alike.

A :class:`MeasuredRegion` holds everything that figures are made of, so figures can be computed again without a model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dual_loop.caption_metrics import caption_exact, may_hold
from dual_loop.config import Config
from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.masks import decode_segmentation
from dual_loop.data.prepare import batch_from_samples
from dual_loop.errors import ConfigError, SampleError, explain
from dual_loop.evaluation.protocols import PRESETS, Protocol
from dual_loop.iteration import in_chunks
from dual_loop.loop.captioner import Captioner, measuring_settings
from dual_loop.loop.scorer import Scorer
from dual_loop.loop.spoken import IOU_NATS, log_likelihoods, trust
from dual_loop.metrics import iou, mask_overlap
from dual_loop.model.build import geometry
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA, evaluating
from dual_loop.types import Batch, RegionCaption, RegionSample, Seen, SkippedRegion, WrittenCaption

CHUNK = 8
"""Images of a batch, for all that measures: figures then agree to the last bits."""

Rle = Mapping[str, object]
"""A mask as a COCO run-length code: ``{"size": [H, W], "counts": str}``."""
Listener = Callable[[], AbstractContextManager[None]]
"""Puts other weights into the model for the length of a ``with`` block (``model.stored_weights.weights``)."""


OTHER_LOOPS = ("frozen", "independent", "sampled")
"""Loops of a region beside the model's own; absent from files where they were not measured."""


@dataclass
class SegmentedSentence:
    """What an expression of a region led to: the masks of the answer, joined, against the region's own, in pixels."""

    text: str
    num_masks: int
    intersection: float
    union: float
    mask: Rle = field(default_factory=dict)


@dataclass
class SegmentedCaption:
    """What the model's own caption of a region led to, in pixels, with the IoU with each region of the image."""

    intersection: float
    union: float
    ious: list[float] = field(default_factory=list)
    mask: Rle = field(default_factory=dict)

    @property
    def iou(self) -> float:
        return float(iou(self.intersection, self.union))

    def uniqueness(self, own: int) -> float | None:
        """Return the IoU with region ``own`` minus the best with another; None where there is no other."""
        others = [value for place, value in enumerate(self.ious) if place != own]
        return self.ious[own] - max(others) if others else None


@dataclass
class MeasuredRegion:
    """What was measured on one region; a line of ``regions.jsonl`` has these keys.

    Attributes:
        name: ``source/sample_id#region_id``. image: ``source/sample_id``; the bootstrap resamples images.
        data: name of the data set. target: the true mask.
        references: the region's own expressions. sentences: what each of them led to.
        caption: what the model wrote; empty where it was not asked (a caption without words is a rejected one).
        rejected: why the caption cannot be segmented; its mask is then empty.
        cycle: what the caption led to; None where the loop was not closed.
        own: the region's place in its image, and so in ``cycle.ious``.
        frozen: what the caption led to with the starting weights as the listener.
        entry: number of the image in its data set.
        independent: what the caption led to with a listener that was trained apart.
        no_target: what an expression of another image led to; its union is the mask's area, 0 where it is right.
        sampled: what a caption led to that the model sampled of the region at temperature 1.
        without_target: of the first region of an image, what those expressions led to of which the data set says that
            the image shows nothing (gRefCOCO); each union is the mask's area.
        trust: ``loop.spoken.trust`` of the caption, by the model and the independent listener, where there is one; None
            where it was not asked.
        greedy: the model's own caption, where ``caption`` is a better sample.
        group: part of the data set that has figures of its own; empty where there is none.
        jaccard, boundary: J and F of an expression about a video (:mod:`dual_loop.metrics`), the means over its frames.
    """

    name: str
    image: str
    data: str = ""
    target: Rle = field(default_factory=dict)
    references: list[str] = field(default_factory=list)
    sentences: list[SegmentedSentence] = field(default_factory=list)
    caption: str = ""
    rejected: str | None = None
    cycle: SegmentedCaption | None = None
    own: int = 0
    frozen: SegmentedCaption | None = None
    entry: int = 0
    independent: SegmentedCaption | None = None
    no_target: SegmentedSentence | None = None
    sampled: SegmentedCaption | None = None
    without_target: list[SegmentedSentence] = field(default_factory=list)
    trust: float | None = None
    greedy: str | None = None
    group: str = ""
    jaccard: float | None = None
    boundary: float | None = None

    @property
    def answers(self) -> list[SegmentedSentence]:
        """What all expressions led to, those without a target last."""
        return [*self.sentences, *self.without_target]

    @property
    def ious(self) -> list[float]:
        """The IoU of each answer; 1 where an expression without a target got no pixel."""
        return [float(iou(one.intersection, one.union)) for one in self.answers]

    @property
    def cycle_iou(self) -> float:
        assert self.cycle is not None, "the loop was not measured"
        return self.cycle.iou

    @property
    def frozen_iou(self) -> float | None:
        return None if self.frozen is None else self.frozen.iou

    # Files of a run keep these three, not what they come from.

    @cached_property
    def exact(self) -> bool | None:
        """Whether the caption equals one of the references; None where there is none."""
        return caption_exact(self.caption, self.references) if self.references else None

    @cached_property
    def uniqueness(self) -> float | None:
        return None if self.cycle is None else self.cycle.uniqueness(self.own)

    @cached_property
    def frozen_uniqueness(self) -> float | None:
        return None if self.frozen is None else self.frozen.uniqueness(self.own)

    def to_json(self) -> dict[str, object]:
        """Return the line of ``regions.jsonl``; what was not asked for is left out."""
        line = dataclasses.asdict(self)
        absent = {"cycle", "own"} if self.cycle is None else set[str]()
        absent |= {
            name for name in (*OTHER_LOOPS, "no_target", "trust", "greedy", "jaccard", "boundary") if line[name] is None
        }
        absent |= {name for name in ("without_target", "group") if not line[name]}
        if not self.caption and self.rejected is None:
            absent |= {"caption", "rejected"}
        return {key: value for key, value in line.items() if key not in absent}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> MeasuredRegion:
        """Read what :meth:`to_json` returned."""
        loops = {key: SegmentedCaption(**line[key]) for key in ("cycle", *OTHER_LOOPS) if key in line}
        lists = {k: [SegmentedSentence(**one) for one in line.get(k, [])] for k in ("sentences", "without_target")}
        empty = {"no_target": SegmentedSentence(**line["no_target"])} if "no_target" in line else {}
        return cls(**{**line, **loops, **empty, **lists})

    def flat(self) -> dict[str, object]:
        """Return the region's numbers, as ``evaluation_before.json`` and ``evaluation_after.json`` hold them."""
        return {
            "name": self.name,
            "image": self.image,
            "caption": self.caption,
            "exact": self.exact,
            "intersection": [float(one.intersection) for one in self.answers],
            "union": [float(one.union) for one in self.answers],
            "cycle_intersection": self.cycle and float(self.cycle.intersection),
            "cycle_union": self.cycle and float(self.cycle.union),
            "uniqueness": self.uniqueness,
            "frozen_uniqueness": self.frozen_uniqueness,
            **{
                f"{name}_{area}": loop and float(getattr(loop, area))
                for name in OTHER_LOOPS
                for loop in [getattr(self, name)]
                for area in ("intersection", "union")
            },
        }

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> MeasuredRegion:
        """Read what :meth:`flat` returned; older runs lack some of the keys."""
        region = cls(values["name"], values["image"], caption=values["caption"])
        areas = zip(values["intersection"], values["union"], strict=True)
        region.sentences = [SegmentedSentence("", 1, *area) for area in areas]
        region.cycle = SegmentedCaption(values["cycle_intersection"], values["cycle_union"])
        for name in OTHER_LOOPS:
            if values.get(f"{name}_union") is not None:
                setattr(region, name, SegmentedCaption(values[f"{name}_intersection"], values[f"{name}_union"]))
        region.exact, region.uniqueness = values["exact"], values.get("uniqueness")
        region.frozen_uniqueness = values.get("frozen_uniqueness")
        return region


def blank_regions(sample: RegionSample, data: str) -> list[MeasuredRegion]:
    """Return the regions of ``sample``, which comes from the data set ``data``, with nothing measured yet."""
    image = f"{sample.source}/{sample.sample_id}"
    groups = sample.groups or ("",) * sample.num_regions
    parts = zip(sample.region_ids, sample.segmentation_masks, sample.captions, groups, strict=True)
    return [
        MeasuredRegion(f"{image}#{region}", image, data, encode_rle(mask), list(texts), own=place, group=group)
        for place, (region, mask, texts, group) in enumerate(parts)
    ]


@dataclass(frozen=True)
class BestOf:
    """Takes the best of several captions of a region (RAFT, 2304.06767), as a listener that was trained apart finds.

    A sample replaces the greedy caption where the listener, reading both as a captioner, finds it likelier by a margin.
    Its masks are not asked: by the IoU they lead to, samples that are wrong win over right captions
    (docs/experiments.md).

    Attributes:
        samples: drawn of each region at temperature 1; 0 leaves the greedy captions.
        margin: nats a token by which the listener must find a sample likelier.
        floor: least probability of a token of a sample, to the captioner and the listener.
    """

    samples: int = 0
    margin: float = 0.1
    floor: float = 0.0

    def choose(self, written: Sequence[WrittenCaption], own: Tensor, heard: Tensor) -> int:
        """Return which of a region's captions to take, the greedy one being number 0.

        Args:
            written: R captions. own, heard: (R,) mean log-likelihood of each, by the captioner and by the listener.
        """
        fits = (trust(own, heard) >= self.floor) & (heard > heard[0] + self.margin)
        fits &= torch.tensor([one.gate is None and one.text != written[0].text for one in written])
        return int(torch.where(fits, heard, -math.inf).argmax()) if bool(fits.any()) else 0


class RegionMeter:
    """Captions regions, segments captions and sentences, and compares; :data:`CHUNK` images at a time.

    Args:
        protocol: how sentences are asked for.
        tasks: some of ``referring``, ``captioning``, ``loop``, ``no_target``.
        frozen_listener, independent_listener: lend other weights to the model (those of the start, those of a model
            that was trained apart); the captions are then segmented with those as well.
        hears_samples: also sample a caption of every region, and segment it.
        best_of: says how far captions can be trusted, and may take a sample in place of a greedy one.
    """

    def __init__(
        self,
        model: Sa2VA,
        prompter: Prompter,
        config: Config,
        protocol: Protocol = PRESETS["dual_loop"],
        tasks: Sequence[str] = ("referring", "captioning", "loop"),
        autocast: AbstractContextManager[object] | None = None,
        frozen_listener: Listener | None = None,
        independent_listener: Listener | None = None,
        hears_samples: bool = False,
        best_of: BestOf | None = None,
    ) -> None:
        self.model, self.config, self.protocol = model, config, protocol
        self.tasks, self.autocast = set(tasks), autocast or nullcontext()
        listeners = {"cycle": nullcontext, "frozen": frozen_listener, "independent": independent_listener}
        self.listeners = {name: one for name, one in listeners.items() if one is not None and "loop" in self.tasks}
        self.geometry, self.hears_samples, self.best_of = geometry(config), hears_samples, best_of
        self.num_samples = max(int(hears_samples), best_of.samples if best_of else 0)
        settings = dataclasses.replace(measuring_settings(config.loop), segment_question=protocol.question)
        self.captioner = Captioner(model, prompter, settings, is_silent=True)
        self.scorer = Scorer(model, prompter, settings)

    def measure(self, samples: Iterable[RegionSample], data: str) -> list[MeasuredRegion]:
        """Measure every region of ``samples``; ``data`` names where they come from."""
        return [region for chunk in in_chunks(samples, CHUNK) for region in self._measure(chunk, data)]

    @torch.no_grad()
    def _measure(self, samples: list[RegionSample], data: str) -> list[MeasuredRegion]:
        batch = batch_from_samples(samples, self.geometry, seed=self.config.train.seed).to(self.model.device)
        regions = [region for sample in samples for region in blank_regions(sample, data)]
        owners = [sample for sample in samples for _ in range(sample.num_regions)]
        with evaluating(self.model), self.autocast:
            seen = self.model.see(batch)
            if self.tasks & {"captioning", "loop"}:
                count = self.num_samples
                [captions] = self.captioner.write([seen], [batch], use_references=False, num_samples=count)
                for region, caption in zip(regions, captions, strict=True):
                    assert caption.greedy is not None  # greedy captions were asked for
                    region.caption, region.rejected = caption.greedy.text, caption.rejected
                if self.best_of is not None:
                    self._take_best(self.best_of, regions, captions, batch, seen)
            texts = [None if region.rejected is not None else region.caption for region in regions]
            for name, listener in self.listeners.items():
                with listener():
                    for region, loop in zip(regions, self._close(texts, regions, owners, batch, seen), strict=True):
                        setattr(region, name, loop)
            for region in regions:
                if region.trust is not None and region.independent is not None:
                    region.trust *= math.exp(-IOU_NATS * (1 - region.independent.iou))
            if self.hears_samples and "loop" in self.tasks:
                drawn = [caption.samples[0] for caption in captions]
                texts = [None if one.unreadable is not None else one.text for one in drawn]
                for region, loop in zip(regions, self._close(texts, regions, owners, batch, seen), strict=True):
                    region.sampled = loop
            nothing = [() if place else sample.no_target for sample in samples for place in range(sample.num_regions)]
            for name, said in (("sentences", [one.references for one in regions]), ("without_target", nothing)):
                # Round k asks for the k-th sentence of every region that has one.
                for number in range(max(map(len, said), default=0) if "referring" in self.tasks else 0):
                    texts = [self.protocol.clean(own[number]) if number < len(own) else None for own in said]
                    answers = self._segment(texts, owners, batch, seen)
                    for region, owner, text, (count, mask) in zip(regions, owners, texts, answers, strict=True):
                        if text is not None:
                            target = (
                                owner.segmentation_masks[region.own] if name == "sentences" else np.zeros_like(mask)
                            )
                            getattr(region, name).append(_segmented(text, count, mask, target))
            if "no_target" in self.tasks:
                texts = [text and self.protocol.clean(text) for text in texts_without_target(regions)]
                answers = self._segment(texts, owners, batch, seen)
                for region, text, (count, mask) in zip(regions, texts, answers, strict=True):
                    if text is not None:
                        region.no_target = _segmented(text, count, mask, np.zeros_like(mask))
        return regions

    def _take_best(
        self,
        best_of: BestOf,
        regions: Sequence[MeasuredRegion],
        captions: Sequence[RegionCaption],
        batch: Batch,
        seen: Seen,
    ) -> None:
        """Take a better caption where there is one, and say how far each can be trusted, but for the listener's IoU."""
        spoken = [(number, one.token_ids) for number, caption in enumerate(captions) for one in caption.written]
        parts = (self.model, self.captioner.prompter, batch, seen, spoken, self.captioner.config.caption_question)
        counts = [len(caption.written) for caption in captions]
        own = heard = log_likelihoods(*parts).split(counts)
        if "independent" in self.listeners:
            with self.listeners["independent"]():
                heard = log_likelihoods(*parts).split(counts)
        for region, caption, *values in zip(regions, captions, own, heard, strict=True):
            chosen = best_of.choose(caption.written, *values)
            region.trust = float(trust(*values)[chosen])
            if chosen:
                region.greedy, region.caption = region.caption, caption.written[chosen].text
                region.rejected = None

    def _close(
        self,
        texts: Sequence[str | None],
        regions: Sequence[MeasuredRegion],
        owners: Sequence[RegionSample],
        batch: Batch,
        seen: Seen,
    ) -> list[SegmentedCaption]:
        """Segment a caption of every region; None, one that was rejected, is an empty mask."""
        loops = []
        for region, owner, (_, mask) in zip(regions, owners, self._segment(texts, owners, batch, seen), strict=True):
            own = owner.segmentation_masks
            inner, outer = mask_overlap(np.broadcast_to(mask, own.shape), own)
            areas = int(inner[region.own]), int(outer[region.own])
            loops.append(SegmentedCaption(*areas, iou(inner, outer).tolist(), encode_rle(mask)))
        return loops

    def _segment(
        self, texts: Sequence[str | None], owners: Sequence[RegionSample], batch: Batch, seen: Seen
    ) -> list[tuple[int, np.ndarray]]:
        """Ask one text of each region; return the number of masks, and (H, W) bool, joined as the protocol says.

        ``owners`` are the samples that the regions are of; a mask leaves out what is ignored there.
        """
        answers = []
        logits = self.scorer.segment(batch, seen, list(enumerate(texts)), generated=self.protocol.seg == "generated")
        for found, owner in zip(logits, owners, strict=True):
            height, width = owner.segmentation_masks.shape[1:]
            mask = np.zeros((height, width), bool)
            if len(found):
                chosen = found[:1] if self.protocol.join == "first" else found
                if self.protocol.undo_target_shift:
                    chosen = undo_target_shift(chosen.float(), (height, width))
                full = resize_logits(chosen.float(), (height, width), self.geometry.grounding_size)
                mask = (full > 0).any(0).cpu().numpy() & (True if owner.ignored is None else ~owner.ignored)
            answers.append((len(found), mask))
        return answers


def texts_without_target(regions: Sequence[MeasuredRegion]) -> list[str | None]:
    """Return for each region an expression of another image that shows no such thing, None where there is none.

    The images that follow in the list come first, without chance, and the regions of an image are asked for different
    things as far as possible. An image is known by the expressions of its regions, which are to be all that it shows.
    """
    images = list(dict.fromkeys(region.image for region in regions))
    said = {image: [text for one in regions if one.image == image for text in one.references] for image in images}
    texts: list[str | None] = []
    for region in regions:
        place = images.index(region.image)
        others = [text for image in (*images[place + 1 :], *images[:place]) for text in said[image]]
        absent = [text for text in others if region.references and not may_hold(text, said[region.image])]
        texts.append(absent[region.own % len(absent)] if absent else None)
    return texts


def compare_predictions(
    sample: RegionSample,
    data: str,
    predictions: Mapping[str, Sequence[object]],
    faults: list[SkippedRegion] | None = None,
) -> list[MeasuredRegion]:
    """Compare saved masks with the true ones of ``sample``, which comes from ``data``.

    A mask that is null is empty. One that is missing, broken or of another size is as bad as a mask can be: empty, or
    the whole image where nothing was to be found; no file scores better for it.

    Args:
        predictions: by region name, the masks in the order of the expressions; behind those of an image's first region
            come those of the expressions without a target.
        faults: gets those masks.

    Raises:
        ConfigError: a region has more masks than expressions.
        SampleError: a mask is broken or of another size, without ``faults``.
    """
    regions = blank_regions(sample, data)
    for region, own in zip(regions, sample.segmentation_masks, strict=True):
        saved = predictions.get(region.name, ())
        asked = [(text, own, region.sentences) for text in region.references]
        asked += [(text, np.zeros_like(own), region.without_target) for text in sample.no_target if region.own == 0]
        if len(saved) > len(asked):
            what, expected = "a region has more predictions than expressions", f"at most {len(asked)}, in their order"
            raise ConfigError(explain(what, region.name, f"{len(saved)} sentences", expected))
        for number, (text, target, answers) in enumerate(asked):
            where, is_given = f"{region.name}, sentence {number + 1}", number < len(saved) and saved[number] is not None
            (height, width), mask = target.shape, np.zeros(target.shape, bool)
            try:
                if number >= len(saved):
                    raise SampleError("missing", explain("a mask is missing", where, f"{len(saved)} sentences"))
                mask = decode_segmentation(saved[number], height, width, where) if is_given else mask
            except SampleError as error:
                if faults is not None:
                    faults.append(SkippedRegion(where, error.reason, str(error)))
                elif is_given:
                    raise
                mask[:] = not target.any()
            if sample.ignored is not None:
                mask &= ~sample.ignored
            answers.append(_segmented(text, int(is_given), mask, target))
    return regions


def resize_logits(logits: torch.Tensor, size: tuple[int, int], batch_side: int) -> torch.Tensor:
    """Bring mask logits (N, Q, Q) to (N, H, W) as Sa2VA predicts: bilinear to S x S, then bilinear to the image."""
    full = F.interpolate(logits[:, None], size=(batch_side, batch_side), mode="bilinear", align_corners=False)
    return F.interpolate(full, size=size, mode="bilinear", align_corners=False)[:, 0]


def undo_target_shift(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Move mask logits (N, Q, Q) of an image of ``size`` (H, W) to where their targets would not have been moved.

    A target that torch's ``nearest`` took from an (H, W) mask holds at cell i the pixel ``floor(i H / Q)``. The mean
    distance of these pixels' centres from those of their cells, nearly half a cell, is how far every mask was moved.
    """
    cells = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.float32)
    axes = []
    for length in size:
        pixels_a_cell = length / len(cells)
        taken = (cells * pixels_a_cell).floor() + 0.5
        shift = ((cells + 0.5) * pixels_a_cell - taken).mean() / pixels_a_cell
        axes.append((cells + 0.5 + shift) * (2.0 / len(cells)) - 1.0)
    row, column = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([column, row], dim=-1).expand(len(logits), -1, -1, -1)
    return F.grid_sample(logits[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def _segmented(text: str, num_masks: int, mask: np.ndarray, target: np.ndarray) -> SegmentedSentence:
    inner, outer = mask_overlap(mask[None], target[None])
    return SegmentedSentence(text, num_masks, int(inner[0]), int(outer[0]), encode_rle(mask))

"""Measures segmentation of clips: the language model reads the first frames, SAM 2's memory does the others.

Frames are read, segmented and compared one after the other; of a video nothing is kept but what the memory needs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dual_loop.checkpoint.exporter import collect_video
from dual_loop.config import Config
from dual_loop.data.masks import safe_join
from dual_loop.data.prepare import batch_from_samples, grounding_image
from dual_loop.data.ref_video import Clip, Expression
from dual_loop.errors import CheckpointError, explain
from dual_loop.evaluation.measure import MeasuredRegion, SegmentedSentence, resize_logits, undo_target_shift
from dual_loop.evaluation.protocols import Protocol
from dual_loop.iteration import in_chunks
from dual_loop.loop.captioner import measuring_settings
from dual_loop.loop.scorer import Scorer
from dual_loop.metrics import boundary_f, iou, mask_overlap
from dual_loop.model.build import geometry
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA, evaluating
from dual_loop.model.video import Tracker
from dual_loop.types import RegionSample

EXPRESSIONS_AT_ONCE = 8
"""Most expressions of a video that are tracked together: SAM 2's memory of one object is some 30 MB."""
SUBMISSION = "Annotations"
"""Folder of masks in the form that the servers take: ``VIDEO/EXPRESSION/FRAME.png``, 255 where the object is."""


def build_tracker(model: Sa2VA, config: Config, sources: Sequence[Path], is_silent: bool = False) -> Tracker:
    """Return SAM 2's memory for ``model``, with the weights that its sources or ``--sam2_path`` hold; say so.

    For the embedded model, which has none, they are drawn with ``train.seed``.

    Raises:
        CheckpointError: they are not there, or do not fit.
    """
    own = config.train.sam2_path
    paths = [*sources, *([Path(own)] if own and Path(own) not in sources else [])]
    found = collect_video(paths, native=True)
    if not found and config.model.tokenizer != "tiny":
        what, fix = "the weights hold no video memory", "give --sam2_path, the SAM 2 that the weights were trained with"
        expected = "memory attention, memory encoder and object pointers, 157 tensors"
        raise CheckpointError(explain(what, ", ".join(map(str, paths)), "no such tensor", expected, fix))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        tracker = Tracker(model, found or None)
    said = f"{tracker.num_tensors} tensors of SAM 2's video memory"
    if found and not is_silent:
        print(f"note: {said} are loaded", file=sys.stderr)
    elif not is_silent:
        what = f"are in no file and drawn (train.seed {config.train.seed})"
        print(f"note: {said} {what}: masks behind the prompted frames mean nothing", file=sys.stderr)
    return tracker


class ClipMeter:
    """Segments every expression of clips and compares, or writes the masks where the true ones are not public.

    Args:
        protocol: how expressions are asked for; its ``frames`` are read by the language model, and prompted.
        folder: where :data:`SUBMISSION` is made.
    """

    def __init__(
        self,
        model: Sa2VA,
        prompter: Prompter,
        config: Config,
        protocol: Protocol,
        tracker: Tracker,
        folder: Path,
        autocast: AbstractContextManager[object] | None = None,
    ) -> None:
        self.model, self.tracker, self.protocol = model, tracker, protocol
        self.folder, self.autocast, self.seed = folder, autocast or nullcontext(), config.train.seed
        settings = dataclasses.replace(measuring_settings(config.loop), segment_question=protocol.question)
        self.scorer, self.geometry = Scorer(model, prompter, settings), geometry(config)

    def measure(self, clips: Sequence[Clip], data: str) -> list[MeasuredRegion]:
        """Measure every expression of ``clips``; ``data`` names where they come from.

        Raises:
            SampleError: a frame or a mask cannot be used.
        """
        groups = ((clip, group) for clip in clips for group in in_chunks(clip.expressions, EXPRESSIONS_AT_ONCE))
        return [region for clip, group in groups for region in self._measure(clip, group, data)]

    @torch.no_grad()
    def _measure(self, clip: Clip, said: Sequence[Expression], data: str) -> list[MeasuredRegion]:
        count = len(clip.frames)
        first = [clip.image(number) for number in range(min(self.protocol.frames or 1, count))]
        answers = [SegmentedSentence(one.text, 0, 0.0, 0.0) for one in said]
        scores: list[list[tuple[float, float]]] = [[] for _ in said]  # J and F of every frame
        sizes: list[tuple[int, ...]] = []

        def pixels() -> Iterator[Tensor]:
            for number in range(count):
                image = first[number] if number < len(first) else clip.image(number)
                sizes.append(image.shape[:2])
                yield grounding_image(image, self.geometry.grounding_size)

        with evaluating(self.model), self.autocast:
            prompts = self._prompts(clip, first, said)
            for answer, own in zip(answers, prompts, strict=True):
                answer.num_masks = len(own)
            if self.protocol.join == "first":
                prompts = [own[:1] for own in prompts]
            counts, objects = [len(own) for own in prompts], torch.cat(prompts)
            masks = (
                self.tracker.track(pixels(), count, objects, len(first))
                if len(objects)
                else (torch.zeros(0, *[self.model.mask_size] * 2) for _ in pixels())
            )
            for number, logits in enumerate(masks):
                found = np.stack([self._join(own, sizes[-1]) for own in logits.split(counts)])
                true = clip.masks(number, said, sizes[-1])
                if true is None:
                    self._write(clip, said, number, found)
                    continue
                found &= ~true[-1]
                for own, mask, target, answer, inner, outer in zip(
                    scores, found, true, answers, *mask_overlap(found, true[:-1]), strict=False
                ):
                    own.append((float(iou(inner, outer)), boundary_f(mask, target)))
                    answer.intersection, answer.union = answer.intersection + int(inner), answer.union + int(outer)
        image = f"{clip.source}/{clip.sample_id}"
        regions = []
        for one, answer, frames in zip(said, answers, scores, strict=True):
            regions.append(MeasuredRegion(f"{image}#{one.name}", image, data, {}, [one.text], [answer]))
            if frames:
                regions[-1].jaccard, regions[-1].boundary = np.mean(frames, axis=0).tolist()
        return regions

    def _prompts(self, clip: Clip, first: Sequence[np.ndarray], said: Sequence[Expression]) -> list[Tensor]:
        """Return the (n, C) embeddings at the [SEG] of each expression's answer, having read the first frames."""
        shown = [(image, np.ones((1, *image.shape[:2]), bool)) for image in first]
        frame = RegionSample(
            clip.source, clip.sample_id, *shown[0], ("0",), ((),), *shown[0], later_targets=tuple(shown[1:])
        )
        batch = batch_from_samples([frame], self.geometry, self.seed).to(self.model.device)
        texts = [(0, self.protocol.clean(one.text)) for one in said]
        generated = self.protocol.seg == "generated"
        return self.scorer.segment(batch, self.model.see(batch), texts, generated=generated, prompts=True)

    def _join(self, logits: Tensor, size: tuple[int, ...]) -> np.ndarray:
        """Return the union (H, W) bool of masks (n, Q, Q)."""
        height, width = size
        if not len(logits):
            return np.zeros(size, bool)
        if self.protocol.undo_target_shift:
            logits = undo_target_shift(logits, (height, width))
        return (resize_logits(logits, (height, width), self.geometry.grounding_size) > 0).any(0).cpu().numpy()

    def _write(self, clip: Clip, said: Sequence[Expression], number: int, masks: np.ndarray) -> None:
        for one, mask in zip(said, masks, strict=True):
            name = f"{clip.sample_id}/{one.name}/{clip.frames[number]}.png"
            path = safe_join(self.folder / SUBMISSION, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * 255).save(path)

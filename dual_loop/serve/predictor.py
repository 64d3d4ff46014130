"""Ask a model: caption regions, segment texts, close the loop; on numpy arrays or PIL images, one or many at a time.

predictor = Predictor.load("outputs/run")
predictor.caption(image, masks)            -> ["a red star", ...]
predictor.segment(image, ["a red star"])   -> [SegmentedText(mask=...), ...]
predictor.loop(image, masks)               -> LoopResult(captions, masks, ious, matrix)
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps

from dual_loop.data.images import to_rgb
from dual_loop.data.masks import decode_rle
from dual_loop.data.prepare import batch_from_samples
from dual_loop.errors import PromptError, SampleError, explain, shorten
from dual_loop.evaluation.measure import CHUNK, MeasuredRegion, RegionMeter, resize_logits
from dual_loop.evaluation.protocols import Protocol
from dual_loop.iteration import in_chunks
from dual_loop.loop.captioner import measuring_settings
from dual_loop.loop.scorer import Scorer
from dual_loop.model.build import geometry
from dual_loop.model.sa2va import evaluating
from dual_loop.serve.loading import LoadedModel, find_trained
from dual_loop.training.devices import choose_device
from dual_loop.types import RegionSample

ImageLike: TypeAlias = "np.ndarray | Image.Image"


@dataclass(frozen=True)
class SegmentedText:
    """What a text was segmented as."""

    text: str
    mask: np.ndarray  # (H, W) bool on the image; empty where the model wrote no [SEG]
    num_masks: int  # that the answer asked for; they are united in ``mask``
    confidence: float  # mean probability of the foreground pixels, 0..1; 0 for an empty mask


@dataclass(frozen=True)
class LoopResult:
    """N masks to captions and back."""

    captions: list[str]
    rejected: list[str | None]  # why a caption is not usable, None where it is
    masks: np.ndarray  # (N, H, W) bool, segmented from the captions; empty for rejected ones
    ious: np.ndarray  # (N,) float64, of each mask with the one that was captioned
    matrix: np.ndarray  # (N, N) float64, IoU of mask' i with given mask j: how well caption i tells its region


@dataclass(eq=False)
class _Request:
    """Images that a thread asks about; those of one ``task`` may be answered in one call of the model."""

    task: str
    images: list[Any]
    answers: Future[list[Any]] = field(default_factory=Future)


class Predictor:
    """A loaded model with the three questions that the package is about.

    Threads may share it: one is in the model at a time, and answers all that wait with the same question, up to
    ``images_at_once`` images.

    Args:
        loaded: model, prompter and configuration.
    """

    images_at_once = CHUNK

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.model, self.prompter, self.config = loaded.model, loaded.prompter, loaded.config
        self.geometry = geometry(self.config)
        self._lock = threading.Lock()  # the model's modes and caches are its own
        self._waiting: list[_Request] = []

    @classmethod
    def load(
        cls,
        checkpoint: str | Path | None = None,
        *,
        weights: str = "ema",
        device: str = "auto",
        config: str | None = None,
        overrides: Mapping[str, object] | None = None,
    ) -> Predictor:
        """Load a run, a checkpoint or weights; the other arguments are those of :func:`find_trained`.

        Raises:
            DualLoopError: as there, or there is no such device.
        """
        place = choose_device(device)
        return cls(find_trained(checkpoint, weights=weights, config=config, overrides=overrides).load(place))

    # ---- one image ---------------------------------------------------------------------------------------------------

    def caption(self, image: ImageLike, masks: np.ndarray) -> list[str]:
        """Caption every region: ``masks`` is (N, H, W) or (H, W), foreground where > 0.

        Raises:
            SampleError: a mask has another size than the image, or no pixel.
        """
        return self.caption_many([(image, masks)])[0]

    def segment(self, image: ImageLike, texts: Sequence[str] | str, *, generated: bool = False) -> list[SegmentedText]:
        """Segment what each text describes.

        Args:
            image: (H, W, 3) uint8 RGB, or a PIL image.
            generated: let the model write the answer, which may then hold no [SEG]; else the answer is given.

        Raises:
            PromptError: a text holds a special token, or is none (:func:`texts_of`).
            SampleError: see :func:`to_array`.
        """
        return self.segment_many([(image, texts_of(texts))], generated=generated)[0]

    def loop(self, image: ImageLike, masks: np.ndarray) -> LoopResult:
        """Caption every region, segment every caption, and compare."""
        return self.loop_many([(image, masks)])[0]

    def region_from_box(self, image: ImageLike, box: Sequence[float], *, refine: bool = False) -> np.ndarray:
        """Return the mask (H, W) bool of a box (x1, y1, x2, y2) in pixels: the box's area.

        ``refine`` lets SAM 2 draw the object in the box instead; its weights must know boxes (SAM 2's own do, the tiny
        checkpoint's do not).

        Raises:
            SampleError: the box lies outside the image or has no area, or SAM 2 finds nothing in it.
        """
        pixels = to_array(image)
        height, width = pixels.shape[:2]
        x1, y1, x2, y2 = _numbers(box, 4, "--box")
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            expected = f"0 <= x1 < x2 <= {width}, 0 <= y1 < y2 <= {height}"
            raise SampleError("bad_box", explain("a box does not fit its image", "--box", list(box), expected))
        if refine:
            return self._prompted(pixels, torch.tensor([[x1, y1, x2, y2]]), f"box {x1:g},{y1:g},{x2:g},{y2:g}")
        mask = np.zeros((height, width), bool)
        mask[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
        return mask

    def region_from_point(self, image: ImageLike, point: Sequence[float]) -> np.ndarray:
        """Return the mask (H, W) bool that SAM 2 draws for the object at a point (x, y) in pixels.

        Raises:
            SampleError: the point lies outside the image, or SAM 2 finds nothing there.
        """
        pixels = to_array(image)
        height, width = pixels.shape[:2]
        x, y = _numbers(point, 2, "--point")
        if not (0 <= x <= width and 0 <= y <= height):
            expected = f"0 <= x <= {width}, 0 <= y <= {height}"
            raise SampleError("bad_point", explain("a point lies outside its image", "--point", list(point), expected))
        return self._prompted(pixels, torch.tensor([[x, y]]), f"point {x:g},{y:g}")

    # ---- many images -------------------------------------------------------------------------------------------------

    def caption_many(self, items: Sequence[tuple[ImageLike, np.ndarray]]) -> list[list[str]]:
        """:meth:`caption` for many images, eight at a time."""
        # The words themselves, also where step 2 could not read them.
        return [[region.caption for region in regions] for regions in self._measure(items, "captioning")]

    def segment_many(
        self, items: Sequence[tuple[ImageLike, Sequence[str]]], *, generated: bool = False
    ) -> list[list[SegmentedText]]:
        """:meth:`segment` for many images, eight at a time."""
        asked = [(to_array(image), texts_of(texts)) for image, texts in items]
        task = "segment, generated" if generated else "segment"
        answers = iter(self._ask(task, [(pixels, texts) for pixels, texts in asked if texts]))
        found = [(pixels, texts, next(answers) if texts else ()) for pixels, texts in asked]
        return [
            [self._united(text, one, pixels.shape) for text, one in zip(texts, logits, strict=True)]
            for pixels, texts, logits in found
        ]

    def loop_many(self, items: Sequence[tuple[ImageLike, np.ndarray]]) -> list[LoopResult]:
        """:meth:`loop` for many images, eight at a time."""
        results: list[LoopResult] = []
        for regions in self._measure(items, "loop"):
            loops = [region.cycle for region in regions if region.cycle is not None]
            masks = np.stack([decode_rle(loop.mask, "a mask that came back") for loop in loops])
            captions, rejected = [region.caption for region in regions], [region.rejected for region in regions]
            matrix = np.array([loop.ious for loop in loops])
            results.append(LoopResult(captions, rejected, masks, matrix.diagonal().copy(), matrix))
        return results

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _measure(self, items: Sequence[tuple[ImageLike, np.ndarray]], task: str) -> list[list[MeasuredRegion]]:
        """Return the measured regions of every image."""
        return self._ask(task, [region_sample(*item) for item in items])

    def _ask(self, task: str, images: Sequence[Any]) -> list[Any]:
        """Return the answers to ``images``, ``images_at_once`` at a time, as :meth:`_call_model` gives them."""
        answers: list[Any] = []
        for chunk in in_chunks(images, self.images_at_once):
            request = _Request(task, list(chunk))
            self._waiting.append(request)
            try:
                with self._lock:
                    if not request.answers.done():  # by the thread that was in the model before
                        self._answer(self._with_others(request))
            finally:
                self._waiting.remove(request)
            answers += request.answers.result()
        return answers

    def _with_others(self, request: _Request) -> list[_Request]:
        group = [request]
        for other in tuple(self._waiting):
            fits = len(other.images) + sum(len(one.images) for one in group) <= self.images_at_once
            if fits and other is not request and other.task == request.task and not other.answers.done():
                group.append(other)
        return group

    def _answer(self, group: Sequence[_Request]) -> None:
        try:
            answers = iter(self._call_model(group[0].task, [image for request in group for image in request.images]))
            for request in group:
                request.answers.set_result(list(islice(answers, len(request.images))))
        except Exception as error:
            if len(group) == 1:
                group[0].answers.set_exception(error)
            else:  # the fault of one is not the others'
                for request in group:
                    self._answer([request])

    @torch.no_grad()
    def _call_model(self, task: str, images: Sequence[Any]) -> list[Any]:
        """Return for each (pixels, texts) the mask logits of every text, or for each sample its measured regions."""
        if not task.startswith("segment"):
            protocol = Protocol(question=self.config.loop.segment_question)
            meter = RegionMeter(self.model, self.prompter, self.config, protocol, (task,), self.loaded.autocast())
            regions = iter(meter.measure(images, "given"))
            return [list(islice(regions, sample.num_regions)) for sample in images]
        scorer = Scorer(self.model, self.prompter, measuring_settings(self.config.loop))
        asked = list(enumerate(text for _, texts in images for text in texts))
        # A text needs no region; a whole image stands in for one, so that one path serves all.
        samples = [region_sample(pixels, np.ones((len(texts), *pixels.shape[:2]), bool)) for pixels, texts in images]
        batch = batch_from_samples(samples, self.geometry, seed=self.config.train.seed).to(self.model.device)
        with evaluating(self.model), self.loaded.autocast():
            logits = iter(scorer.segment(batch, self.model.see(batch), asked, generated="generated" in task))
        return [list(islice(logits, len(texts))) for _, texts in images]

    def _at_size(self, logits: torch.Tensor, shape: Sequence[int]) -> np.ndarray:
        size = (int(shape[0]), int(shape[1]))
        return np.asarray(resize_logits(logits.float(), size, self.geometry.grounding_size).cpu().numpy())

    def _united(self, text: str, logits: torch.Tensor, shape: Sequence[int]) -> SegmentedText:
        if not len(logits):
            return SegmentedText(text, np.zeros(shape[:2], bool), 0, 0.0)
        values = self._at_size(logits, shape).max(axis=0)
        mask = values > 0
        confidence = float((1 / (1 + np.exp(-values[mask]))).mean()) if mask.any() else 0.0
        return SegmentedText(text, mask, len(logits), confidence)

    @torch.no_grad()
    def _prompted(self, pixels: np.ndarray, prompt: torch.Tensor, name: str) -> np.ndarray:
        """Segment with SAM 2's own prompt: (1, 2) a point or (1, 4) a box, in pixels of the image."""
        side = self.geometry.grounding_size
        scale = torch.tensor([side / pixels.shape[1], side / pixels.shape[0]]).repeat(prompt.shape[1] // 2)
        scaled = (prompt * scale).to(self.model.device)
        sample = region_sample(pixels, np.ones(pixels.shape[:2], bool))
        batch = batch_from_samples([sample], self.geometry).to(self.model.device)
        grounding = self.model.grounding
        with self._lock, evaluating(self.model), self.loaded.autocast():
            levels = grounding.finish(self.model.encode_grounding(batch.g_pixel_values))
            sparse = grounding.point_prompts(scaled) if prompt.shape[1] == 2 else grounding.box_prompts(scaled)
            index = torch.zeros(1, dtype=torch.long, device=self.model.device)
            logits = grounding.decode_prompts(sparse, levels, index).mask_logits
        mask: np.ndarray = self._at_size(logits, pixels.shape)[0] > 0
        if not mask.any():
            raise SampleError("no_region_left", explain("SAM 2 finds no object there", name, fix="mark it by a mask"))
        return mask


def _numbers(values: object, count: int, where: str) -> list[float]:
    """Return ``count`` numbers; the bad reason is that of the flag (``bad_box``)."""
    try:
        numbers = [float(value) for value in values]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count:
        message = explain("not the right numbers", where, shorten(values), f"{count} numbers, in pixels")
        raise SampleError(where.replace("--", "bad_"), message)
    return numbers


def to_array(image: ImageLike) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB; a PIL image is turned as its EXIF orientation says.

    Raises:
        SampleError: ``not_an_image`` for anything else, an array of another shape or dtype too; ``truncated_file``.
    """
    if isinstance(image, Image.Image):
        try:
            return to_rgb(ImageOps.exif_transpose(image), "image")
        except (OSError, ValueError, SyntaxError) as error:  # Pillow decodes as late as here
            message = explain("an image is damaged", getattr(image, "filename", "image"), error, "a complete file")
            raise SampleError("truncated_file", message) from error
    if not isinstance(image, np.ndarray):
        expected, fix = "(H, W, 3) uint8 RGB, or a PIL image", "open a path with PIL.Image.open"
        raise SampleError("not_an_image", explain("not an image", "image", shorten(image), expected, fix))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        seen = f"{image.shape} {image.dtype}"
        raise SampleError("not_an_image", explain("not an RGB image", "image", seen, "(H, W, 3) uint8"))
    return image


def texts_of(texts: object) -> list[str]:
    """Return one text, or a sequence of them, as a list.

    Raises:
        PromptError: something is no text, or none that can be encoded (half of a surrogate pair).
    """
    found: list[Any] = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    for text in found:
        if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
            fix = "give a str; json.loads and surrogateescape can leave halves of a pair in one"
            raise PromptError(explain("not a text", "texts", shorten(text), "str that UTF-8 can encode", fix))
    return found


def region_sample(image: ImageLike, masks: np.ndarray) -> RegionSample:
    """Make a sample of an image and masks (N, H, W) or (H, W), foreground where > 0.

    Raises:
        SampleError: ``size_mismatch``, ``empty_mask``, ``not_an_image``, ``not_a_mask``.
    """
    pixels = to_array(image)
    try:
        stack = np.asarray(masks)
    except ValueError as error:
        raise SampleError("not_a_mask", explain("masks differ in size", "masks", error, "(N, H, W)")) from error
    if stack.dtype.kind not in "biuf":
        message = explain("not a mask", "masks", shorten(masks), "(N, H, W) or (H, W), numbers or bool")
        raise SampleError("not_a_mask", message)
    stack = (stack[None] if stack.ndim == 2 else stack) > 0
    if stack.ndim != 3 or not len(stack) or stack.shape[1:] != pixels.shape[:2]:
        expected = f"(N, {pixels.shape[0]}, {pixels.shape[1]}) as the image, N >= 1"
        fix = "draw the mask on this very image"
        message = explain("masks do not fit the image", "masks", np.asarray(masks).shape, expected, fix)
        raise SampleError("size_mismatch", message)
    empty = [number for number, mask in enumerate(stack) if not mask.any()]
    if empty:
        raise SampleError("empty_mask", explain("a mask is empty", f"mask {empty[0]}", "0 pixels", "1 or more"))
    names = tuple(str(number) for number in range(len(stack)))
    return RegionSample("given", "image", pixels, np.ascontiguousarray(stack), names, ((),) * len(stack))

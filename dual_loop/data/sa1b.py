"""Reader of SA-1B: photographs with many class-agnostic masks and no text.

Layout (Kirillov et al. 2023, arXiv 2304.02643), any of the three, also mixed and nested in sub-folders::

    root/sa_<id>.jpg     root/img/sa_<id>.jpg      root/<shard>/sa_<id>.jpg
    root/sa_<id>.json    root/js/sa_<id>.json      root/<shard>/sa_<id>.json

Image and JSON belong together when their stems agree and their folders agree once parts named ``img`` and ``js`` are
taken out. The index holds the union: an image without JSON, or JSON without image, is a bad sample when it is loaded.

Mask size: the size in the run-length code must be the decoded image's; up to 2 pixels a side are bridged by nearest
resizing (:func:`~dual_loop.data.masks.fit_mask`), more is a bad sample, as mirrors ship resized images with the
original masks. Masks are drawn on the stored pixels, so an EXIF orientation is never applied.

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``not_an_image``,
``broken_json``, ``broken_rle``, ``size_mismatch``, ``no_region_left``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dual_loop.data.index_cache import (
    StringTable,
    TreeListing,
    check_root,
    choose_capped,
    layout_error,
    load_or_build,
)
from dual_loop.data.masks import check_mask, decode_rle, fit_mask, read_image
from dual_loop.errors import SampleError, explain
from dual_loop.types import RegionSample

LAYOUT = """
  root/                        or root/
    sa_<id>.jpg                     img/sa_<id>.jpg
    sa_<id>.json                    js/sa_<id>.json
  (or sub-folders that look like one of these)
"""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class Sa1b:
    """SA-1B as a :class:`~dual_loop.types.RegionSource`.

    Args:
        root: folder with images and JSON files, see the module.
        max_samples: keep this many images, drawn with a fixed seed; None keeps all. A cap counts image files, so
            JSON files without an image are left out under it.
        regions_per_image: most regions of one sample.
        min_area, max_area: limits on the share of the image that a mask covers, 0..1.
        min_predicted_iou, min_stability_score: limits on the two scores of an annotation; above 0, an annotation
            without the score does not pass.
        index_dir: see :func:`~dual_loop.data.index_cache.load_or_build`.

    Raises:
        ConfigError: the folder does not exist or holds no image.
    """

    name = "sa1b"

    def __init__(
        self,
        root: str | Path,
        max_samples: int | None = None,
        regions_per_image: int = 1,
        min_area: float = 0.001,
        max_area: float = 0.95,
        min_predicted_iou: float = 0.0,
        min_stability_score: float = 0.0,
        index_dir: str | Path | None = None,
    ) -> None:
        self.root = check_root(root, "SA-1B", LAYOUT)
        self.regions_per_image = regions_per_image
        self.min_area = min_area
        self.max_area = max_area
        self.min_scores = {"predicted_iou": min_predicted_iou, "stability_score": min_stability_score}
        key = {"kind": "sa1b", "root": str(self.root)}
        arrays = load_or_build(index_dir, key, lambda: self._build_index(index_dir, key))
        self._images = StringTable.from_arrays(arrays, "image")
        self._records = StringTable.from_arrays(arrays, "record")
        has_image = np.flatnonzero(np.diff(self._images.offsets) > 0)
        if not len(has_image):
            seen = f"no sa_*.jpg, {len(self._records)} sa_*.json"
            raise layout_error("the SA-1B folder holds no image", self.root, seen, LAYOUT)
        if max_samples is None:
            self._kept = np.arange(len(self._images))
        else:
            self._kept = has_image[choose_capped(len(has_image), max_samples, "sa1b_max_samples")]

    def _build_index(self, index_dir: str | Path | None, key: Mapping[str, Any]) -> dict[str, np.ndarray]:
        listing = TreeListing(self.root, (*IMAGE_SUFFIXES, ".json"), index_dir, key)
        pairs: dict[str, list[str]] = {}
        for path in listing.files:
            if path.rsplit("/", 1)[-1].startswith("sa_"):
                pairs.setdefault(_entry_name(path), ["", ""])[path.lower().endswith(".json")] = path
        ordered = [pairs[name] for name in sorted(pairs)]
        images = StringTable.from_strings(image for image, _ in ordered)
        records = StringTable.from_strings(record for _, record in ordered)
        return {**images.to_arrays("image"), **records.to_arrays("record"), **listing.watched_arrays()}

    def __len__(self) -> int:
        return len(self._kept)

    def named_rows(self) -> tuple[list[StringTable], np.ndarray]:
        """Return tables whose rows contain the entries' names, and the row of each entry, (n,) int64."""
        return [self._images, self._records], self._kept

    def entry_id(self, index: int) -> str:
        """Return ``sa_<id>``, after the sub-folder where there is one."""
        row = int(self._kept[index])
        return _entry_name(self._images[row] or self._records[row])

    def image_path(self, index: int) -> Path | None:
        """Return the image file, None where the entry is a JSON file without one."""
        name = self._images[int(self._kept[index])]
        return self.root / name if name else None

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Read image ``index`` with up to ``regions_per_image`` regions, drawn by ``rng`` among those that pass.

        Only drawn regions are decoded. One that fails the area limits is replaced by the next drawn; one whose code
        is broken makes the whole sample bad.

        Raises:
            SampleError: see the module.
        """
        row = int(self._kept[index])
        image_path, record_path = self._images[row], self._records[row]
        if not image_path or not record_path:
            lacking = "image" if not image_path else "JSON file"
            where = str(self.root / (image_path or record_path))
            message = explain(f"an SA-1B {lacking} is missing", where, "no partner", f"a {lacking} of the same stem")
            raise SampleError("missing_file", message)
        annotations = _read_annotations(self.root / record_path)
        image = read_image(self.root / image_path, apply_exif=False)
        passing = [i for i, annotation in enumerate(annotations) if self._passes(annotation)]
        chosen, masks = [], []
        for position in rng.permutation(len(passing)):
            number = passing[int(position)]
            mask = self._decode(annotations[number], image.shape[:2], f"{self.root / record_path}[{number}]")
            if mask is not None:
                chosen.append(number)
                masks.append(mask)
            if len(chosen) == self.regions_per_image:
                break
        if not chosen:
            raise self._no_region_left(record_path, len(annotations), len(passing))
        return RegionSample(
            source=self.name,
            sample_id=self.entry_id(index),
            image=image,
            masks=np.stack(masks),
            region_ids=_region_ids(annotations, chosen),
            captions=((),) * len(chosen),
        )

    def _passes(self, annotation: dict[str, Any]) -> bool:
        """Check the scores, which cost nothing; the area is checked on the decoded mask."""
        for key, minimum in self.min_scores.items():
            score = annotation.get(key)
            if minimum > 0 and not (isinstance(score, (int, float)) and score >= minimum):
                return False
        return True

    def _decode(self, annotation: dict[str, Any], size: tuple[int, int], where: str) -> np.ndarray | None:
        """Return the mask (H, W) bool, or None where its area is outside the limits."""
        mask = fit_mask(decode_rle(annotation.get("segmentation", {}), where), size, where)
        try:
            check_mask(mask, where, self.min_area, self.max_area)
        except SampleError:
            return None
        return mask

    def _no_region_left(self, record_path: str, num_all: int, num_passing: int) -> SampleError:
        limits = ", ".join(f"{key} >= {minimum:g}" for key, minimum in self.min_scores.items())
        message = explain(
            "no region of an image passes the limits",
            str(self.root / record_path),
            f"{num_all} annotations, {num_passing} of them with high enough scores",
            f"one with {limits}, area {self.min_area:g} to {self.max_area:g} of the image",
            "widen the sa1b limits, or let the sample be skipped",
        )
        return SampleError("no_region_left", message)


def _entry_name(path: str) -> str:
    *folders, file = path.split("/")
    parts = [folder for folder in folders if folder not in ("img", "js")]
    return "/".join([*parts, file.rsplit(".", 1)[0]])


def _read_annotations(path: Path) -> list[dict[str, Any]]:
    """Return the annotations of an SA-1B JSON file.

    Raises:
        SampleError: ``missing_file``; ``broken_json`` where the file is damaged or of another structure.
    """
    fix = "download this file again"
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except FileNotFoundError as error:
        raise SampleError("missing_file", explain("an annotation file is missing", str(path), fix=fix)) from error
    except (OSError, ValueError, RecursionError) as error:
        seen = f"{type(error).__name__}: {error}"
        message = explain("an annotation file is damaged", str(path), seen, "complete JSON", fix)
        raise SampleError("broken_json", message) from error
    annotations = record.get("annotations") if isinstance(record, dict) else None
    if not isinstance(annotations, list) or not all(isinstance(item, dict) for item in annotations):
        expected = '{"image": {...}, "annotations": [{...}, ...]}'
        message = explain("an annotation file is not of SA-1B", str(path), f"{str(record)[:60]}...", expected, fix)
        raise SampleError("broken_json", message)
    return annotations


def _region_ids(annotations: list[dict[str, Any]], chosen: list[int]) -> tuple[str, ...]:
    """Return the annotations' own ids; where one is missing or used twice, their positions in the file."""
    ids = [annotation.get("id") for annotation in annotations]
    if all(isinstance(value, (int, str)) for value in ids) and len({str(value) for value in ids}) == len(ids):
        return tuple(str(ids[number]) for number in chosen)
    return tuple(f"at{number}" for number in chosen)

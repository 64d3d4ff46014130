"""Reader of SA-1B: photographs with many class-agnostic masks and no text.

Layout (Kirillov et al. 2023, arXiv 2304.02643), any of the four, also mixed and nested in sub-folders::

    root/sa_<id>.jpg     root/img/sa_<id>.jpg      root/<shard>/sa_<id>.jpg      root/sa_<shard>.tar
    root/sa_<id>.json    root/js/sa_<id>.json      root/<shard>/sa_<id>.json     (as released, gzipped or not)

Archives are read in place (:mod:`~dual_loop.data.tar`).

Image and JSON belong together when their stems agree and their folders agree once parts named ``img`` and ``js`` are
taken out. The index holds the union: an image without JSON, or JSON without image, is a bad sample when it is loaded.

Mask size: the size in the run-length code must be the decoded image's; up to 2 pixels a side are bridged by nearest
resizing (:func:`~dual_loop.data.masks.fit_mask`), more is a bad sample, as mirrors ship resized images with the
original masks. Masks are drawn on the stored pixels, so an EXIF orientation is never applied.

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``not_an_image``,
``broken_json``, ``broken_rle``, ``size_mismatch``, ``no_region_left``.
"""

from __future__ import annotations

import functools
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dual_loop.data.images import read_picture
from dual_loop.data.index import TreeListing, build_in_parts, default_index_dir, join_parts, load_or_build
from dual_loop.data.index_file import StringTable
from dual_loop.data.masks import check_mask, decode_rle, fit_mask
from dual_loop.data.reader import check_root, choose_capped, layout_error
from dual_loop.data.tar import TAR_SUFFIXES, TarShelf, list_tar
from dual_loop.errors import SampleError, explain
from dual_loop.types import NeededSize, RegionSample

LAYOUT = """
  root/                        or root/
    sa_<id>.jpg                     img/sa_<id>.jpg
    sa_<id>.json                    js/sa_<id>.json
  (or sub-folders that look like one of these, or sa_<shard>.tar as released)
"""

PREFIX = "sa_"

Place = tuple[int, int, int]
"""Number of the archive, offset in it (uncompressed), size; :data:`OUTSIDE` for a file of its own."""

OUTSIDE: Place = (-1, 0, 0)

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
        index_dir: see :func:`~dual_loop.data.index.load_or_build`.

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
        # The number changes where a listing leaves other files behind: since 2, points of gzip archives 1 MiB apart.
        key = {"kind": "sa1b", "root": str(self.root), "version": 2}
        arrays = load_or_build(index_dir, key, lambda: self._build_index(index_dir, key))
        self._images = StringTable.from_arrays(arrays, "image")
        self._records = StringTable.from_arrays(arrays, "record")
        self._image_place, self._record_place = arrays["image_place"], arrays["record_place"]
        self._shelf = TarShelf(self.root, StringTable.from_arrays(arrays, "tar"), _cache_dir(index_dir))
        self.damaged_archives = _damages(arrays)
        if self.damaged_archives:
            warnings.warn(_damage_warning(self.root, self.damaged_archives), stacklevel=2)
        has_image = np.flatnonzero(np.diff(self._images.offsets) > 0)
        if not len(has_image):
            seen = f"no sa_*.jpg, {len(self._records)} sa_*.json"
            raise layout_error("the SA-1B folder holds no image", self.root, seen, LAYOUT)
        if max_samples is None:
            self._kept = np.arange(len(self._images))
        else:
            self._kept = has_image[choose_capped(len(has_image), max_samples, "sa1b_max_samples")]

    def _build_index(self, index_dir: str | Path | None, key: Mapping[str, Any]) -> dict[str, np.ndarray]:
        listing = TreeListing(self.root, (*IMAGE_SUFFIXES, ".json", *TAR_SUFFIXES), index_dir, key)
        tars = [path for path in listing.files if path.lower().endswith(TAR_SUFFIXES)]
        files = [path for path in listing.files if not path.lower().endswith(TAR_SUFFIXES)]
        paths = [str(self.root / tar) for tar in tars]
        build = functools.partial(list_tar, str(_cache_dir(index_dir)), PREFIX)
        parts = build_in_parts(paths, build, index_dir, key, describe="SA-1B archives", count=_num_members)
        return {
            **_pair_up([(path, OUTSIDE) for path in files] + list(_members(tars, parts))),
            **StringTable.from_strings(tars).to_arrays("tar"),
            **StringTable.join([StringTable.from_arrays(part, "damage") for part in parts]).to_arrays("damage"),
            **join_parts([listing.watched_arrays(), *(_watched(part) for part in parts)]),
        }

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
        """Return the image file, None where the entry is a JSON file without one, or inside an archive."""
        row = int(self._kept[index])
        name = self._images[row]
        return self.root / name if name and self._image_place[row, 0] < 0 else None

    def _read(self, name: str, place: np.ndarray) -> Path | io.BytesIO:
        """Return a file, or what an archive holds of it."""
        number, offset, size = (int(value) for value in place)
        return self.root / name if number < 0 else io.BytesIO(self._shelf.read(number, offset, size))

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Return :meth:`load_reduced` with the image in full.

        Raises:
            SampleError: see the module.
        """
        return self.load_reduced(index, rng, None)

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
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
        annotations = _read_annotations(self._read(record_path, self._record_place[row]), self.root / record_path)
        stored = self._read(image_path, self._image_place[row])
        picture = read_picture(stored, False, str(self.root / image_path), needed)
        passing = [i for i, annotation in enumerate(annotations) if self._passes(annotation)]
        chosen, masks = [], []
        for position in rng.permutation(len(passing)):
            number = passing[int(position)]
            mask = self._decode(annotations[number], picture.size, f"{self.root / record_path}[{number}]")
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
            image=picture.pixels,
            masks=np.stack(masks),
            region_ids=_region_ids(annotations, chosen),
            captions=((),) * len(chosen),
            image_reduction=picture.reduction,
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


def _cache_dir(index_dir: str | Path | None) -> Path:
    return default_index_dir() if index_dir is None else Path(index_dir)


def _members(tars: Sequence[str], parts: Sequence[Mapping[str, np.ndarray]]) -> Iterator[tuple[str, Place]]:
    """Yield each archived file as ``<archive>/<name>`` with its place."""
    for number, (tar, part) in enumerate(zip(tars, parts, strict=True)):
        names = StringTable.from_arrays(part, "member")
        for row, (offset, size) in enumerate(part["member_place"].tolist()):
            yield f"{tar}/{names[row]}", (number, offset, size)


def _pair_up(files: Sequence[tuple[str, Place]]) -> dict[str, np.ndarray]:
    """Return the tables of images and JSON files, row by row those of one entry, with their places (n, 3) int64."""
    pairs: dict[str, list[tuple[str, Place]]] = {}
    for path, place in files:
        if path.rsplit("/", 1)[-1].startswith(PREFIX) and path.lower().endswith((*IMAGE_SUFFIXES, ".json")):
            entry = pairs.setdefault(_entry_name(path), [("", OUTSIDE), ("", OUTSIDE)])
            entry[path.lower().endswith(".json")] = (path, place)
    ordered = [pairs[name] for name in sorted(pairs)]
    arrays: dict[str, np.ndarray] = {}
    for column, name in enumerate(("image", "record")):
        arrays |= StringTable.from_strings(pair[column][0] for pair in ordered).to_arrays(name)
        arrays[f"{name}_place"] = np.array([pair[column][1] for pair in ordered], np.int64).reshape(-1, 3)
    return arrays


def _num_members(part: Mapping[str, np.ndarray]) -> int:
    return int(part["num_members"][0])


def _watched(part: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values for name, values in part.items() if name.startswith("watched_")}


def _damages(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    tars, texts = StringTable.from_arrays(arrays, "tar"), StringTable.from_arrays(arrays, "damage")
    return {tars[number]: texts[number] for number in range(len(tars)) if texts[number]}


def _damage_warning(root: Path, damaged: Mapping[str, str]) -> str:
    name, text = next(iter(damaged.items()))
    return explain(
        "archives of SA-1B are damaged; what comes before the damage is used",
        str(root / name),
        f"{text}; {len(damaged)} damaged in all",
        "whole archives",
        "download them again",
    )


def _read_annotations(file: Path | io.BytesIO, path: Path) -> list[dict[str, Any]]:
    """Return the annotations of an SA-1B JSON file (``path`` names it in messages).

    Raises:
        SampleError: ``missing_file``; ``broken_json`` where the file is damaged or of another structure.
    """
    fix = "download this file again"
    try:
        record = json.loads(file.read_bytes() if isinstance(file, Path) else file.getvalue())
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

"""Reader of RefCOCO, RefCOCO+ and RefCOCOg: objects of COCO photographs with reference expressions.

Format: Yu et al. 2016, arXiv 1608.00272; Mao et al. 2016, arXiv 1511.02283 (:data:`LAYOUT`). Images are called
``COCO_train2014_<id>.jpg``, or by bare 12-digit names (train2017).
``refs(google).p`` is read only where it is asked for (``"refcocog:google"``): its splits share images.

An entry is one image of one data set with its references of one split. A ref's own ``file_name`` carries a suffix
``_<n>`` that no image has, so the image is found through ``image_id`` and ``instances.json``. COCO's masks are drawn
on the stored pixels, so an EXIF orientation is never applied.

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``not_an_image``,
``unsafe_path``, ``bad_polygon``, ``broken_rle``, ``size_mismatch``, ``empty_mask`` (:meth:`RefCoco.load_all`),
``no_region_left``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dual_loop.data.captions import check_captions
from dual_loop.data.images import read_picture
from dual_loop.data.index import load_or_build
from dual_loop.data.layout import find_part, layout_error
from dual_loop.data.masks import check_mask, decode_segmentation, fit_mask, safe_join
from dual_loop.data.reader import Reader
from dual_loop.data.refcoco_index import build_index
from dual_loop.data.string_table import StringTable
from dual_loop.errors import ConfigError, SampleError, explain
from dual_loop.types import NeededSize, RegionSample, SkippedRegion

LAYOUT = """
  root/
    refcoco/     instances.json   refs(unc).p
    refcoco+/    instances.json   refs(unc).p
    refcocog/    instances.json   refs(umd).p
    (each with coco2014/train2014/*.jpg, or root/coco2014/train2014/*.jpg once)
"""

DEFAULT_SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
IMAGE_FOLDER = "coco2014/train2014"


class RefCoco(Reader):
    """The three data sets as one source.

    Args (further ones are those of :class:`~dual_loop.data.reader.Reader`):
        root: folder that holds one folder per data set.
        datasets: names of :data:`DEFAULT_SPLIT_BY`, each optionally with a split author (``"refcocog:google"``). Those
            without a folder are left out with a warning; ``self.datasets`` has those that are used.
        split: ``train``, ``val``, ``testA``, ``testB`` or ``test``; a data set that lacks it adds no entry.
        images: where the images are, if not below ``root``: a path that exists, or a path below ``root``.
        polygons: ``union``, or ``summed`` (:func:`~dual_loop.data.coco_masks.decode_polygons`), for comparison alone.

    Raises:
        ConfigError: no data set, or a part of one, is there; a file has another structure; a pickle asks for a
            global; no data set has the split.
    """

    name, title, layout = "refcoco", "RefCOCO", LAYOUT

    def __init__(
        self,
        root: str | Path,
        datasets: Sequence[str] = ("refcoco", "refcoco+", "refcocog"),
        split: str = "train",
        max_samples: int | None = None,
        regions_per_image: int = 1,
        images: str | Path | None = None,
        index_dir: str | Path | None = None,
        polygons: str = "union",
    ) -> None:
        super().__init__(root, index_dir, regions_per_image)
        self._summed = polygons == "summed"
        self._parts = open_parts(self.root, datasets, images, index_dir)
        self.datasets = tuple(part.label for part in self._parts)
        entries = [(number, *entry) for number, part in enumerate(self._parts) for entry in part.entries(split)]
        if not entries:
            expected = ", ".join(f"{part.label}: {', '.join(part.split_names)}" for part in self._parts)
            fix = "set the split of RefCOCO to one that exists"
            raise ConfigError(explain("no RefCOCO data set has this split", str(self.root), split, expected, fix))
        self._set_entries(np.arange(len(entries)), max_samples, "refcoco_max_samples")
        # Columns: data set, image, first and last place among the references of the split.
        self._entries = np.array(entries, np.int64)[self._rows]
        self._split_rows = [part.rows_of_split(split) for part in self._parts]

    def entry_id(self, index: int) -> str:
        """Return ``<data set>/<image id>``."""
        part, image, _ = self._entry(index)
        return f"{part.label}/{part.image_ids[image]}"

    def coco_id(self, index: int) -> int:
        """Return COCO's id of the image."""
        part, image, _ = self._entry(index)
        return int(part.image_ids[image])

    def image_path(self, index: int) -> Path:
        """Return the image file.

        Raises:
            SampleError: ``missing_file`` or ``unsafe_path``.
        """
        part, image, _ = self._entry(index)
        return part.find_image(image)

    def _entry(self, index: int) -> tuple[_DatasetPart, int, list[int]]:
        """Return the data set of an entry, its image, and the rows of its references."""
        number, image, start, stop = self._entries[index].tolist()
        return self._parts[number], image, self._split_rows[number][start:stop].tolist()

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
        """Read entry ``index`` with up to ``regions_per_image`` references drawn by ``rng``, with all their sentences.

        One whose mask is empty or cannot be used, or with a marker in a sentence, is replaced by the next drawn.
        """
        part, image, rows = self._entry(index)
        picture = read_picture(part.find_image(image), apply_exif=False, needed=needed)

        def decode(number: int) -> np.ndarray:
            check_captions(part.sentences(rows[number]), f"{part.folder}: ref {part.ref_ids[rows[number]]}")
            return self._mask(part, image, rows[number], picture.size)

        where, classes = f"{self.root}: {self.entry_id(index)}", part.classes[rows].tolist()
        passed: list[SkippedRegion] = []
        drawn, masks = self._draw(
            rng,
            len(rows),
            decode,
            where,
            picture=lambda: picture,
            classes=classes,
            passed_over=passed,
            region_id=lambda number: f"ref{part.ref_ids[rows[number]]}",
        )
        rows = [rows[number] for number in drawn]
        ids, captions = [f"ref{part.ref_ids[row]}" for row in rows], [part.sentences(row) for row in rows]
        return self._sample(index, picture, masks, ids, captions, passed)

    def load_all(self, index: int) -> RegionSample:
        """Read entry ``index`` with all its references of the split, in the order of their ids (for evaluation).

        Raises:
            SampleError: see the module; one bad reference makes the whole entry bad.
        """
        part, image, rows = self._entry(index)
        picture = read_picture(part.find_image(image), apply_exif=False)
        masks = [self._mask(part, image, row, picture.size) for row in rows]
        for row, mask in zip(rows, masks, strict=True):
            check_mask(mask, f"{part.folder}: ref {part.ref_ids[row]}")
        ids, captions = [f"ref{part.ref_ids[row]}" for row in rows], [part.sentences(row) for row in rows]
        return self._sample(index, picture, np.stack(masks), ids, captions)

    def _mask(self, part: _DatasetPart, image: int, row: int, size: tuple[int, int]) -> np.ndarray:
        """Return the mask (H, W) bool of the reference in ``row`` at the image's ``size``."""
        where = f"{part.folder}: ref {part.ref_ids[row]}"
        height, width = part.image_sizes[image].tolist()
        mask = decode_segmentation(json.loads(part.segmentations[row]), height, width, where, self._summed)
        return fit_mask(mask, size, where)

    def split_counts(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Return for every data set and split the numbers of images and of references."""
        return {
            part.label: {name: (len(part.entries(name)), len(part.rows_of_split(name))) for name in part.split_names}
            for part in self._parts
        }


class _DatasetPart:
    """One data set: the index of all its splits."""

    def __init__(self, label: str, root: Path, images: str | Path | None, index_dir: str | Path | None) -> None:
        name, _, split_by = label.partition(":")
        self.label, self.folder = label, root / name
        refs, instances = self.folder / f"refs({split_by or DEFAULT_SPLIT_BY[name]}).p", self.folder / "instances.json"
        for path in (refs, instances):
            if not path.is_file():
                raise layout_error(f"a file of {label} is missing", path, "nothing there", LAYOUT)
        what = "the folder of COCO images is missing (set refcoco_images where it is elsewhere)"
        is_shared = images is None and not (self.folder / IMAGE_FOLDER).is_dir()
        self.image_folder = find_part(
            root, images, IMAGE_FOLDER if is_shared else f"{name}/{IMAGE_FOLDER}", what, LAYOUT
        )
        # The number changes where the arrays do: since 2, classes are among them.
        key = {"kind": "refcoco", "refs": str(refs), "instances": str(instances), "version": 2}
        arrays = load_or_build(index_dir, key, lambda: build_index(refs, instances))
        self.image_ids, self.image_sizes = arrays["image_ids"], arrays["image_sizes"]
        self.ref_ids, self._ref_images, self._ref_splits = arrays["ref_ids"], arrays["ref_images"], arrays["ref_splits"]
        self.classes = arrays["ref_classes"]
        self._image_files = StringTable.from_arrays(arrays, "image_file")
        self.segmentations = StringTable.from_arrays(arrays, "segmentation")
        self._sentences = StringTable.from_arrays(arrays, "sentence")
        splits = StringTable.from_arrays(arrays, "split")
        self.split_names = splits.slice(0, len(splits))

    def rows_of_split(self, split: str) -> np.ndarray:
        """Return the rows (references) of ``split``, those of one image side by side."""
        number = self.split_names.index(split) if split in self.split_names else -1
        return np.flatnonzero(self._ref_splits == number)

    def entries(self, split: str) -> list[tuple[int, int, int]]:
        """Return (image, start, stop) for every image of ``split``; start and stop count :meth:`rows_of_split`."""
        images = self._ref_images[self.rows_of_split(split)]
        starts = np.flatnonzero(np.diff(images, prepend=-1))
        stops = np.append(starts[1:], len(images))
        return list(zip(images[starts].tolist(), starts.tolist(), stops.tolist(), strict=False))

    def sentences(self, row: int) -> tuple[str, ...]:
        """Return the sentences of the reference in ``row``."""
        return tuple(json.loads(self._sentences[row]))

    def find_image(self, number: int) -> Path:
        """Return the file of image ``number``, under its own name or either name of COCO."""
        return find_coco_image(self.image_folder, self._image_files[number], int(self.image_ids[number]))


def find_coco_image(folder: Path, name: str, image_id: int) -> Path:
    """Return the file of a COCO image below ``folder``, under its own ``name`` or either name of COCO.

    Raises:
        SampleError: ``missing_file``, or ``unsafe_path`` where the name leaves the folder.
    """
    names = (name, f"COCO_train2014_{image_id:012d}.jpg", f"{image_id:012d}.jpg")
    paths = [safe_join(folder, candidate) for candidate in names]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        expected = ", ".join(dict.fromkeys(names))
        message = explain("a COCO image is missing", str(folder), "none of the names", expected)
        raise SampleError("missing_file", message)
    return path


def open_parts(
    root: Path, datasets: Sequence[str], images: str | Path | None, index_dir: str | Path | None
) -> list[_DatasetPart]:
    """Open the asked data sets that have a folder, each once.

    Raises:
        ConfigError: a name is unknown, or none has a folder.
    """
    labels = []
    for dataset in datasets:
        name, _, split_by = dataset.partition(":")
        if name not in DEFAULT_SPLIT_BY:
            expected = ", ".join(DEFAULT_SPLIT_BY) + ", optionally with a split author, such as refcocog:google"
            raise ConfigError(explain("unknown RefCOCO data set", "refcoco_datasets", dataset, expected))
        labels.append(name if split_by in ("", DEFAULT_SPLIT_BY[name]) else dataset)
    labels = list(dict.fromkeys(labels))
    present = [label for label in labels if (root / label.partition(":")[0]).is_dir()]
    if not present:
        looked_for = ", ".join(f"{label.partition(':')[0]}/" for label in labels) or "an empty list of data sets"
        raise layout_error("the RefCOCO folder holds no data set", root, f"none of {looked_for}", LAYOUT)
    if len(present) < len(labels):
        absent = ", ".join(label for label in labels if label not in present)
        message = explain("RefCOCO data sets without a folder are left out", str(root), f"no folder for {absent}")
        warnings.warn(message, stacklevel=3)
    return [_DatasetPart(label, root, images, index_dir) for label in present]

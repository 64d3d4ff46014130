"""Reader of RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO: objects of COCO photographs with reference expressions.

Format: Yu et al. 2016, arXiv 1608.00272; Mao et al. 2016, arXiv 1511.02283; Liu et al. 2023, arXiv 2306.00968, for
gRefCOCO, whose expressions have one target, several (their union is the mask) or none (:data:`LAYOUT`). Images are
called ``COCO_train2014_<id>.jpg``, or by bare 12-digit names (train2017).
``refs(google).p`` is read only where it is asked for (``"refcocog:google"``): its splits share images.

An entry is one image of one data set with its references of one split, found through ``image_id``. COCO's masks are
drawn on the stored pixels, so an EXIF orientation is not applied unless ``data.exif`` says so.

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``not_an_image``,
``unsafe_path``, ``bad_polygon``, ``broken_rle``, ``size_mismatch``, ``wrong_annotation`` (unknown, or of another
image), ``empty_mask`` (:meth:`RefCoco.load_all`), ``no_region_left``.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dual_loop.data.captions import check_captions, is_plain
from dual_loop.data.coco_masks import mend_polygons
from dual_loop.data.images import read_picture
from dual_loop.data.index import load_or_build
from dual_loop.data.layout import find_part, layout_error
from dual_loop.data.masks import check_mask, decode_segmentation, fit_mask, safe_join
from dual_loop.data.names import DEFAULT_SPLIT_BY
from dual_loop.data.reader import Reader, take_regions
from dual_loop.data.refcoco_index import build_index, coco_names
from dual_loop.data.string_table import StringTable
from dual_loop.errors import ConfigError, bad_sample, explain
from dual_loop.types import NeededSize, RegionSample

LAYOUT = """
  root/
    refcoco/     instances.json   refs(unc).p
    refcoco+/    instances.json   refs(unc).p
    refcocog/    instances.json   refs(umd).p
    grefcoco/    instances.json   grefs(unc).json    (or grefs(unc).p; the rest may be refcoco's)
    (each with coco2014/train2014/*.jpg, or root/coco2014/train2014/*.jpg once)
"""

IMAGE_FOLDER = "coco2014/train2014"


class RefCoco(Reader):
    """The data sets as one source.

    Args (further ones are those of :class:`~dual_loop.data.reader.Reader`):
        root: folder that holds one folder per data set.
        datasets: names of :data:`DEFAULT_SPLIT_BY`, each optionally with a split author (``"refcocog:google"``). Those
            without a folder are left out with a warning; ``self.datasets`` has those that are used.
        split: ``train``, ``val``, ``testA``, ``testB`` or ``test``; a data set that lacks it adds no entry.
        images: where the images are, if not below ``root``: a path that exists, or a path below ``root``.
        polygons: ``union``, or ``summed`` (:func:`~dual_loop.data.coco_masks.decode_polygons`), for comparison alone.

    Raises:
        ConfigError: no data set, or a part of one, is there; a file has another structure; a pickle asks for a
            global; no data set has the split, or none of its images is there.
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
        # Columns: data set, image, first and last place among the references of the split.
        table = np.array(entries, np.int64)
        is_there = np.array([self._parts[number].image_there[image] for number, image, _, _ in entries])
        if not is_there.any():
            part = self._parts[entries[0][0]]
            name = part.image_files[entries[0][1]]
            what, fix = "no image of this split is there", "set refcoco_images to the folder of COCO's train2014"
            raise ConfigError(explain(what, str(part.image_folder), f"{len(entries):,} images lack", name, fix))
        asked = {part.folder.name for part in self._parts}
        unasked = [name for name in DEFAULT_SPLIT_BY if name not in asked and (self.root / name).is_dir()]
        self.left_out = {
            f"data sets that refcoco_datasets does not name ({', '.join(unasked)})": len(unasked),
            f"images of {split} that are not there": int((~is_there).sum()),
            "references to images that instances.json does not list": sum(part.num_unlisted for part in self._parts),
        }
        table = table[is_there]
        self._set_entries(np.arange(len(table)), max_samples, "refcoco_max_samples")
        self._entries = table[self._rows]
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
        """Return the image file."""
        part, image, _ = self._entry(index)
        return part.find_image(image)

    def _entry(self, index: int) -> tuple[_DatasetPart, int, list[int]]:
        """Return the data set of an entry, its image, and the rows of its references that have a target."""
        number, image, start, stop = self._entries[index].tolist()
        part, rows = self._parts[number], self._split_rows[number][start:stop]
        return part, image, rows[~part.no_target[rows]].tolist()

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
        """Read entry ``index`` with up to ``regions_per_image`` references that ``rng`` draws, with all sentences."""
        return self._load(index, rng, needed)

    def load_all(self, index: int) -> RegionSample:
        """Read entry ``index`` with all its references of the split, in the order of their ids (for evaluation).

        Raises:
            SampleError: see the module; the reason of the first reference where none can be used.
        """
        return self._load(index, None, None)

    def _load(self, index: int, rng: np.random.Generator | None, needed: NeededSize | None) -> RegionSample:
        """Read an entry with the references that ``rng`` draws, or all; those that cannot be used are passed over."""
        part, image, rows = self._entry(index)
        picture = read_picture(part.find_image(image), apply_exif=self.exif == "apply", needed=needed)
        names = [part.ref_names[row] for row in rows]

        def decode(number: int) -> np.ndarray:
            where = f"{part.folder}: {names[number]}"
            check_captions(part.sentences(rows[number]), where)
            mask = self._mask(part, image, rows[number], picture.size)
            check_mask(mask, where)
            return mask

        where, name_of = f"{self.root}: {self.entry_id(index)}", names.__getitem__
        if rng is None:
            taken = take_regions(range(len(rows)), decode, name_of)
        else:
            known = {"picture": lambda: picture, "classes": part.classes[rows].tolist()}
            taken = self._draw(rng, len(rows), decode, where, region_id=name_of, **known)
        if not taken.numbers:
            passed = taken.passed_over
            seen = passed[0].message if passed else "no reference with a target"
            reason = passed[0].reason if passed else "no_region_left"
            raise bad_sample(reason, "no region of an image is left", where, seen)
        number, _, start, stop = self._entries[index].tolist()
        drawn = [rows[number] for number in taken.numbers]
        rest = {row: part.sentences(row) for row in self._split_rows[number][start:stop].tolist() if row not in drawn}
        none = [text for row, texts in rest.items() if part.no_target[row] for text in texts if is_plain(text)]
        undrawn = [text for row, texts in rest.items() if not part.no_target[row] for text in texts]
        ids, captions = [names[number] for number in taken.numbers], [part.sentences(row) for row in drawn]
        sample = self._sample(index, picture, taken, ids, captions)
        return replace(sample, no_target=tuple(none), undrawn_captions=tuple(undrawn))

    def _mask(self, part: _DatasetPart, image: int, row: int, size: tuple[int, int]) -> np.ndarray:
        """Return the mask (H, W) bool of the reference in ``row`` at the image's ``size``."""
        where = f"{part.folder}: {part.ref_names[row]}"
        targets = json.loads(part.segmentations[row])
        if isinstance(targets, str):
            fix = "take refs and instances.json from the same release"
            raise bad_sample("wrong_annotation", "a reference has no mask", where, targets, fix=fix)
        stored = tuple(part.image_sizes[image].tolist())
        height, width = stored if all(stored) else size
        targets = [mend_polygons(target, where) for target in targets]
        masks = [decode_segmentation(target, height, width, where, self._summed) for target in targets]
        return fit_mask(np.logical_or.reduce(masks), size, where)

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
        stem = f"{'g' if name == 'grefcoco' else ''}refs({split_by or DEFAULT_SPLIT_BY[name]})"
        refs = _first_file([self.folder / f"{stem}{suffix}" for suffix in (".p", ".json")], label)
        folders = [name, "refcoco"] if name == "grefcoco" else [name]
        instances = _first_file([root / folder / "instances.json" for folder in folders], label)
        what = "the folder of COCO images is missing (set refcoco_images where it is elsewhere)"
        own = [f"{folder}/{IMAGE_FOLDER}" for folder in folders if (root / folder / IMAGE_FOLDER).is_dir()]
        self.image_folder = find_part(root, images, [*own, IMAGE_FOLDER][0], what, LAYOUT)
        # The number changes where the arrays do: since 3, several targets, and what cannot be used, are among them.
        key = {"kind": "refcoco", "refs": str(refs), "instances": str(instances), "images": str(self.image_folder)}
        arrays = load_or_build(
            index_dir, {**key, "version": 3}, lambda: build_index(refs, instances, self.image_folder)
        )
        self.image_ids, self.image_sizes = arrays["image_ids"], arrays["image_sizes"]
        self._ref_images, self._ref_splits = arrays["ref_images"], arrays["ref_splits"]
        self.classes, self.no_target = arrays["ref_classes"], arrays["ref_no_target"]
        self.image_there, self.num_unlisted = arrays["image_there"], int(arrays["num_unlisted"][0])
        names = ("image_file", "ref_name", "segmentation", "sentence", "split")
        tables = [StringTable.from_arrays(arrays, name) for name in names]
        self.image_files, self.ref_names, self.segmentations, self._sentences, splits = tables
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
        return find_coco_image(self.image_folder, self.image_files[number], int(self.image_ids[number]))


def _first_file(candidates: Sequence[Path], label: str) -> Path:
    """Return the first path that is a file."""
    for path in candidates:
        if os.path.isfile(path):
            return path
    others = sorted(path.name for path in candidates[0].parent.glob("*refs(*).*"))
    seen = "nothing there"
    if others and candidates[0].suffix == ".p":
        seen += f", but {', '.join(others)} (ask for {label.partition(':')[0]}:NAME of the split's author)"
    raise layout_error(f"a file of {label} is missing", candidates[0], seen, LAYOUT)


def find_coco_image(folder: Path, name: str, image_id: int) -> Path:
    """Return the file of a COCO image below ``folder``, under its own ``name`` or either name of COCO.

    Raises:
        SampleError: ``missing_file``, or ``unsafe_path`` where the name leaves the folder.
    """
    names = coco_names(name, image_id)
    for path in [safe_join(folder, candidate) for candidate in names]:
        if os.path.isfile(path):
            return path
    expected = ", ".join(dict.fromkeys(names))
    raise bad_sample("missing_file", "a COCO image is missing", str(folder), "none of the names", expected)


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

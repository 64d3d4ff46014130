"""Reader of RefCOCO, RefCOCO+ and RefCOCOg: objects of COCO photographs with reference expressions.

Layout (Yu et al. 2016, arXiv 1608.00272; Mao et al. 2016, arXiv 1511.02283)::

    root/
      refcoco/    instances.json, refs(unc).p,  coco2014/train2014/COCO_train2014_<id>.jpg
      refcoco+/   instances.json, refs(unc).p,  coco2014/train2014/...
      refcocog/   instances.json, refs(umd).p,  coco2014/train2014/...

The images may also be at ``root/coco2014/train2014`` once for all, and may have bare 12-digit names (train2017).
``refs(google).p`` is read only where it is asked for (``"refcocog:google"``): its splits share images.

An entry is one image of one data set with its references of one split. A ref's own ``file_name`` carries a suffix
``_<n>`` that no image has, so the image is found through ``image_id`` and ``instances.json``. COCO's masks are drawn
on the stored pixels, so an EXIF orientation is never applied. A sentence's ``sent`` is taken, else its ``raw``.

The ``.p`` files are pickles. They need dicts, lists, strings and numbers only, so the unpickler here refuses every
global; a file that asks for one is refused outright.

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``not_an_image``,
``unsafe_path``, ``bad_polygon``, ``broken_rle``, ``size_mismatch``, ``empty_mask`` (:meth:`RefCoco.load_all`),
``no_region_left``.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dual_loop.data.images import read_picture
from dual_loop.data.index import load_or_build
from dual_loop.data.index_file import StringTable, watch_files
from dual_loop.data.masks import (
    check_mask,
    decode_segmentation,
    decode_summed_polygons,
    fit_mask,
    safe_join,
)
from dual_loop.data.reader import check_root, choose_capped, layout_error
from dual_loop.errors import ConfigError, SampleError, explain
from dual_loop.types import NeededSize, RegionSample

LAYOUT = """
  root/
    refcoco/     instances.json   refs(unc).p
    refcoco+/    instances.json   refs(unc).p
    refcocog/    instances.json   refs(umd).p
    (each with coco2014/train2014/*.jpg, or root/coco2014/train2014/*.jpg once)
"""

DEFAULT_SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
IMAGE_FOLDER = "coco2014/train2014"


class RefCoco:
    """The three data sets as one :class:`~dual_loop.types.RegionSource`.

    Args:
        root: folder that holds one folder per data set.
        datasets: names of :data:`DEFAULT_SPLIT_BY`, each optionally with a split author (``"refcocog:google"``). Those
            without a folder are left out with a warning; ``self.datasets`` has those that are used.
        split: ``train``, ``val``, ``testA``, ``testB`` or ``test``; a data set that lacks it adds no entry.
        max_samples: keep this many entries, drawn with a fixed seed; None keeps all.
        regions_per_image: most references of one sample.
        images: where the images are, if not below ``root``: a path that exists, or a path below ``root``.
        index_dir: see :func:`~dual_loop.data.index.load_or_build`.
        polygons: ``union``, or ``summed`` (:func:`~dual_loop.data.masks.decode_summed_polygons`), for comparison alone.

    Raises:
        ConfigError: no data set, or a part of one, is there; a file has another structure; a pickle asks for a
            global; no data set has the split.
    """

    name = "refcoco"

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
        self.root = check_root(root, "RefCOCO", LAYOUT)
        self.split = split
        self.regions_per_image = regions_per_image
        self._decode = decode_summed_polygons if polygons == "summed" else decode_segmentation
        self._parts = [
            _DatasetPart(label, self.root, images, index_dir) for label in _present_datasets(self.root, datasets)
        ]
        self.datasets = tuple(part.label for part in self._parts)
        entries = [
            (number, *entry) for number, part in enumerate(self._parts) for entry in part.entries_of_split(split)
        ]
        if not entries:
            expected = ", ".join(f"{part.label}: {', '.join(part.split_names)}" for part in self._parts)
            fix = "set the split of RefCOCO to one that exists"
            raise ConfigError(explain("no RefCOCO data set has this split", str(self.root), split, expected, fix))
        table = np.array(entries, np.int64)  # columns: data set, image, first and last row of the split's references
        self._entries = table[choose_capped(len(table), max_samples, "refcoco_max_samples")]

    def __len__(self) -> int:
        return len(self._entries)

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

    def _entry(self, index: int) -> tuple[_DatasetPart, int, np.ndarray]:
        number, image, start, stop = (int(value) for value in self._entries[index])
        part = self._parts[number]
        return part, image, part.rows_of_split(self.split)[start:stop]

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Return :meth:`load_reduced` with the image in full.

        Raises:
            SampleError: see the module.
        """
        return self.load_reduced(index, rng, None)

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
        """Read entry ``index`` with up to ``regions_per_image`` references drawn by ``rng``, with all their sentences.

        An empty mask is replaced by the next drawn; any other fault makes the whole sample bad.

        Raises:
            SampleError: see the module.
        """
        _, _, rows = self._entry(index)
        sample = self._read(index, rows[rng.permutation(len(rows))], self.regions_per_image, True, needed)
        if sample is None:
            seen, expected = f"{len(rows)} references, all with empty masks", "one with a pixel or more"
            message = explain("no region of an image is left", f"{self.root}: {self.entry_id(index)}", seen, expected)
            raise SampleError("no_region_left", message)
        return sample

    def load_all(self, index: int) -> RegionSample:
        """Read entry ``index`` with all its references of the split, in the order of their ids (for evaluation).

        Raises:
            SampleError: see the module; one bad reference makes the whole entry bad.
        """
        _, _, rows = self._entry(index)
        sample = self._read(index, rows, len(rows), pass_over_empty=False)
        assert sample is not None, "an entry has at least one reference"
        return sample

    def split_counts(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Return for every data set and split the numbers of images and of references."""
        return {
            part.label: {
                split: (len(part.entries_of_split(split)), len(part.rows_of_split(split))) for split in part.split_names
            }
            for part in self._parts
        }

    def iter_sentences(self) -> Iterator[tuple[int, int, str]]:
        """Yield (entry index, ref_id, sentence) for every sentence of the split: the unit of RefCOCO's scores."""
        for index in range(len(self)):
            part, _, rows = self._entry(index)
            for row in rows:
                for sentence in part.sentences(int(row)):
                    yield index, int(part.ref_ids[row]), sentence

    def _read(
        self, index: int, rows: np.ndarray, limit: int, pass_over_empty: bool, needed: NeededSize | None = None
    ) -> RegionSample | None:
        part, image_number, _ = self._entry(index)
        picture = read_picture(part.find_image(image_number), apply_exif=False, needed=needed)
        chosen, masks = [], []
        for row in rows.tolist():
            where = f"{part.folder}: ref {part.ref_ids[row]}"
            mask = part.decode_mask(row, image_number, picture.size, where, self._decode)
            if pass_over_empty and not mask.any():
                continue
            check_mask(mask, where)
            chosen.append(row)
            masks.append(mask)
            if len(chosen) == limit:
                break
        if not chosen:
            return None
        return RegionSample(
            source=self.name,
            sample_id=self.entry_id(index),
            image=picture.pixels,
            masks=np.stack(masks),
            region_ids=tuple(f"ref{part.ref_ids[row]}" for row in chosen),
            captions=tuple(part.sentences(row) for row in chosen),
            image_reduction=picture.reduction,
        )


class _DatasetPart:
    """One data set: the index of all its splits, and how to read an image and a mask of it."""

    def __init__(self, label: str, root: Path, images: str | Path | None, index_dir: str | Path | None) -> None:
        name, _, split_by = label.partition(":")
        self.label = label
        self.folder = root / name
        self.refs_path = self.folder / f"refs({split_by or DEFAULT_SPLIT_BY[name]}).p"
        self.instances_path = self.folder / "instances.json"
        for path in (self.refs_path, self.instances_path):
            if not path.is_file():
                raise layout_error(f"a file of {label} is missing", path, "nothing there", LAYOUT)
        self.image_folder = _find_images(root, self.folder, images)
        key = {"kind": "refcoco", "refs": str(self.refs_path), "instances": str(self.instances_path)}
        arrays = load_or_build(index_dir, key, lambda: _build_index(self.refs_path, self.instances_path))
        self.image_ids, self._image_sizes = arrays["image_ids"], arrays["image_sizes"]
        self.ref_ids, self._ref_images, self._ref_splits = arrays["ref_ids"], arrays["ref_images"], arrays["ref_splits"]
        self._image_files = StringTable.from_arrays(arrays, "image_file")
        self._segmentations = StringTable.from_arrays(arrays, "segmentation")
        self._sentences = StringTable.from_arrays(arrays, "sentence")
        splits = StringTable.from_arrays(arrays, "split")
        self.split_names = [splits[number] for number in range(len(splits))]
        self._rows: dict[str, np.ndarray] = {}

    def rows_of_split(self, split: str) -> np.ndarray:
        """Return the rows (references) of ``split``, those of one image side by side."""
        if split not in self._rows:
            number = self.split_names.index(split) if split in self.split_names else -1
            self._rows[split] = np.flatnonzero(self._ref_splits == number)
        return self._rows[split]

    def entries_of_split(self, split: str) -> list[tuple[int, int, int]]:
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

    def decode_mask(
        self,
        row: int,
        image_number: int,
        size: tuple[int, int],
        where: str,
        decode: Callable[[Any, int, int, str], np.ndarray],
    ) -> np.ndarray:
        """Return the mask (H, W) bool of the reference in ``row`` at the image's ``size``."""
        height, width = (int(side) for side in self._image_sizes[image_number])
        mask = decode(json.loads(self._segmentations[row]), height, width, where)
        return fit_mask(mask, size, where)


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


def held_out_images(
    root: Path, datasets: Sequence[str], images: str | Path | None = None, index_dir: str | Path | None = None
) -> Iterator[tuple[int, str, Path | None]]:
    """Yield (COCO id, ``<data set> <split>``, file or None) of every image in a split that is not ``train``."""
    for label in _present_datasets(root, datasets):
        part = _DatasetPart(label, root, images, index_dir)
        for split in part.split_names:
            if split == "train":
                continue
            for number, _, _ in part.entries_of_split(split):
                try:
                    path = part.find_image(number)
                except SampleError:
                    path = None
                yield int(part.image_ids[number]), f"{label} {split}", path


# --- finding the parts -----------------------------------------------------------------------------------------------


def _present_datasets(root: Path, datasets: Sequence[str]) -> list[str]:
    """Return the labels of the asked data sets that have a folder, without repeats.

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
    return present


def _find_images(root: Path, folder: Path, given: str | Path | None) -> Path:
    candidates = [folder / IMAGE_FOLDER, root / IMAGE_FOLDER]
    if given is not None:
        candidates = [Path(given).expanduser().absolute(), root / given]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    what = "the folder of COCO images is missing (set refcoco_images where it is elsewhere)"
    raise layout_error(what, candidates[0], f"neither it nor {candidates[1]}", LAYOUT)


# --- building the index ----------------------------------------------------------------------------------------------


class _PlainUnpickler(pickle.Unpickler):
    """Loads dicts, lists, strings and numbers; refuses everything that needs a global."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"asks for the global {module_name}.{global_name}")


def load_refs(path: Path) -> list[dict[str, Any]]:
    """Read a ``refs(...).p`` file of Python 2 or 3 without running anything in it; return its checked records.

    Raises:
        ConfigError: the pickle asks for a global (refused, as it could run any code), is damaged, or has another
            structure.
    """
    fix = "do not use this file; get the refs from their original source"
    try:
        refs = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        expected = "a pickle of dicts, lists, strings and numbers alone"
        raise ConfigError(explain("a refs file was refused", str(path), str(error), expected, fix)) from error
    except Exception as error:  # damaged pickles raise nearly anything, MemoryError and RecursionError among them
        seen = f"{type(error).__name__}: {error}"
        fix = "copy or download it again"
        raise ConfigError(explain("a refs file is damaged", str(path), seen, "a complete pickle", fix)) from error
    if not isinstance(refs, list) or not refs:
        seen = type(refs).__name__ if refs else "an empty list"
        raise ConfigError(explain("a refs file has another structure", str(path), seen, "a list of references", fix))
    for number, ref in enumerate(refs):
        _check_ref(ref, f"{path}, reference {number}")
    return refs


def _check_ref(ref: Any, where: str) -> None:
    expected = "ref_id, ann_id, image_id (integers), split (string), sentences (list of {sent or raw: string})"
    sound = isinstance(ref, dict) and isinstance(ref.get("split"), str) and isinstance(ref.get("sentences"), list)
    sound = sound and all(type(ref.get(key)) is int for key in ("ref_id", "ann_id", "image_id"))
    if not sound or not all(isinstance(s, dict) and isinstance(_text_of(s), str) for s in ref["sentences"]):
        seen = f"{str(ref)[:80]}..."
        raise ConfigError(explain("a reference has another structure", where, seen, expected, "get the file again"))


def _text_of(sentence: Mapping[str, Any]) -> Any:
    return sentence.get("sent", sentence.get("raw"))


def _build_index(refs_path: Path, instances_path: Path) -> dict[str, np.ndarray]:
    """Join references, annotations and images into arrays; rows are sorted by image, then by ref_id."""
    watched = watch_files([refs_path, instances_path])
    images, annotations = _read_instances(instances_path)
    refs = sorted(load_refs(refs_path), key=lambda ref: (ref["image_id"], ref["ref_id"]))
    for ref in refs:
        for key, known in (("image_id", images), ("ann_id", annotations)):
            if ref[key] not in known:
                what, where = f"a reference names an unknown {key}", f"{refs_path}, ref_id {ref['ref_id']}"
                expected = f"an id of {instances_path}"
                fix = "take both files from the same release"
                raise ConfigError(explain(what, where, ref[key], expected, fix))
    image_ids = sorted({ref["image_id"] for ref in refs})
    image_numbers = {image_id: number for number, image_id in enumerate(image_ids)}
    splits = sorted({ref["split"] for ref in refs})
    sentences = [[text for s in ref["sentences"] if (text := _text_of(s).strip())] for ref in refs]
    return {
        "image_ids": np.array(image_ids, np.int64),
        "image_sizes": np.array([images[i][1:] for i in image_ids], np.int64).reshape(-1, 2),
        "ref_ids": np.array([ref["ref_id"] for ref in refs], np.int64),
        "ref_images": np.array([image_numbers[ref["image_id"]] for ref in refs], np.int64),
        "ref_splits": np.array([splits.index(ref["split"]) for ref in refs], np.int64),
        **StringTable.from_strings(images[i][0] for i in image_ids).to_arrays("image_file"),
        **StringTable.from_strings(splits).to_arrays("split"),
        **StringTable.from_strings(json.dumps(annotations[ref["ann_id"]]) for ref in refs).to_arrays("segmentation"),
        **StringTable.from_strings(json.dumps(texts) for texts in sentences).to_arrays("sentence"),
        **watched,
    }


def _read_instances(path: Path) -> tuple[dict[int, tuple[str, int, int]], dict[int, Any]]:
    """Return {image id: (file name, height, width)} and {annotation id: segmentation} of a COCO file.

    Raises:
        ConfigError: it is damaged or has another structure.
    """
    fix = "copy or download instances.json again"
    try:
        with open(path, encoding="utf-8") as file:
            tree = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        seen = f"{type(error).__name__}: {error}"
        raise ConfigError(explain("instances.json is damaged", str(path), seen, "complete JSON", fix)) from error
    try:
        images = {
            int(image["id"]): (str(image["file_name"]), int(image["height"]), int(image["width"]))
            for image in tree["images"]
        }
        annotations = {int(item["id"]): item["segmentation"] for item in tree["annotations"]}
    except (KeyError, TypeError, ValueError) as error:
        seen = f"{type(error).__name__}: {error}"
        expected = "images with id, file_name, height, width; annotations with id, segmentation"
        raise ConfigError(explain("instances.json has another structure", str(path), seen, expected, fix)) from error
    return images, annotations

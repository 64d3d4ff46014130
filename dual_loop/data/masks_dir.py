"""Reader of a user's own images and masks, with or without captions: one folder, three ways to store the masks.

PNG files (every mask file lies under the image's name)::

    root/images/cat.jpg
    root/masks/cat.png            one object (0 and 255, or 0 and 1), or a map of labels: palette, or grey without 255
    root/masks/cat/left_ear.png   or a folder of masks, one object each
    root/captions.json            optional: {"cat": "a grey cat", "cat/left_ear": ["the left ear", "its left ear"],
                                  "cat#2": "label 2 of the map"}

COCO JSON (one ``*.json`` with ``images`` and ``annotations`` beside ``images/``; ``caption`` or ``captions`` of an
annotation are read), or lines of JSON, one object each (``*.jsonl``)::

    {"image": "images/cat.jpg", "segmentation": RLE or polygons, "caption": "a grey cat", "id": "7"}

``caption`` (or ``captions``, a list) and ``id`` are optional. ``root`` may also be the ``.json`` or ``.jsonl`` file
itself. Names of images are looked up below ``images`` where that is given, else below the root, else below its
``images/``. The lines that ``dual-loop audit`` writes are read back this way.

Masks are drawn on the stored pixels; where they fit only the image turned as its EXIF says, it is turned. Masks may
differ from their image by 2 pixels a side (:func:`~dual_loop.data.masks.fit_mask`).

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``not_an_image``,
``unsafe_path``, ``ambiguous_mask``, ``bad_polygon``, ``broken_rle``, ``broken_json``, ``size_mismatch``,
``no_region_left``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict, cast

import numpy as np

from dual_loop.data.captions import check_captions
from dual_loop.data.images import foreground_of, open_image_file, read_picture
from dual_loop.data.index import Key, list_tree, load_or_build
from dual_loop.data.index_file import watch_files
from dual_loop.data.layout import check_root, layout_error
from dual_loop.data.limits import open_file, parse_json, read_file, read_lines
from dual_loop.data.masks import SIZE_TOLERANCE, check_mask, decode_rle, decode_segmentation, fit_mask, safe_join
from dual_loop.data.reader import Reader
from dual_loop.data.string_table import StringTable
from dual_loop.errors import ConfigError, SampleError, explain, shorten
from dual_loop.types import NeededSize, RegionSample, SkippedRegion

LAYOUT = """
  root/images/<name>.jpg                   root/images/...            root/images/...
  root/masks/<name>.png        or          root/annotations.json or   root/masks.jsonl
  root/masks/<name>/<object>.png           (COCO)                     (one object a line)
"""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
CAPTIONS_NAME = "captions.json"
_LINE_EXPECTED = '{"image": "images/a.jpg", "segmentation": {...} or [[...]], "caption": "..."}'


class Region(TypedDict, total=False):
    """One object of an image: a mask file (and its label in it), or a COCO segmentation, of an image of ``size``."""

    id: str
    image: str
    mask: str
    label: int | None
    segmentation: object
    size: list[int]
    category_id: int | str
    caption: str | list[str]
    captions: str | list[str]


class MasksDir(Reader):
    """A user's own masks; an entry is an image with its objects.

    Args (further ones are those of :class:`~dual_loop.data.reader.Reader`):
        root: the folder, or a COCO ``.json`` or ``.jsonl`` file.
        images: folder that the images' names are looked up in; None looks below ``root``.

    Raises:
        ConfigError: the root holds none of the three layouts, or two of them; a file of it has another structure.
    """

    name, title, layout = "masks", "masks", LAYOUT

    def __init__(
        self,
        root: str | Path,
        max_samples: int | None = None,
        regions_per_image: int = 1,
        min_area: float = 0.0,
        max_area: float = 1.0,
        images: str | Path | None = None,
        index_dir: str | Path | None = None,
        void: int | None = 255,
        crowds: bool = False,
        allow_absolute_paths: bool = False,
    ) -> None:
        folder, self.file = _find_layout(Path(root).expanduser())
        super().__init__(folder, index_dir, regions_per_image, min_area, max_area)
        self.image_root = self.root if images is None else check_root(images, "images", LAYOUT)
        # The number changes where the arrays do: since 3, records of COCO files have their class.
        key = {"kind": "masks", "root": str(self.root), "file": self.file and str(self.file), "version": 3}
        arrays = load_or_build(index_dir, key, lambda: self._build_index(key))
        self._images = StringTable.from_arrays(arrays, "image")
        self._regions = StringTable.from_arrays(arrays, "region")
        self._starts = arrays["starts"]
        if not len(self._images):
            raise layout_error("the folder holds no image with a mask", self.root, "no pair of the same name", LAYOUT)
        self._set_entries(np.arange(len(self._images)), max_samples, "masks_max_samples", self._images)

    def _build_index(self, key: Key) -> dict[str, np.ndarray]:
        """Return images, and the regions of each as JSON: a record, or where its line is (offset, length in bytes)."""
        if self.file is None:
            files, watched = list_tree(self.root, (*IMAGE_SUFFIXES, ".json"), self.index_dir, key)
            regions = dict(_pair_png_files(files, self.root))
        else:
            watched = watch_files([self.file])
            regions = _coco_regions(self.file) if self.file.suffix == ".json" else _line_places(self.file)
        names = sorted(regions)
        return {
            **StringTable.from_strings(names).to_arrays("image"),
            **StringTable.from_strings(region for name in names for region in regions[name]).to_arrays("region"),
            "starts": np.cumsum([0, *(len(regions[name]) for name in names)], dtype=np.int64),
            **watched,
        }

    def entry_id(self, index: int) -> str:
        """Return the image's name without its suffix and without a leading ``images/``."""
        return self._images[int(self._rows[index])].rsplit(".", 1)[0].removeprefix("images/")

    def image_path(self, index: int) -> Path:
        """Return the image file of entry ``index``.

        Raises:
            SampleError: ``unsafe_path`` or ``missing_file``.
        """
        name = self._images[int(self._rows[index])]
        paths = [safe_join(self.image_root, name), safe_join(self.image_root / "images", name)]
        for path in paths:
            if path.is_file():
                return path
        expected, fix = " or ".join(map(str, paths)), "set --masks_images"
        raise SampleError("missing_file", explain("an image is missing", name, "nothing there", expected, fix))

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
        """Read image ``index`` with up to ``regions_per_image`` objects drawn by ``rng``.

        Objects that are empty, outside the limits or unusable are passed over.
        """
        row = int(self._rows[index])
        start, stop = self._starts[row : row + 2].tolist()
        path = self.image_path(index)
        picture = read_picture(path, apply_exif=False, needed=needed)
        found: dict[int, tuple[str, tuple[str, ...]]] = {}

        def name(number: int) -> str:
            return str(self._region(start + number).get("id", f"at{number}"))

        def decode(number: int) -> np.ndarray:
            nonlocal picture
            region = self._region(start + number)
            where = f"{self.file or self.root}: {name(number)} of {path.name}"
            texts = _texts(region, where)
            check_captions(texts, where)
            mask = self._mask(region, picture.size, where)
            if not found and not _fits(mask, picture.size):
                turned = read_picture(path, apply_exif=True)
                picture = turned if _fits(mask, turned.size) else picture
            mask = fit_mask(mask, picture.size, where)
            found[number] = name(number), texts
            return mask

        is_hard = self.region_choice == "hard"
        classes = [self._region(row).get("category_id") for row in range(start, stop)] if is_hard else []
        passed: list[SkippedRegion] = []
        drawn, masks = self._draw(
            rng,
            stop - start,
            decode,
            str(path),
            picture=lambda: picture,
            classes=classes,
            passed_over=passed,
            region_id=name,
        )
        ids, captions = [found[number][0] for number in drawn], [found[number][1] for number in drawn]
        ids = ids if len(set(ids)) == len(ids) else [f"{name}_{k}" for k, name in enumerate(ids)]
        return self._sample(index, picture, masks, ids, captions, passed)

    def _region(self, number: int) -> Region:
        record = json.loads(self._regions[number])
        if self.file is None or self.file.suffix == ".json":
            return cast(Region, record)
        offset, length = record
        with open_file(self.file) as stream:
            stream.seek(offset)
            return _parse_line(stream.read(length), f"{self.file}, byte {offset}")

    def _mask(self, region: Region, size: tuple[int, int], where: str) -> np.ndarray:
        if "mask" in region:
            values, _ = _mask_values(safe_join(self.root, region["mask"]))
            label = region.get("label")
            return np.ascontiguousarray(values > 0 if label is None else values == label)
        segmentation = region.get("segmentation")
        if isinstance(segmentation, Mapping):
            return decode_rle(segmentation, where)
        height, width = region.get("size", size)
        return decode_segmentation(segmentation, int(height), int(width), where)


# --- finding out what is there ---------------------------------------------------------------------------------------


def _find_layout(root: Path) -> tuple[Path, Path | None]:
    """Return the folder, and the ``.json`` or ``.jsonl`` file that lists the masks, None where they are PNG files.

    Raises:
        ConfigError: none of the layouts is there, or more than one could be meant.
    """
    if root.is_file():
        if root.suffix not in (".json", ".jsonl"):
            raise layout_error("a file of masks has an unknown kind", root, root.suffix or "no suffix", LAYOUT)
        return check_root(root.parent, "masks", LAYOUT), root.absolute()
    folder = check_root(root, "masks", LAYOUT)
    lists = sorted([*folder.glob("*.jsonl"), *(p for p in folder.glob("*.json") if p.name != CAPTIONS_NAME)])
    if (folder / "masks").is_dir() and not lists:
        return folder, None
    if len(lists) == 1 and not (folder / "masks").is_dir():
        return folder, lists[0]
    seen = ", ".join(path.name for path in lists) or "no masks/, no .json, no .jsonl"
    if (folder / "masks").is_dir():
        seen = f"masks/ and {seen}"
    raise layout_error("it is not clear where the masks are (give one file to say which)", folder, seen, LAYOUT)


def _pair_png_files(files: list[str], root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (image, its regions as JSON) for the images that have masks.

    Raises:
        ConfigError: captions cannot be read, or belong to no mask.
    """
    captions = _read_captions(root / CAPTIONS_NAME)
    images = {f.removeprefix("images/").rsplit(".", 1)[0]: f for f in files if f.startswith("images/")}
    masks: dict[str, list[str]] = {}
    for file in files:
        if file.startswith("masks/") and file.endswith(".png"):
            stem = _stem_of(file)
            owner = stem if stem in images else stem.rpartition("/")[0]
            if owner in images:
                masks.setdefault(owner, []).append(file)
    unused = set(captions)
    for owner, found in masks.items():
        regions: list[str] = []
        for file in found:
            labels: list[int] | list[None] = [None]  # also of damaged files, which fail when they are loaded
            with contextlib.suppress(SampleError):
                _, labels = _mask_values(root / file)
            for label in labels:
                name = _stem_of(file) + ("" if label is None else f"#{label}")
                unused.discard(name)
                region: Region = {"id": name.removeprefix(f"{owner}/"), "mask": file, "label": label}
                regions.append(json.dumps({**region, "captions": captions.get(name, [])}))
        yield images[owner], regions
    if unused:
        seen = f"{len(unused)} names without a mask: {', '.join(sorted(unused)[:3])}"
        expected = "names of mask files below masks/, without .png (of a map of labels: name#label)"
        fix = "rename them, or remove them"
        raise ConfigError(explain("captions belong to no mask", str(root / CAPTIONS_NAME), seen, expected, fix))


def _stem_of(file: str) -> str:
    return file.removeprefix("masks/").removesuffix(".png")


def _mask_values(path: Path) -> tuple[np.ndarray, list[int] | list[None]]:
    """Return the stored values (H, W) and the labels of a map of several objects, ``[None]`` for the mask of one.

    Raises:
        SampleError: ``ambiguous_mask`` where 255 stands beside other grey values (anti-aliased edges, as a rule).
    """
    image = open_image_file(path)
    values: np.ndarray = np.asarray(image)
    if values.ndim == 3:
        return foreground_of(image), [None]
    labels = [value for value in np.unique(values).tolist() if value > 0]
    if image.mode == "1" or len(labels) <= 1:
        return values, [None]
    if image.mode != "P" and 255 in labels:
        seen, expected = f"{len(labels)} grey values and 255", "0 and 255, or labels below 255"
        fix = "threshold the mask, or save labels as a palette image"
        what = "a mask is neither binary nor labels"
        raise SampleError("ambiguous_mask", explain(what, str(path), seen, expected, fix))
    return values, [int(label) for label in labels]


def read_mask_file(path: Path) -> list[tuple[str, np.ndarray]]:
    """Return the objects of a mask file: (name, (H, W) bool) each, one for a mask, one a label for a map of labels.

    Raises:
        SampleError: ``missing_file``, ``truncated_file``, ``not_an_image``, ``ambiguous_mask``, ``empty_mask``.
    """
    values, labels = _mask_values(path)
    check_mask(values > 0, str(path))
    return [(path.stem, values > 0) if label is None else (f"{path.stem}#{label}", values == label) for label in labels]


def _read_captions(path: Path) -> dict[str, str | list[str]]:
    if not path.is_file():
        return {}
    try:
        captions = parse_json(read_file(path))
    except (OSError, ValueError) as error:
        raise ConfigError(explain("captions cannot be read", str(path), str(error), "JSON")) from error
    if not isinstance(captions, dict) or not all(_is_caption(value) for value in captions.values()):
        expected = '{"mask name": "text" or ["text", "text"]}'
        raise ConfigError(explain("captions have another structure", str(path), shorten(captions), expected))
    return captions


def _is_caption(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _texts(region: Region, where: str) -> tuple[str, ...]:
    given = region.get("captions", region.get("caption"))
    if given is None:
        return ()
    if not _is_caption(given):
        expected = "text, or a list of texts"
        raise SampleError("broken_json", explain("a caption is no text", where, shorten(given), expected))
    texts = [given] if isinstance(given, str) else given
    return tuple(text.strip() for text in texts if text.strip())


def _coco_regions(path: Path) -> dict[str, list[str]]:
    """Return for each image its regions as JSON."""
    try:
        tree = parse_json(read_file(path))
        images = {image["id"]: image for image in tree["images"]}
        found: dict[str, list[str]] = {}
        for item in tree["annotations"]:
            image = images[item["image_id"]]
            region = {key: item[key] for key in ("segmentation", "category_id", "caption", "captions") if key in item}
            region |= {"id": str(item["id"]), "size": [int(image["height"]), int(image["width"])]}
            found.setdefault(str(image["file_name"]), []).append(json.dumps(region))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        expected = "images with id, file_name, height, width; annotations with id, image_id, segmentation"
        raise ConfigError(explain("not a COCO file", str(path), error, expected, "mend or replace it")) from error
    return found


def _line_places(path: Path) -> dict[str, list[str]]:
    """Return for each image where its lines are, as JSON: offset and length in bytes."""
    found: dict[str, list[str]] = {}
    offset = 0
    try:
        with open_file(path) as stream:
            for number, raw in enumerate(read_lines(stream), start=1):
                if raw.strip():
                    record = _parse_line(raw, f"{path}, line {number}")
                    found.setdefault(record["image"], []).append(f"[{offset}, {len(raw)}]")
                offset += len(raw)
    except OSError as error:
        raise ConfigError(explain("lines cannot be read", str(path), error, _LINE_EXPECTED)) from error
    except SampleError as error:
        raise ConfigError(str(error)) from error
    return found


def _parse_line(raw: bytes, where: str) -> Region:
    try:
        record = parse_json(raw)
    except ValueError as error:
        raise SampleError("broken_json", explain("a line is not JSON", where, str(error), _LINE_EXPECTED)) from error
    if not isinstance(record, dict) or not isinstance(record.get("image"), str) or "segmentation" not in record:
        seen = raw[:80].decode("utf-8", "replace")
        raise SampleError("broken_json", explain("a line lacks its keys", where, seen, _LINE_EXPECTED))
    return cast(Region, record)


def _fits(mask: np.ndarray, size: tuple[int, int]) -> bool:
    return all(abs(a - b) <= SIZE_TOLERANCE for a, b in zip(mask.shape, size, strict=True))

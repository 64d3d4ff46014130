"""Reader of a user's own images and masks, with or without captions: one folder, several ways to store the masks.

Mask files (every one lies under the image's name; what its values mean: :mod:`~dual_loop.data.mask_files`)::

    root/images/cat.jpg
    root/masks/cat.png            one object, or a map of labels or colours
    root/masks/cat/left_ear.png   or a folder of masks, one object each
    root/captions.json            optional: {"cat": "a grey cat", "cat/left_ear": ["the left ear", "its left ear"],
                                  "cat#2": "label 2 of the map"}

Lists (:mod:`~dual_loop.data.own_lists`): COCO JSON (one ``*.json``, or ``annotations/instances_*.json``), lines of JSON
(``*.jsonl``), labelme (a JSON a picture), YOLO's polygons (``labels/*.txt``)::

    {"image": "images/cat.jpg", "segmentation": RLE or polygons, "caption": "a grey cat", "id": "7"}

``caption`` (or ``captions``, a list) and ``id`` are optional. ``root`` may also be the ``.json`` or ``.jsonl`` file
itself. Names of images are looked up below ``images`` where that is given, else below the root, else below its
``images/``, and in folders called like the split. The lines that ``dual-loop audit`` writes are read back this way.

What is there and is no entry is counted in ``left_out``. Images that are listed and not there are left out as long as
others are there. An image that its masks fit only as its EXIF turns it is turned; where both fit, ``data.exif``
decides, with a warning. Masks may differ from their image by 2 pixels a side.

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``not_an_image``,
``too_large``, ``unsafe_path``, ``ambiguous_mask``, ``bad_polygon``, ``broken_rle``, ``broken_json``,
``size_mismatch``, ``special_token``, ``no_region_left``.
"""

from __future__ import annotations

import functools
import json
import math
import os
import posixpath
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np

from dual_loop.data.captions import check_captions
from dual_loop.data.coco_masks import mend_polygons
from dual_loop.data.images import read_picture
from dual_loop.data.index import Key, join_parts, list_tree, load_or_build
from dual_loop.data.index_file import watch_files
from dual_loop.data.layout import check_root, layout_error
from dual_loop.data.limits import SAMPLE_BYTES, open_file, parse_json, read_file
from dual_loop.data.mask_files import MASK_SUFFIXES, MaskFile, read_mask
from dual_loop.data.masks import SIZE_TOLERANCE, check_mask, decode_rle, decode_segmentation, fit_mask, safe_join
from dual_loop.data.own_lists import Listing, Region, parse_line, read_coco, read_jsonl, read_labelme, read_yolo
from dual_loop.data.reader import Reader
from dual_loop.data.string_table import StringTable
from dual_loop.errors import ConfigError, SampleError, bad_sample, explain, listed, shorten
from dual_loop.types import NeededSize, RegionSample

LAYOUT = """
  root/images/<name>.jpg                   root/images/...            root/images/...
  root/masks/<name>.png        or          root/annotations.json or   root/masks.jsonl
  root/masks/<name>/<object>.png           (COCO)                     (one object a line)
  (or a labelme JSON beside each image, or YOLO's root/labels/<name>.txt)
"""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
VAL_SEED = 7
"""Draws the images that ``left_to_val`` leaves out: the same ones in every run on these masks."""
CAPTIONS_NAME = "captions.json"
MASK_FILES, COCO, LINES, LABELME, YOLO = "mask files", "COCO", "lines of JSON", "labelme", "YOLO"


class MasksDir(Reader):
    """A user's own masks; an entry is an image with its objects.

    Args (further ones are those of :class:`~dual_loop.data.reader.Reader`):
        root: the folder, or a COCO ``.json`` or ``.jsonl`` file.
        images: folder that the images' names are looked up in; None looks below ``root``.
        void: label that is no object beside others; None: every label is one. crowds: take COCO's crowds for objects.
        allow_absolute_paths: open images that are listed by absolute path.
        left_to_val: share of the images that is left out, which share does not depend on the other settings.
        is_val: take that share, and no other image.

    Raises:
        ConfigError: the root holds none of the layouts, or two of them; a file of it has another structure.
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
        left_to_val: float = 0.0,
        is_val: bool = False,
    ) -> None:
        folder, self.file, self.kind = _find_layout(Path(root).expanduser())
        super().__init__(folder, index_dir, regions_per_image, min_area, max_area)
        self.image_root = self.root if images is None else check_root(images, "images", LAYOUT)
        self.void, self.crowds, self.allow_absolute_paths = void, crowds, allow_absolute_paths
        # The number changes where the arrays do: since 4, an index counts what it leaves out.
        key: dict[str, object] = {"kind": "masks", "root": str(self.root), "file": self.file and str(self.file)}
        options = [self.kind, void, crowds, allow_absolute_paths]
        key |= {"version": 4, "images": str(self.image_root), "options": options}
        arrays = load_or_build(index_dir, key, lambda: self._build_index(key))
        self._images = StringTable.from_arrays(arrays, "image")
        self._regions = StringTable.from_arrays(arrays, "region")
        self._starts, (self.num_captioned, num_named) = arrays["starts"], arrays["counts"].tolist()
        self.has_class_names = num_named > 0
        self.left_out = json.loads(StringTable.from_arrays(arrays, "left_out")[0])
        if not len(self._images):
            seen = listed([f"{count} {what}" for what, count in self.left_out.items()]) or "no image"
            raise layout_error("the folder holds no image with a mask", self.root, seen, LAYOUT)
        self.contents = f"{len(self._images):,} images, {len(self._regions):,} regions, {self.num_captioned:,} of them "
        self.contents += f"with captions ({self.kind})"
        order = np.random.default_rng(VAL_SEED).permutation(len(self._images))
        num_val = min(math.ceil(left_to_val * len(order)), len(order) - 1)
        rows = np.sort(order[:num_val] if is_val else order[num_val:])
        self._set_entries(rows, max_samples, "masks_max_samples", self._images)

    def _build_index(self, key: Key) -> dict[str, np.ndarray]:
        """Return images, and the regions of each as JSON: a record, or where its line is (offset, length in bytes)."""
        if self.file is None:
            files, folders = list_tree(self.root, ("",), self.index_dir, key)
            listing, read = self._listing_of(files)
            paths = [self.root / file for file in read]
            watched = join_parts([folders, watch_files(path for path in paths if path.exists())])
        else:
            watched = watch_files([self.file])
            listing = read_coco(self.file, self.crowds) if self.kind == COCO else read_jsonl(self.file)
            watched = join_parts([watched, watch_files(self._leave_out_missing(listing), any_size=True)])
        names = sorted(listing.regions)
        regions = [listing.regions[name] for name in names]
        return {
            **StringTable.from_strings(names).to_arrays("image"),
            **StringTable.from_strings(chain.from_iterable(regions)).to_arrays("region"),
            **StringTable.from_strings([json.dumps(listing.counts())]).to_arrays("left_out"),
            "starts": np.cumsum([0, *map(len, regions)], dtype=np.int64),
            "counts": np.array([listing.num_captioned, listing.num_named]),
            **watched,
        }

    def _listing_of(self, files: list[str]) -> tuple[Listing, list[str]]:
        """Return what the files below the root list, and which of them were read for it."""
        if self.kind == MASK_FILES:
            return _pair_mask_files(files, self.root, self.void)
        folder, suffix = ("labels/", ".txt") if self.kind == YOLO else ("", ".json")
        lists = [file for file in files if file.startswith(folder) and file.lower().endswith(suffix)]
        images = {file.rsplit(".", 1)[0]: file for file in files if file.lower().endswith(IMAGE_SUFFIXES)}
        listing = (read_yolo if self.kind == YOLO else read_labelme)(self.root, lists, images)
        listing.left_out["images without an annotation"] += len(images) - len(listing.regions)
        return listing, [*lists, *(file for file in files if file in ("data.yaml", "data.yml", "classes.txt"))]

    def _leave_out_missing(self, listing: Listing) -> list[Path]:
        """Leave out images that are not there, unless none is; return the folders of those that are."""
        folders: dict[Path, None] = {}
        missing = []
        for name in listing.regions:
            try:
                folders[self._find_image(name).parent] = None
            except SampleError:
                missing.append(name)
        # A name that cannot be written (half a surrogate pair) cannot be kept either.
        missing = missing if folders else [name for name in missing if name != name.encode("utf-8", "ignore").decode()]
        listing.leave_out("listed images that are not there", *missing)
        for name in missing:
            del listing.regions[name]
        return [*folders] or [self.image_root]

    def entry_id(self, index: int) -> str:
        """Return the image's name without its suffix and without a leading ``images/``."""
        return self._images[int(self._rows[index])].rsplit(".", 1)[0].removeprefix("images/")

    def image_path(self, index: int) -> Path:
        """Return the image file of entry ``index``."""
        return self._find_image(self._images[int(self._rows[index])])

    def _find_image(self, name: str) -> Path:
        if os.path.isabs(name):
            if not self.allow_absolute_paths:
                fix = "give --allow_absolute_paths where you trust the file, or --masks_images with relative names"
                raise bad_sample("unsafe_path", "an image is listed by absolute path", name, fix=fix)
            paths = [Path(name)]
        else:
            split = self.file.stem.removeprefix("instances_") if self.file and self.kind == COCO else "images"
            folders = dict.fromkeys(("", "images", split, f"images/{split}"))
            paths = [safe_join(self.image_root / folder, name) for folder in folders]
        for path in paths:
            if os.path.isfile(path):  # also of names that no file can have
                return path
        expected, fix = " or ".join(map(str, paths[:2])), "set --masks_images"
        raise bad_sample("missing_file", "an image is missing", name, "nothing there", expected, fix)

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
        """Read image ``index`` with up to ``regions_per_image`` objects drawn by ``rng``."""
        row = int(self._rows[index])
        start, stop = self._starts[row : row + 2].tolist()
        path = self.image_path(index)
        picture = read_picture(path, self.exif == "apply", needed=needed)
        texts: dict[int, tuple[str, ...]] = {}
        files: dict[str, MaskFile] = {}

        @functools.cache
        def region_of(number: int) -> Region:
            return self._region(start + number)

        def name(number: int) -> str:
            return str(region_of(number).get("id", f"at{number}"))

        def decode(number: int) -> np.ndarray:
            nonlocal picture
            where = f"{self.file or self.root}: {name(number)} of {path.name}"
            own = _texts(region_of(number), where)
            check_captions(own, where)
            mask = self._mask(region_of(number), picture.size, where, files)
            if not texts:
                picture = self._turned_to_fit(picture, path, lambda size: _fits(mask, size))
            mask, texts[number] = fit_mask(mask, picture.size, where), own
            return mask

        is_hard, count = self.region_choice == "hard", stop - start
        classes = [region_of(number).get("category_id") for number in range(count)] if is_hard else []
        drawn = self._draw(rng, count, decode, str(path), region_id=name, picture=lambda: picture, classes=classes)
        ids = [name(number) for number in drawn.numbers]
        ids = ids if len(set(ids)) == len(ids) else [f"{name}_{k}" for k, name in enumerate(ids)]
        named = [region_of(number).get("class_name") for number in drawn.numbers]
        return self._sample(index, picture, drawn, ids, [texts[number] for number in drawn.numbers], named)

    def _region(self, number: int) -> Region:
        record = json.loads(self._regions[number])
        if self.file is None or self.kind == COCO:
            return cast(Region, record)
        offset, length = record
        with open_file(self.file) as stream:
            stream.seek(offset)
            return parse_line(stream.read(length), f"{self.file}, byte {offset}")

    def _mask(self, region: Region, size: tuple[int, int], where: str, files: dict[str, MaskFile]) -> np.ndarray:
        """Return the mask (H, W) bool of a region, at the size it is stored for; ``files`` keeps what was read."""
        height, width = region.get("size", size)
        if "mask" in region:
            file = region["mask"]
            if file not in files:
                files[file] = read_mask(safe_join(self.root, file), self.void)
            return files[file].mask(region["label"])
        if "parts" in region:
            points = np.array(region["parts"]).reshape(-1, 2) * [width, height]
            return decode_segmentation([points.flatten().tolist()], height, width, where)
        segmentation = region.get("segmentation")
        if isinstance(segmentation, Mapping):
            return decode_rle(segmentation, where)
        return decode_segmentation(mend_polygons(segmentation, where), height, width, where)


def _find_layout(root: Path) -> tuple[Path, Path | None, str]:
    """Return the folder, the one file that lists the masks (None: other files do), and the layout."""
    if root.is_file():
        if root.suffix.lower() not in (".json", ".jsonl"):
            raise layout_error("a file of masks has an unknown kind", root, root.suffix or "no suffix", LAYOUT)
        folder = root.absolute().parent
        folder = folder.parent if folder.name == "annotations" else folder
        return check_root(folder, "masks", LAYOUT), root.absolute(), _kind_of(root)
    folder = check_root(root, "masks", LAYOUT)
    has_masks, listed_by = (folder / "masks").is_dir(), _lists_in(folder)
    if has_masks and not listed_by:
        return folder, None, MASK_FILES
    if not has_masks and not listed_by:
        if next(folder.glob("labels/**/*.txt"), None):
            return folder, None, YOLO
        listed_by = [path for path in _lists_in(folder / "annotations") if path.name.startswith("instances")]
        listed_by = listed_by or _lists_in(folder / "annotations")
    beside = listed_by[:1] or sorted(folder.glob("images/*.json"))[:1]
    if beside and not has_masks and _is_labelme(beside[0]):
        return folder, None, LABELME
    if len(listed_by) == 1 and not has_masks:
        return folder, listed_by[0], _kind_of(listed_by[0])
    deeper = listed_by or sorted(path for path in folder.glob("*/*.json*") if path.suffix in (".json", ".jsonl"))
    seen = listed([path.relative_to(folder) for path in deeper]) or "no masks/, no .json, no .jsonl"
    if has_masks:
        seen = f"masks/ and {seen}"
    raise layout_error("it is not clear where the masks are (give one file to say which)", folder, seen, LAYOUT)


def _lists_in(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("[!.]*") if path.suffix.lower() in (".json", ".jsonl")]
    return sorted(path for path in found if path.name != CAPTIONS_NAME)


def _kind_of(file: Path) -> str:
    return COCO if file.suffix.lower() == ".json" else LINES


def _is_labelme(file: Path) -> bool:
    with suppress(OSError, ValueError):
        tree = parse_json(read_file(file, SAMPLE_BYTES))
        return isinstance(tree, dict) and "shapes" in tree
    return False


def _pair_mask_files(files: list[str], root: Path, void: int | None) -> tuple[Listing, list[str]]:
    """Return the regions of images that have masks, and the files that were read.

    Names are compared in Unicode's composed form: file systems and archives of a Mac write the other one.
    """
    listing, captions = Listing(), _read_captions(root / CAPTIONS_NAME)
    images, masks, doubled = dict[str, str](), dict[str, str](), set[str]()
    for folder, suffixes, known in (("images", IMAGE_SUFFIXES, images), ("masks", MASK_SUFFIXES, masks)):
        for file in (one for one in files if one.startswith(f"{folder}/")):
            name = unicodedata.normalize("NFC", file.removeprefix(f"{folder}/"))
            stem, suffix = posixpath.splitext(name)
            if suffix.lower() not in suffixes:
                kind = suffix or "no suffix"
                listing.leave_out(f"files in {folder}/ of a format that is not read ({kind})", posixpath.basename(file))
            elif stem in known:
                listing.leave_out(f"files in {folder}/ that share a name with another", posixpath.basename(file))
                doubled |= {stem} if folder == "images" else set()
            else:
                known[stem] = file
    whole_names = {unicodedata.normalize("NFC", file.removeprefix("images/")): stem for stem, file in images.items()}
    unused = set(captions)
    used_images = set[str]()
    for stem, file in masks.items():
        owner = next((one for one in (stem, whole_names.get(stem, ""), stem.rpartition("/")[0]) if one in images), None)
        if owner is None or (owner in doubled and owner == stem):
            what = "masks without an image of their name" if owner is None else "masks that two images could own"
            listing.leave_out(what, posixpath.basename(file))
            continue
        used_images.add(owner)
        try:
            labels = read_mask(root / file, void).labels
        except SampleError:
            labels = {"": 0}  # a damaged file fails again when it is loaded, with its reason
        for label, value in labels.items():
            name = stem + (f"#{label}" if label else "")
            keys = [name, file.removeprefix("masks/"), f"{stem}#{value}"]
            text = next((captions[key] for key in keys if captions.get(key)), None)
            unused.difference_update(keys)
            region = {"id": name.removeprefix(f"{owner}/"), "mask": file, "label": value}
            listing.add(images[owner], {**region, "captions": text} if text else region)
    alone = [posixpath.basename(file) for stem, file in images.items() if stem not in used_images]
    listing.leave_out("images without a mask of their name", *alone)
    listing.leave_out("captions without a mask", *sorted(unused))
    if captions and len(unused) == len(captions):
        seen = f"{len(unused)} names without a mask: {listed(sorted(unused), 3)}"
        expected = "names of mask files below masks/, without .png (of a map of labels: name#label)"
        raise ConfigError(explain("captions belong to no mask", str(root / CAPTIONS_NAME), seen, expected))
    return listing, [*masks.values(), *([CAPTIONS_NAME] if CAPTIONS_NAME in files else [])]


def read_mask_file(path: Path) -> list[tuple[str, np.ndarray]]:
    """Return the objects of a mask file, one or more: (name, (H, W) bool) each.

    Raises:
        SampleError: see :func:`~dual_loop.data.mask_files.read_mask`; ``empty_mask``.
    """
    found = read_mask(path)
    check_mask(found.values != 0, str(path))
    return [(path.stem + (f"#{name}" if name else ""), found.mask(label)) for name, label in found.labels.items()]


def _read_captions(path: Path) -> dict[str, str | list[str] | None]:
    if not path.exists():
        return {}
    try:
        captions = parse_json(read_file(path))
    except (OSError, ValueError) as error:
        raise ConfigError(explain("captions cannot be read", str(path), str(error), "JSON")) from error
    if not isinstance(captions, dict) or not all(value is None or _is_caption(value) for value in captions.values()):
        expected = '{"mask name": "text" or ["text", "text"]}'
        raise ConfigError(explain("captions have another structure", str(path), shorten(captions), expected))
    return {unicodedata.normalize("NFC", name): value for name, value in captions.items()}


def _is_caption(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _texts(region: Region, where: str) -> tuple[str, ...]:
    given = next((text for text in (region.get("captions"), region.get("caption")) if text is not None), [])
    if not _is_caption(given):
        raise bad_sample("broken_json", "a caption is no text", where, shorten(given), "text, or a list of texts")
    texts: Sequence[str] = [given] if isinstance(given, str) else given
    return tuple(text.strip() for text in texts if text.strip())


def _fits(mask: np.ndarray, size: tuple[int, int]) -> bool:
    return all(abs(a - b) <= SIZE_TOLERANCE for a, b in zip(mask.shape, size, strict=True))

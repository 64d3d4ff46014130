"""Reader of Open Images V7 segmentation: masks of 350 classes, one PNG an object.

Format: Benenson et al. 2019, arXiv 1903.10830 (:data:`LAYOUT`; each part can be given on its own).

Partial downloads: an entry is an image that is there, with its masks that are there; ``left_out`` counts the others.
Where nothing is there everything stays an entry, and reading one says what is missing.

A mask is usually stored at another resolution than its image, so it is resized (nearest) to the image. Where the aspect
ratios differ by more than 1 %, and by more than the rounding of a side explains, they do not belong together.

EXIF policy: ``data.exif`` says whether images are turned; one that the first drawn mask fits only the other way is
turned that way. Where the aspect fits either way (upside down, or a square image) nothing in the files tells whether
the masks were drawn before or after, which a warning says.

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``not_an_image``,
``unsafe_path``, ``aspect_mismatch``, ``no_region_left``.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from dual_loop.data.images import foreground_of, open_image_file, read_picture
from dual_loop.data.index import join_parts, list_tree, load_or_build, partial_folder
from dual_loop.data.index_file import watch_files
from dual_loop.data.layout import find_part, layout_error
from dual_loop.data.limits import open_file, read_file, read_lines
from dual_loop.data.masks import resize_mask, safe_join
from dual_loop.data.reader import Reader
from dual_loop.data.string_table import StringTable
from dual_loop.errors import ConfigError, bad_sample, explain, shorten
from dual_loop.iteration import in_chunks, progress_bar
from dual_loop.types import NeededSize, RegionSample

LAYOUT = """
  root/
    train-annotations-object-segmentation.csv    (MaskPath,ImageID,LabelName,BoxID,...)
    images/train/<ImageID>.jpg
    masks/train/<MaskPath>
  (images and masks also in sub-folders, as unpacked archives leave them; a part of them is enough)
"""

CSV_NAME = "train-annotations-object-segmentation.csv"
ASPECT_TOLERANCE = 0.01
"""Largest relative difference between the aspect ratios of a mask and its image."""

CLASS_FILES = (
    *("oidv7-class-descriptions.csv", "oidv7-class-descriptions-boxable.csv"),
    *("class-descriptions-boxable.csv", "class-descriptions.csv"),
)
LEFT_OUT = (
    "masks of the table that are not there",
    "images of the table that are not there",
    "images none of whose masks is there",
    "zip files that are not unpacked",
)

_CHUNK_ROWS = 50_000
_MAX_ID_BYTES = 251
"""A file system holds names of 255 bytes, and ``.jpg`` comes after the id."""


class OpenImages(Reader):
    """Open Images segmentation; an entry is an image with its objects.

    Args (further ones are those of :class:`~dual_loop.data.reader.Reader`):
        csv, images, masks: where a part is elsewhere: a path that exists, or a path below ``root``.
        classes: class descriptions, for ``data.class_captions``; a wrong path is refused.

    Raises:
        ConfigError: a part is missing, the CSV has another header or a broken row, or it has no row.
    """

    name, title, layout = "openimages", "Open Images", LAYOUT

    def __init__(
        self,
        root: str | Path,
        max_samples: int | None = None,
        regions_per_image: int = 1,
        csv: str | Path | None = None,
        classes: str | Path | None = None,
        images: str | Path | None = None,
        masks: str | Path | None = None,
        index_dir: str | Path | None = None,
    ) -> None:
        super().__init__(root, index_dir, regions_per_image)

        def find(given: str | Path | None, default: str, setting: str) -> Path:
            what = f"a part of Open Images is missing (set {setting} where it is elsewhere)"
            return find_part(self.root, given, default, what, LAYOUT)

        self.csv_path = find(csv, CSV_NAME, "openimage_csv")
        self.images = find(images, "images/train", "openimage_images")
        self.masks = find(masks, "masks/train", "openimage_masks")
        self._classes = None if classes is None else find(classes, "", "openimage_classes")
        self._class_names: dict[str, str] = {}
        folders = {"images": str(self.images), "masks": str(self.masks)}
        self._key = {"kind": "openimages", "csv": str(self.csv_path), **folders, "version": 2}
        arrays = load_or_build(index_dir, self._key, self._build_index)
        self._image_ids, self._image_files, self._mask_paths, self._folders = (
            StringTable.from_arrays(arrays, name) for name in ("image_id", "image_file", "mask_path", "folder")
        )
        self._mask_folder = arrays["mask_folder"]
        self.left_out = dict(zip(LEFT_OUT, arrays["left_out"].tolist(), strict=True))
        self._masks_by_image, self._starts = arrays["rows"], arrays["row_starts"]
        if not len(self._image_ids):
            raise layout_error("the Open Images CSV has no row", self.csv_path, "the header alone", LAYOUT)
        self._set_entries(np.arange(len(self._image_ids)), max_samples, "openimage_max_samples", self._image_ids)

    def read_classes(self) -> None:
        candidates = [self.root / name for name in CLASS_FILES] if self._classes is None else [self._classes]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise layout_error("class captions need the class descriptions", candidates[0], "nothing there", LAYOUT)
        self._class_names = _read_class_names(path)

    def _build_index(self) -> dict[str, np.ndarray]:
        """Stream the CSV (2.7 million rows in the release) into arrays, rows grouped by image."""
        watched, listed, num_zips = [watch_files([self.csv_path])], list[list[str]](), 0
        for folder, suffixes in ((self.masks, (".png", ".zip")), (self.images, (".jpg", ".jpeg", ".png", ".zip"))):
            part = {**self._key, "listing": str(folder)}
            files, listed_folders = list_tree(folder, suffixes, self.index_dir, part)
            shutil.rmtree(partial_folder(self.index_dir, part), ignore_errors=True)
            listed.append([path for path in files if not path.lower().endswith(".zip")])
            watched.append(listed_folders)
            num_zips += len(files) - len(listed[-1])
        chunks, hashes = [np.empty(0, "S1")], [np.empty(0, np.int64)]

        def mask_paths() -> Iterator[str]:
            with progress_bar(f"reading {self.csv_path.name}", "row") as bar:
                for rows in in_chunks(self._read_valid_rows(), _CHUNK_ROWS):
                    own, image_ids = [path for path, _ in rows], [image_id for _, image_id in rows]
                    chunks.append(np.array(image_ids))
                    hashes.append(np.array(list(map(hash, own)) if listed[0] else [], np.int64))
                    yield from own
                    bar.update(len(rows))

        paths = StringTable.from_strings(mask_paths())
        ids = np.concatenate(chunks)
        chunks.clear()
        rows = np.argsort(ids, kind="stable")
        ids = ids[rows]
        is_first = np.concatenate((np.ones(min(1, len(ids)), bool), ids[1:] != ids[:-1]))
        images, of_image, (masks, photos) = ids[is_first].tolist(), np.cumsum(is_first) - 1, listed
        mask_place, photo_place = np.full(len(rows) if masks else 0, -1), np.full(len(images), -1)
        kept = np.zeros(len(rows), bool)
        if masks:
            mask_place = _places(masks, np.concatenate(hashes))
            kept = (mask_place >= 0)[rows]
        if photos:
            photo_place = _places(photos, np.array([hash(name.decode()) for name in images], np.int64), stems=True)
        has_photo, num_masks = photo_place >= 0, int(kept.sum())
        is_masked = np.bincount(of_image[kept], minlength=len(images)) > 0
        counts = [len(rows) - num_masks, int((~has_photo).sum()), int((has_photo & ~is_masked).sum()), num_zips]
        kept &= has_photo[of_image]
        if kept.any():
            rows, of_image = rows[kept], of_image[kept]
        starts = np.flatnonzero(np.diff(of_image, prepend=-1))
        shown = of_image[starts].tolist()
        # Where all files lie flat under the names of the release nothing is stored about them.
        others = any("/" in path or not path.endswith(".jpg") for path in photos) and kept.any()
        folders = [path.rpartition("/")[0] for path in masks] if any("/" in path for path in masks) else []
        folder_names = sorted({"", *folders})
        numbers = {name: number for number, name in enumerate(folder_names)}
        return {
            **StringTable.from_strings(images[image].decode() for image in shown).to_arrays("image_id"),
            **StringTable.from_strings(photos[photo_place[i]] for i in shown if others).to_arrays("image_file"),
            **paths.to_arrays("mask_path"),
            **StringTable.from_strings(folder_names).to_arrays("folder"),
            "mask_folder": np.array([*map(numbers.__getitem__, folders), 0], np.int32)[mask_place if folders else []],
            "rows": rows,
            "row_starts": np.append(starts, len(rows)),
            "left_out": np.array(counts, np.int64),
            **join_parts(watched),
        }

    def _read_valid_rows(self) -> Iterator[tuple[str, bytes]]:
        """Yield (mask path, ImageID in UTF-8) of each row."""
        path = str(self.csv_path)
        fix = "the file is damaged or incomplete: download it again"
        try:
            with io.TextIOWrapper(open_file(self.csv_path), encoding="utf-8-sig", newline="") as file:
                numbered = _rows(read_lines(file))
                header = next((row for _, row in numbered), [])
                if "MaskPath" not in header or "ImageID" not in header:
                    what, seen = "the Open Images CSV has another header", ",".join(header) or "an empty file"
                    fix = "give the annotations-object-segmentation CSV of Open Images V5 to V7"
                    raise ConfigError(explain(what, path, seen, "MaskPath,ImageID,LabelName,BoxID,...", fix))
                path_column, id_column = header.index("MaskPath"), header.index("ImageID")
                for number, row in numbered:
                    image_id = row[id_column].encode() if len(row) == len(header) else b""
                    if not image_id or len(image_id) > _MAX_ID_BYTES or b"\0" in image_id or not row[path_column]:
                        where, seen = f"{path}, line {number}", ",".join(row)[:80]
                        expected = f"{len(header)} columns, MaskPath, ImageID to {_MAX_ID_BYTES} bytes without NUL"
                        raise ConfigError(explain("a CSV row is broken", where, seen, expected, fix))
                    yield row[path_column], image_id
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(explain("a CSV file cannot be read", path, error, "UTF-8 CSV", fix)) from error

    def entry_id(self, index: int) -> str:
        """Return the ImageID."""
        return self._image_ids[int(self._rows[index])]

    def image_path(self, index: int) -> Path:
        """Return where the image is, or should be."""
        row = int(self._rows[index])
        return safe_join(
            self.images, self._image_files[row] if len(self._image_files) else f"{self._image_ids[row]}.jpg"
        )

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
        """Read image ``index`` with up to ``regions_per_image`` objects drawn by ``rng``.

        A region's id is its mask's name without ImageID and ``.png``, ``<label without slashes>_<BoxID>``.
        """
        entry, image_id = int(self._rows[index]), self.entry_id(index)
        rows = self._masks_by_image[self._starts[entry] : self._starts[entry + 1]].tolist()
        nested = len(self._mask_folder) > 0
        folders = {self._mask_paths[row]: self._folders[int(self._mask_folder[row])] if nested else "" for row in rows}
        names = list(folders)  # a row may be there twice
        image = self.image_path(index)
        picture, first_fits = read_picture(image, apply_exif=self.exif == "apply", needed=needed), False

        def decode(number: int) -> np.ndarray:
            nonlocal picture, first_fits
            name, folder = names[number], folders[names[number]]
            path = safe_join(self.masks, f"{folder}/{name}" if folder and "/" not in name else name)
            mask = foreground_of(open_image_file(path))
            if not first_fits:
                picture = self._turned_to_fit(picture, image, lambda size: _same_aspect(mask, size))
            if not _same_aspect(mask, picture.size):
                what = "a mask and its image have different aspect ratios"
                seen = f"mask {mask.shape[1]} x {mask.shape[0]}, image {picture.size[1]} x {picture.size[0]} (W x H)"
                expected = f"aspect ratios within {ASPECT_TOLERANCE:.0%}"
                fix = "the image is another rendition or was turned: download the original"
                raise bad_sample("aspect_mismatch", what, str(path), seen, expected, fix)
            first_fits = True
            return resize_mask(mask, picture.size)

        ids = [name.rsplit("/", 1)[-1].removesuffix(".png").removeprefix(f"{image_id}_") for name in names]
        labels = [name.rpartition("_")[0] for name in ids]
        where = f"{self.csv_path}: {image_id}"
        drawn = self._draw(
            rng, len(names), decode, where, region_id=ids.__getitem__, picture=lambda: picture, classes=labels
        )
        classes = [self._class_names.get(labels[number]) for number in drawn.numbers]
        return self._sample(index, picture, drawn, [ids[number] for number in drawn.numbers], class_names=classes)


def _rows(lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of CSV that are not blank, with the number of their last line.

    Lines are split at commas, in half the time of the csv module, up to the first that has a quotation mark.
    """
    for number, line in enumerate(lines, start=1):
        if '"' in line:
            reader = csv.reader(chain([line], lines))
            yield from ((number - 1 + reader.line_num, row) for row in reader if row)
            return
        if row := line.rstrip("\r\n"):
            yield number, row.split(",")


def _places(files: list[str], hashes: np.ndarray, stems: bool = False) -> np.ndarray:
    """Return which of ``files`` each name is that has one of ``hashes``, -1 where none is: (n,) int64.

    A file is called by its path below the listed folder, else by its last part; with ``stems`` by this without suffix.
    Hashes of 64 bits, since millions of names in a dict would take gigabytes.
    """
    found = np.full(len(hashes), -1, np.int64)
    last = (path[path.rfind("/") + 1 :] for path in files)
    for called in [(name[: name.rfind(".")] for name in last)] if stems else [iter(files), last]:
        if not files or (found >= 0).all():
            break
        own = np.fromiter(map(hash, called), np.int64, len(files))
        order = np.argsort(own, kind="stable")
        place = order[np.minimum(np.searchsorted(own, hashes, sorter=order), len(own) - 1)]
        found = np.where((found < 0) & (own[place] == hashes), place, found)
    return found


def _read_class_names(path: Path) -> dict[str, str]:
    """Return the names of the classes by label without slashes, of descriptions with a header (V7) or without (V5)."""
    try:
        rows = list(csv.reader(read_file(path).decode("utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(explain("class descriptions cannot be read", str(path), error, "UTF-8 CSV")) from error
    names = {row[0].replace("/", ""): row[1].strip() for row in rows if len(row) > 1 and row[0].startswith("/")}
    if not names:
        seen, fix = shorten(rows[0] if rows else ""), "give oidv7-class-descriptions.csv"
        raise ConfigError(explain("class descriptions hold no class", str(path), seen, "/m/0abc,Name in each", fix))
    return names


def _same_aspect(mask: np.ndarray, size: tuple[int, int]) -> bool:
    (height, width), (rows, columns) = mask.shape, size
    ratio: float = (width * rows) / (height * columns)
    # The rounding of a side to pixels moves the ratio of an image below 25 pixels by up to 2 % and more.
    off = min(abs(height * columns / width - rows), abs(width * rows / height - columns))
    return max(ratio, 1 / ratio) <= 1 + ASPECT_TOLERANCE or (min(size) < 25 and off <= 0.5)

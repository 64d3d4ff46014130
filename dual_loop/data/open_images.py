"""Reader of Open Images V7 segmentation: masks of 350 classes, one PNG an object.

Layout (Benenson et al. 2019, arXiv 1903.10830; each part can be given on its own)::

    root/
      train-annotations-object-segmentation.csv    MaskPath,ImageID,LabelName,BoxID,...
      oidv7-class-descriptions.csv                 optional, for display names
      images/train/<ImageID>.jpg
      masks/train/<MaskPath>

Sizes: a mask is usually stored at another resolution than its image, so it is resized (nearest) to the image. Where
the aspect ratios disagree by more than 1 %, mask and image do not belong together (``aspect_mismatch``).

EXIF policy: the image is taken as stored, as long as the first drawn mask fits its aspect. Where it does not fit, the
image is turned as its EXIF orientation says, if that makes it fit. So an orientation that keeps the aspect (upside
down, or a square image) is not applied: nothing in the files tells whether the masks were drawn before or after.

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``not_an_image``,
``unsafe_path``, ``aspect_mismatch``, ``no_region_left``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dual_loop.data.images import Picture, read_mask_png, read_picture
from dual_loop.data.index import load_or_build, progress_bar
from dual_loop.data.index_file import StringTable, watch_files
from dual_loop.data.masks import resize_mask, safe_join
from dual_loop.data.reader import check_root, choose_capped, layout_error
from dual_loop.errors import ConfigError, SampleError, explain
from dual_loop.iteration import in_chunks
from dual_loop.types import NeededSize, RegionSample

LAYOUT = """
  root/
    train-annotations-object-segmentation.csv
    oidv7-class-descriptions.csv    (optional)
    images/train/<ImageID>.jpg
    masks/train/<MaskPath>
"""

CSV_NAME = "train-annotations-object-segmentation.csv"
CLASS_FILES = (
    "oidv7-class-descriptions.csv",
    "oidv7-class-descriptions-boxable.csv",
    "class-descriptions-boxable.csv",
)
ASPECT_TOLERANCE = 0.01
"""Largest relative difference between the aspect ratios of a mask and its image."""

_CHUNK_ROWS = 50_000
_MAX_ID_BYTES = 251
"""A file system holds names of 255 bytes, and ``.jpg`` comes after the id."""


class OpenImages:
    """Open Images segmentation as a :class:`~dual_loop.types.RegionSource`; an entry is an image with its objects.

    Args:
        root: folder of the data set, see the module.
        max_samples: keep this many images, drawn with a fixed seed; None keeps all.
        regions_per_image: most regions of one sample.
        csv, classes, images, masks: where a part is elsewhere: a path that exists, or a path below ``root``.
        index_dir: see :func:`~dual_loop.data.index.load_or_build`.

    Raises:
        ConfigError: a part is missing, the CSV has another header or a broken row, or it has no row.
    """

    name = "openimages"

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
        self.root = check_root(root, "Open Images", LAYOUT)
        self.regions_per_image = regions_per_image
        self.csv_path = self._find(csv, CSV_NAME, "openimage_csv")
        self.images = self._find(images, "images/train", "openimage_images")
        self.masks = self._find(masks, "masks/train", "openimage_masks")
        self._labels = self._read_labels(classes)
        arrays = load_or_build(index_dir, {"kind": "openimages", "csv": str(self.csv_path)}, self._build_index)
        self._image_ids = StringTable.from_arrays(arrays, "image_id")
        self._mask_paths = StringTable.from_arrays(arrays, "mask_path")
        self._rows, self._row_starts = arrays["rows"], arrays["row_starts"]
        if not len(self._image_ids):
            raise layout_error("the Open Images CSV has no row", self.csv_path, "the header alone", LAYOUT)
        self._kept = choose_capped(len(self._image_ids), max_samples, "openimage_max_samples")

    def _find(self, given: str | Path | None, default: str, setting: str) -> Path:
        """Return the absolute path of a part; a given path may be relative to the working folder or to the root."""
        candidates = [self.root / default] if given is None else [Path(given).expanduser(), self.root / given]
        for candidate in candidates:
            if candidate.exists():
                return candidate.absolute()
        what = f"a part of Open Images is missing (set {setting} where it is elsewhere)"
        raise layout_error(what, candidates[-1], "nothing there", LAYOUT)

    def _read_labels(self, given: str | Path | None) -> dict[str, str]:
        """Return display names by label. The older file has no header, the newer one has: told by the first row."""
        if given is not None:
            path = self._find(given, "", "openimage_classes")
        else:
            present = [self.root / name for name in CLASS_FILES if (self.root / name).is_file()]
            if not present:
                return {}
            path = present[0]
        labels = {}
        for number, row in _read_rows(path):
            if len(row) < 2:
                raise _bad_row(path, number, row, "label,display name")
            if number == 1 and row[0].strip().lower() == "labelname":
                continue
            labels[row[0]] = row[1]
        return labels

    def label_name(self, label: str) -> str:
        """Return the display name of a label (``/m/04yx4``, or ``m04yx4`` as in a mask's name); else ``label``."""
        slashed = f"/{label[0]}/{label[1:]}" if label and not label.startswith("/") else label
        return self._labels.get(slashed, label)

    def _build_index(self) -> dict[str, np.ndarray]:
        """Stream the CSV (2.7 million rows in the release) into arrays, rows grouped by image.

        The ids of all rows are one array of fixed width, so that sorting it groups the rows; no row becomes an object
        that stays.
        """
        watched = watch_files([self.csv_path])
        chunks: list[np.ndarray] = [np.empty(0, "S1")]
        paths = StringTable.from_strings(self._stream_mask_paths(chunks))
        ids = np.concatenate(chunks)
        chunks.clear()
        rows = np.argsort(ids, kind="stable")
        ids = ids[rows]
        starts = np.flatnonzero(np.concatenate((np.ones(min(1, len(ids)), bool), ids[1:] != ids[:-1])))
        image_ids = StringTable.from_strings(ids[start].decode() for start in starts)
        return {
            **image_ids.to_arrays("image_id"),
            **paths.to_arrays("mask_path"),
            "rows": rows,
            "row_starts": np.append(starts, len(ids)),
            **watched,
        }

    def _stream_mask_paths(self, chunks: list[np.ndarray]) -> Iterator[str]:
        """Yield the mask path of each row; append the rows' ImageIDs in UTF-8 to ``chunks``, (n,) bytes."""
        with progress_bar(f"reading {self.csv_path.name}", "row") as bar:
            for rows in in_chunks(self._read_valid_rows(), _CHUNK_ROWS):
                yield from (mask_path for mask_path, _ in rows)
                chunks.append(np.array([image_id for _, image_id in rows]))
                bar.update(len(rows))

    def _read_valid_rows(self) -> Iterator[tuple[str, bytes]]:
        rows = _read_rows(self.csv_path)
        _, header = next(rows, (1, []))
        if "MaskPath" not in header or "ImageID" not in header:
            expected = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
            fix = "give the annotations-object-segmentation CSV of Open Images V5 to V7"
            seen = ",".join(header) or "an empty file"
            raise ConfigError(
                explain("the Open Images CSV has another header", str(self.csv_path), seen, expected, fix)
            )
        path_column, id_column = header.index("MaskPath"), header.index("ImageID")
        for number, row in rows:
            if len(row) != len(header) or not row[path_column] or not row[id_column]:
                raise _bad_row(self.csv_path, number, row, f"{len(header)} columns, MaskPath and ImageID filled")
            image_id = row[id_column].encode()
            if len(image_id) > _MAX_ID_BYTES or b"\0" in image_id:
                raise _bad_row(self.csv_path, number, row, f"an ImageID of at most {_MAX_ID_BYTES} bytes, without NUL")
            yield row[path_column], image_id

    def __len__(self) -> int:
        return len(self._kept)

    def named_rows(self) -> tuple[list[StringTable], np.ndarray]:
        """Return tables whose rows contain the entries' names, and the row of each entry, (n,) int64."""
        return [self._image_ids], self._kept

    def entry_id(self, index: int) -> str:
        """Return the ImageID."""
        return self._image_ids[int(self._kept[index])]

    def image_path(self, index: int) -> Path:
        """Return where the image is, or should be.

        Raises:
            SampleError: ``unsafe_path``.
        """
        return safe_join(self.images, f"{self.entry_id(index)}.jpg")

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Return :meth:`load_reduced` with the image in full.

        Raises:
            SampleError: see the module.
        """
        return self.load_reduced(index, rng, None)

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
        """Read image ``index`` with up to ``regions_per_image`` objects drawn by ``rng``.

        An empty mask is replaced by the next drawn; any other fault makes the whole sample bad. A region's id is its
        mask's name without ImageID and ``.png``, ``<label without slashes>_<BoxID>``.

        Raises:
            SampleError: see the module.
        """
        entry, image_id = int(self._kept[index]), self.entry_id(index)
        rows = self._rows[self._row_starts[entry] : self._row_starts[entry + 1]]
        names = list(dict.fromkeys(self._mask_paths[int(row)] for row in rows))  # a row may be there twice
        picture: Picture | None = None
        chosen: list[str] = []
        masks: list[np.ndarray] = []
        for position in rng.permutation(len(names)):
            name = names[int(position)]
            path = safe_join(self.masks, name)
            stored = read_mask_png(path)
            if picture is None:
                picture = self._read_fitting_image(image_id, stored, path, needed)
            elif not _same_aspect(stored.shape, picture.size):
                raise _aspect_mismatch(stored, picture.size, path)
            mask = resize_mask(stored, picture.size)
            if mask.any():
                chosen.append(name)
                masks.append(mask)
            if len(chosen) == self.regions_per_image:
                break
        if picture is None or not chosen:
            seen, expected = f"{len(names)} masks, all empty at the image's size", "one with a pixel or more"
            message = explain("no region of an image is left", f"{self.csv_path}: {image_id}", seen, expected)
            raise SampleError("no_region_left", message)
        return RegionSample(
            source=self.name,
            sample_id=image_id,
            image=picture.pixels,
            masks=np.stack(masks),
            region_ids=tuple(_region_id(name, image_id) for name in chosen),
            captions=((),) * len(chosen),
            image_reduction=picture.reduction,
        )

    def _read_fitting_image(
        self, image_id: str, mask: np.ndarray, mask_path: Path, needed: NeededSize | None
    ) -> Picture:
        """Read the image as stored, or turned as its EXIF says where only that fits ``mask`` (see the module)."""
        path = safe_join(self.images, f"{image_id}.jpg")
        picture = read_picture(path, apply_exif=False, needed=needed)
        if _same_aspect(mask.shape, picture.size):
            return picture
        turned = read_picture(path, apply_exif=True)
        if _same_aspect(mask.shape, turned.size):
            return turned
        raise _aspect_mismatch(mask, picture.size, mask_path)


def _same_aspect(mask_shape: tuple[int, ...], image_shape: tuple[int, ...]) -> bool:
    ratio = (mask_shape[1] * image_shape[0]) / (mask_shape[0] * image_shape[1])
    return max(ratio, 1 / ratio) <= 1 + ASPECT_TOLERANCE


def _aspect_mismatch(mask: np.ndarray, size: tuple[int, int], mask_path: Path) -> SampleError:
    message = explain(
        "a mask and its image have different aspect ratios",
        str(mask_path),
        f"mask {mask.shape[1]} x {mask.shape[0]}, image {size[1]} x {size[0]} (W x H)",
        f"aspect ratios within {ASPECT_TOLERANCE:.0%}",
        "the image is another rendition or was turned: download the original",
    )
    return SampleError("aspect_mismatch", message)


def _region_id(mask_path: str, image_id: str) -> str:
    stem = mask_path.rsplit("/", 1)[-1].removesuffix(".png")
    return stem.removeprefix(f"{image_id}_")


def _read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, row) of a CSV file, blank lines left out.

    Raises:
        ConfigError: the file cannot be read as UTF-8 CSV.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if row:
                    yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        seen = f"{type(error).__name__}: {error}"
        message = explain("a CSV file cannot be read", str(path), seen, "UTF-8 CSV", "download it again")
        raise ConfigError(message) from error


def _bad_row(path: Path, number: int, row: list[str], expected: str) -> ConfigError:
    fix = "the file is damaged or incomplete: download it again"
    return ConfigError(explain("a CSV row is broken", f"{path}, line {number}", ",".join(row)[:80], expected, fix))

"""Reader of Open Images V7 segmentation: masks of 350 classes, one PNG an object.

Format: Benenson et al. 2019, arXiv 1903.10830 (:data:`LAYOUT`; each part can be given on its own).

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
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dual_loop.data.images import Picture, foreground_of, open_image_file, read_picture
from dual_loop.data.index import load_or_build, progress_bar
from dual_loop.data.index_file import watch_files
from dual_loop.data.layout import find_part, layout_error
from dual_loop.data.limits import open_file, read_lines
from dual_loop.data.masks import resize_mask, safe_join
from dual_loop.data.reader import Reader
from dual_loop.data.string_table import StringTable
from dual_loop.errors import ConfigError, SampleError, explain
from dual_loop.iteration import in_chunks
from dual_loop.types import NeededSize, RegionSample, SkippedRegion

LAYOUT = """
  root/
    train-annotations-object-segmentation.csv    (MaskPath,ImageID,LabelName,BoxID,...)
    images/train/<ImageID>.jpg
    masks/train/<MaskPath>
"""

CSV_NAME = "train-annotations-object-segmentation.csv"
ASPECT_TOLERANCE = 0.01
"""Largest relative difference between the aspect ratios of a mask and its image."""

_CHUNK_ROWS = 50_000
_MAX_ID_BYTES = 251
"""A file system holds names of 255 bytes, and ``.jpg`` comes after the id."""


class OpenImages(Reader):
    """Open Images segmentation; an entry is an image with its objects.

    Args (further ones are those of :class:`~dual_loop.data.reader.Reader`):
        csv, images, masks: where a part is elsewhere: a path that exists, or a path below ``root``.
        classes: class descriptions; nothing in training reads them, but a wrong path is refused.

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
        if classes is not None:
            find(classes, "", "openimage_classes")
        arrays = load_or_build(index_dir, {"kind": "openimages", "csv": str(self.csv_path)}, self._build_index)
        self._image_ids = StringTable.from_arrays(arrays, "image_id")
        self._mask_paths = StringTable.from_arrays(arrays, "mask_path")
        self._masks_by_image, self._starts = arrays["rows"], arrays["row_starts"]
        if not len(self._image_ids):
            raise layout_error("the Open Images CSV has no row", self.csv_path, "the header alone", LAYOUT)
        self._set_entries(np.arange(len(self._image_ids)), max_samples, "openimage_max_samples", self._image_ids)

    def _build_index(self) -> dict[str, np.ndarray]:
        """Stream the CSV (2.7 million rows in the release) into arrays, rows grouped by image.

        The ids of all rows are one array of fixed width, so that sorting it groups the rows; no row becomes an object
        that stays.
        """
        watched = watch_files([self.csv_path])
        chunks: list[np.ndarray] = [np.empty(0, "S1")]

        def mask_paths() -> Iterator[str]:
            with progress_bar(f"reading {self.csv_path.name}", "row") as bar:
                for rows in in_chunks(self._read_valid_rows(), _CHUNK_ROWS):
                    yield from (mask_path for mask_path, _ in rows)
                    chunks.append(np.array([image_id for _, image_id in rows]))
                    bar.update(len(rows))

        paths = StringTable.from_strings(mask_paths())
        ids = np.concatenate(chunks)
        chunks.clear()
        rows = np.argsort(ids, kind="stable")
        ids = ids[rows]
        starts = np.flatnonzero(np.concatenate((np.ones(min(1, len(ids)), bool), ids[1:] != ids[:-1])))
        return {
            **StringTable.from_strings(ids[start].decode() for start in starts).to_arrays("image_id"),
            **paths.to_arrays("mask_path"),
            "rows": rows,
            "row_starts": np.append(starts, len(ids)),
            **watched,
        }

    def _read_valid_rows(self) -> Iterator[tuple[str, bytes]]:
        """Yield (mask path, ImageID in UTF-8) of each row.

        Raises:
            ConfigError: the file cannot be read as UTF-8 CSV, has another header, or a broken row.
        """
        path = str(self.csv_path)
        fix = "the file is damaged or incomplete: download it again"
        try:
            with io.TextIOWrapper(open_file(self.csv_path), encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(read_lines(file))
                rows = (row for row in reader if row)
                header = next(rows, [])
                if "MaskPath" not in header or "ImageID" not in header:
                    expected = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
                    seen = ",".join(header) or "an empty file"
                    fix = "give the annotations-object-segmentation CSV of Open Images V5 to V7"
                    raise ConfigError(explain("the Open Images CSV has another header", path, seen, expected, fix))
                path_column, id_column = header.index("MaskPath"), header.index("ImageID")
                for row in rows:
                    image_id = row[id_column].encode() if len(row) == len(header) else b""
                    if not image_id or len(image_id) > _MAX_ID_BYTES or b"\0" in image_id or not row[path_column]:
                        where, seen = f"{path}, line {reader.line_num}", ",".join(row)[:80]
                        expected = f"{len(header)} columns, MaskPath and ImageID filled, an ImageID of at most "
                        expected += f"{_MAX_ID_BYTES} bytes, without NUL"
                        raise ConfigError(explain("a CSV row is broken", where, seen, expected, fix))
                    yield row[path_column], image_id
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(explain("a CSV file cannot be read", path, error, "UTF-8 CSV", fix)) from error

    def entry_id(self, index: int) -> str:
        """Return the ImageID."""
        return self._image_ids[int(self._rows[index])]

    def image_path(self, index: int) -> Path:
        """Return where the image is, or should be.

        Raises:
            SampleError: ``unsafe_path``.
        """
        return safe_join(self.images, f"{self.entry_id(index)}.jpg")

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
        """Read image ``index`` with up to ``regions_per_image`` objects drawn by ``rng``.

        A mask that is empty or cannot be used is replaced by the next drawn. A region's id is its mask's name without
        ImageID and ``.png``, ``<label without slashes>_<BoxID>``.
        """
        entry, image_id = int(self._rows[index]), self.entry_id(index)
        rows = self._masks_by_image[self._starts[entry] : self._starts[entry + 1]].tolist()
        names = list(dict.fromkeys(self._mask_paths[row] for row in rows))  # a row may be there twice
        picture, first_fits = (
            read_picture(self.image_path(index), apply_exif=self.exif == "apply", needed=needed),
            False,
        )

        def decode(number: int) -> np.ndarray:
            nonlocal picture, first_fits
            path = safe_join(self.masks, names[number])
            mask = foreground_of(open_image_file(path))
            if not first_fits and not _same_aspect(mask, picture):
                turned = read_picture(self.image_path(index), apply_exif=True)
                picture = turned if _same_aspect(mask, turned) else picture
            if not _same_aspect(mask, picture):
                what = "a mask and its image have different aspect ratios"
                seen = f"mask {mask.shape[1]} x {mask.shape[0]}, image {picture.size[1]} x {picture.size[0]} (W x H)"
                expected = f"aspect ratios within {ASPECT_TOLERANCE:.0%}"
                fix = "the image is another rendition or was turned: download the original"
                raise SampleError("aspect_mismatch", explain(what, str(path), seen, expected, fix))
            first_fits = True
            return resize_mask(mask, picture.size)

        ids = [name.rsplit("/", 1)[-1].removesuffix(".png").removeprefix(f"{image_id}_") for name in names]
        labels = [name.rpartition("_")[0] for name in ids]
        where = f"{self.csv_path}: {image_id}"
        passed: list[SkippedRegion] = []
        drawn, masks = self._draw(
            rng,
            len(names),
            decode,
            where,
            picture=lambda: picture,
            classes=labels,
            passed_over=passed,
            region_id=ids.__getitem__,
        )
        return self._sample(index, picture, masks, [ids[number] for number in drawn], passed_over=passed)


def _same_aspect(mask: np.ndarray, picture: Picture) -> bool:
    ratio: float = (mask.shape[1] * picture.size[0]) / (mask.shape[0] * picture.size[1])
    return max(ratio, 1 / ratio) <= 1 + ASPECT_TOLERANCE

"""Reader of SA-1B: photographs with many class-agnostic masks and no text.

Format: Kirillov et al. 2023, arXiv 2304.02643 (:data:`LAYOUT`; its forms may be mixed and nested in sub-folders).
Archives, gzipped or not, are read in place (:mod:`~dual_loop.data.tar`).

The size in a run-length code must be the decoded image's (:func:`~dual_loop.data.masks.fit_mask`): mirrors ship resized
images with the original masks. Masks are drawn on the stored pixels, so an EXIF orientation is not applied unless
``data.exif`` says so.

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``not_an_image``,
``broken_json``, ``broken_rle``, ``size_mismatch``, ``no_region_left``.
"""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dual_loop.data.coco_masks import decode_polygons
from dual_loop.data.images import read_picture
from dual_loop.data.index import index_folder, load_or_build
from dual_loop.data.layout import layout_error
from dual_loop.data.masks import decode_rle, fit_mask
from dual_loop.data.reader import Reader, read_annotations
from dual_loop.data.sa1b_index import build_index
from dual_loop.data.string_table import StringTable
from dual_loop.data.tar import TarShelf
from dual_loop.errors import bad_sample, explain, shorten
from dual_loop.types import NeededSize, RegionSample

LAYOUT = """
  root/                        or root/
    sa_<id>.jpg                     img/sa_<id>.jpg      (or images/)
    sa_<id>.json                    js/sa_<id>.json      (or annotations/)
  (or sub-folders that look like one of these, or sa_<shard>.tar as released)
"""


class Sa1b(Reader):
    """SA-1B; an entry is an image with its masks.

    Args (further ones are those of :class:`~dual_loop.data.reader.Reader`):
        min_predicted_iou, min_stability_score: limits on the two scores of an annotation; above 0, an annotation
            without the score does not pass.

    Raises:
        ConfigError: the folder does not exist or holds no image.
    """

    name, title, layout = "sa1b", "SA-1B", LAYOUT

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
        super().__init__(root, index_dir, regions_per_image, min_area, max_area)
        self.min_scores = {"predicted_iou": min_predicted_iou, "stability_score": min_stability_score}
        # The number changes where a listing finds another result: since 3, archives are looked at to their end.
        key = {"kind": "sa1b", "root": str(self.root), "version": 3}
        arrays = load_or_build(index_dir, key, lambda: build_index(self.root, index_dir, key, entry_name))
        tables = [StringTable.from_arrays(arrays, name) for name in ("image", "record", "tar", "damage")]
        self._images, self._records, tars, damages = tables
        self._image_place, self._record_place = arrays["image_place"], arrays["record_place"]
        self._shelf = TarShelf(self.root, tars, index_folder(index_dir))
        self.damaged_archives = {tars[number]: damages[number] for number in range(len(tars)) if damages[number]}
        if self.damaged_archives:
            name, text = next(iter(self.damaged_archives.items()))
            what = "archives of SA-1B are damaged; what comes before the damage is used"
            seen, fix = f"{text}; {len(self.damaged_archives)} damaged in all", "download them again"
            warnings.warn(explain(what, str(self.root / name), seen, "whole archives", fix), stacklevel=2)
        has_image, has_record = (np.diff(table.offsets) > 0 for table in (self._images, self._records))
        if not has_image.any():
            seen = f"no sa_*.jpg, {len(self._records)} sa_*.json{_unread_names(self.root)}"
            raise layout_error("the SA-1B folder holds no image", self.root, seen, LAYOUT)
        if not (has_image & has_record).any():
            seen = f"{has_image.sum():,} images and {has_record.sum():,} JSON files, none of the same stem"
            raise layout_error("no image of the SA-1B folder has its JSON file", self.root, seen, LAYOUT)
        self.left_out = {
            "JSON files without an image": int((~has_image).sum()),
            "images without a JSON file": int((~has_record).sum()),
            "images that are there twice": int(arrays["num_doubled"][0]),
            "damaged archives, in part": len(self.damaged_archives),
        }
        rows = np.flatnonzero(has_image & has_record)
        self._set_entries(rows, max_samples, "sa1b_max_samples", self._images)

    def entry_id(self, index: int) -> str:
        """Return ``sa_<id>``, after the sub-folder where there is one."""
        row = int(self._rows[index])
        return entry_name(self._images[row])

    def image_path(self, index: int) -> Path | None:
        """Return the image file, None where it is inside an archive."""
        row = int(self._rows[index])
        return self.root / self._images[row] if self._image_place[row, 0] < 0 else None

    def _read(self, name: str, place: np.ndarray) -> Path | io.BytesIO:
        """Return a file, or what an archive holds of it."""
        number, offset, size = place.tolist()
        return self.root / name if number < 0 else io.BytesIO(self._shelf.read(number, offset, size))

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
        """Read image ``index`` with up to ``regions_per_image`` regions, drawn by ``rng`` among those that pass."""
        row = int(self._rows[index])
        image_name, record_name = self._images[row], self._records[row]
        record = self.root / record_name
        read = read_annotations(self._read(record_name, self._record_place[row]), str(record))
        content: dict[str, Any] = read if isinstance(read, dict) else {}
        annotations = content.get("annotations")
        if not isinstance(annotations, list) or not all(isinstance(item, dict) for item in annotations):
            expected = '{"image": {...}, "annotations": [{...}, ...]}'
            raise bad_sample("broken_json", "no annotation file of SA-1B", str(record), shorten(read), expected)
        stored = self._read(image_name, self._image_place[row])
        picture = read_picture(stored, self.exif == "apply", str(self.root / image_name), needed)
        image = content.get("image")
        height, width = (image.get(key) if isinstance(image, dict) else None for key in ("height", "width"))
        size = (height, width) if type(height) is int and type(width) is int else picture.size
        # The scores cost nothing, so they come first; the area is checked on the decoded mask.
        limits = [(key, least) for key, least in self.min_scores.items() if least > 0]
        scores = [[annotation.get(key) for key, _ in limits] for annotation in annotations]
        passing = [
            number
            for number, found in enumerate(scores)
            if all(isinstance(s, (int, float)) and s >= least for s, (_, least) in zip(found, limits, strict=True))
        ]

        def decode(position: int) -> np.ndarray:
            where, code = f"{record}[{passing[position]}]", annotations[passing[position]].get("segmentation", {})
            # A converted set has polygons.
            mask = decode_polygons(code, *size, where) if isinstance(code, list) else decode_rle(code, where)
            return fit_mask(mask, picture.size, where)

        needs = "".join(f"{key} >= {least:g}, " for key, least in limits)
        where = f"{record}, {len(annotations)} annotations, {len(passing)} of them with high enough scores"
        # The annotations' own ids; where one is missing or used twice, their positions in the file.
        ids = [annotation.get("id") for annotation in annotations]
        is_own = all(isinstance(value, (int, str)) for value in ids) and len({str(value) for value in ids}) == len(ids)
        names = [str(ids[number]) if is_own else f"at{number}" for number in passing]
        name_of, picture_of = names.__getitem__, lambda: picture
        drawn = self._draw(rng, len(passing), decode, where, region_id=name_of, limits=needs, picture=picture_of)
        return self._sample(index, picture, drawn, [names[position] for position in drawn.numbers])


def entry_name(path: str) -> str:
    """Return ``sa_<id>`` of a file, after the sub-folder where there is one."""
    folder, _, file = path.rpartition("/")
    return _folder_of_name(folder) + file.rsplit(".", 1)[0]


@lru_cache(maxsize=1 << 16)
def _folder_of_name(folder: str) -> str:
    return "".join(f"{part}/" for part in folder.split("/") if part not in ("", "img", "js", "images", "annotations"))


def _unread_names(root: Path) -> str:
    """Return what stands out in a folder that holds nothing to read: names without suffix, links that lead nowhere."""
    paths = sorted(root.iterdir())
    plain = [path.name for path in paths if path.is_file() and not path.suffix]
    lost = [path.name for path in paths if not path.exists()]
    found = f", {len(plain)} files without a suffix such as {plain[0]} (archives end in .tar)" if plain else ""
    return found + (f", {len(lost)} links that lead nowhere such as {lost[0]}" if lost else "")

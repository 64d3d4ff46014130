"""Reader of SA-1B: photographs with many class-agnostic masks and no text.

Format: Kirillov et al. 2023, arXiv 2304.02643 (:data:`LAYOUT`; its forms may be mixed and nested in sub-folders).
Archives, gzipped or not, are read in place (:mod:`~dual_loop.data.tar`).

Mask size: the size in the run-length code must be the decoded image's; up to 2 pixels a side are bridged by nearest
resizing (:func:`~dual_loop.data.masks.fit_mask`), more is a bad sample, as mirrors ship resized images with the
original masks. Masks are drawn on the stored pixels, so an EXIF orientation is never applied.

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``not_an_image``,
``broken_json``, ``broken_rle``, ``size_mismatch``, ``no_region_left``.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np

from dual_loop.data.images import read_picture
from dual_loop.data.index import index_folder, load_or_build
from dual_loop.data.layout import layout_error
from dual_loop.data.masks import decode_rle, fit_mask
from dual_loop.data.reader import Reader, read_annotations
from dual_loop.data.sa1b_index import build_index
from dual_loop.data.string_table import StringTable
from dual_loop.data.tar import TarShelf
from dual_loop.errors import SampleError, explain
from dual_loop.types import NeededSize, RegionSample, SkippedRegion

LAYOUT = """
  root/                        or root/
    sa_<id>.jpg                     img/sa_<id>.jpg
    sa_<id>.json                    js/sa_<id>.json
  (or sub-folders that look like one of these, or sa_<shard>.tar as released)
"""


class Sa1b(Reader):
    """SA-1B; an entry is an image with its masks.

    Args (further ones are those of :class:`~dual_loop.data.reader.Reader`):
        max_samples: keep this many images, drawn with a fixed seed; None keeps all. A cap counts image files, so
            JSON files without an image are left out under it.
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
        # The number changes where a listing leaves other files behind: since 2, points of gzip archives 1 MiB apart.
        key = {"kind": "sa1b", "root": str(self.root), "version": 2}
        arrays = load_or_build(index_dir, key, lambda: build_index(self.root, index_dir, key, entry_name))
        self._images = StringTable.from_arrays(arrays, "image")
        self._records = StringTable.from_arrays(arrays, "record")
        self._image_place, self._record_place = arrays["image_place"], arrays["record_place"]
        tars, damages = StringTable.from_arrays(arrays, "tar"), StringTable.from_arrays(arrays, "damage")
        self._shelf = TarShelf(self.root, tars, index_folder(index_dir))
        self.damaged_archives = {tars[number]: damages[number] for number in range(len(tars)) if damages[number]}
        if self.damaged_archives:
            name, text = next(iter(self.damaged_archives.items()))
            what = "archives of SA-1B are damaged; what comes before the damage is used"
            seen, fix = f"{text}; {len(self.damaged_archives)} damaged in all", "download them again"
            warnings.warn(explain(what, str(self.root / name), seen, "whole archives", fix), stacklevel=2)
        has_image = np.flatnonzero(np.diff(self._images.offsets) > 0)
        if not len(has_image):
            seen = f"no sa_*.jpg, {len(self._records)} sa_*.json"
            raise layout_error("the SA-1B folder holds no image", self.root, seen, LAYOUT)
        rows = np.arange(len(self._images)) if max_samples is None else has_image
        self._set_entries(rows, max_samples, "sa1b_max_samples", self._images, self._records)

    def entry_id(self, index: int) -> str:
        """Return ``sa_<id>``, after the sub-folder where there is one."""
        row = int(self._rows[index])
        return entry_name(self._images[row] or self._records[row])

    def image_path(self, index: int) -> Path | None:
        """Return the image file, None where the entry is a JSON file without one, or inside an archive."""
        row = int(self._rows[index])
        name = self._images[row]
        return self.root / name if name and self._image_place[row, 0] < 0 else None

    def _read(self, name: str, place: np.ndarray) -> Path | io.BytesIO:
        """Return a file, or what an archive holds of it."""
        number, offset, size = place.tolist()
        return self.root / name if number < 0 else io.BytesIO(self._shelf.read(number, offset, size))

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
        """Read image ``index`` with up to ``regions_per_image`` regions, drawn by ``rng`` among those that pass.

        One that fails the area limits, or cannot be decoded, is replaced by the next drawn.
        """
        row = int(self._rows[index])
        image_name, record_name = self._images[row], self._records[row]
        if not image_name or not record_name:
            lacking = "image" if not image_name else "JSON file"
            where, expected = str(self.root / (image_name or record_name)), f"a {lacking} of the same stem"
            raise SampleError("missing_file", explain(f"an SA-1B {lacking} is missing", where, "no partner", expected))
        record = self.root / record_name
        content = read_annotations(self._read(record_name, self._record_place[row]), str(record))
        annotations = content.get("annotations") if isinstance(content, dict) else None
        if not isinstance(annotations, list) or not all(isinstance(item, dict) for item in annotations):
            seen, expected = f"{str(content)[:60]}...", '{"image": {...}, "annotations": [{...}, ...]}'
            what, fix = "an annotation file is not of SA-1B", "download this file again"
            raise SampleError("broken_json", explain(what, str(record), seen, expected, fix))
        stored = self._read(image_name, self._image_place[row])
        picture = read_picture(stored, self.exif == "apply", str(self.root / image_name), needed)
        # The scores cost nothing, so they come first; the area is checked on the decoded mask.
        limits = [(key, least) for key, least in self.min_scores.items() if least > 0]
        scores = [[annotation.get(key) for key, _ in limits] for annotation in annotations]
        passing = [
            number
            for number, found in enumerate(scores)
            if all(isinstance(s, (int, float)) and s >= least for s, (_, least) in zip(found, limits, strict=True))
        ]

        def decode(position: int) -> np.ndarray:
            number = passing[position]
            where = f"{record}[{number}]"
            return fit_mask(decode_rle(annotations[number].get("segmentation", {}), where), picture.size, where)

        needs = "".join(f"{key} >= {least:g}, " for key, least in limits)
        where = f"{record}, {len(annotations)} annotations, {len(passing)} of them with high enough scores"
        # The annotations' own ids; where one is missing or used twice, their positions in the file.
        ids = [annotation.get("id") for annotation in annotations]
        is_own = all(isinstance(value, (int, str)) for value in ids) and len({str(value) for value in ids}) == len(ids)
        names = [str(ids[number]) if is_own else f"at{number}" for number in passing]
        passed: list[SkippedRegion] = []
        drawn, masks = self._draw(
            rng, len(passing), decode, where, needs, lambda: picture, passed_over=passed, region_id=names.__getitem__
        )
        return self._sample(index, picture, masks, [names[position] for position in drawn], passed_over=passed)


def entry_name(path: str) -> str:
    """Return ``sa_<id>`` of a file, after the sub-folder where there is one."""
    *folders, file = path.split("/")
    return "/".join([*(folder for folder in folders if folder not in ("img", "js")), file.rsplit(".", 1)[0]])

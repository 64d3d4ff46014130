"""Reader of RefCOCO mirrors in parquet: the columns of ``jxu124/refcoco*``, ``lmms-lab/RefCOCO*`` and RefCOCO-M.

* jxu124: one row a reference; ``image_id``, ``ref_id``, ``sentences`` (list of {sent, raw}), ``raw_anns`` and
  ``raw_image_info`` as JSON text. No pixels. Its files are named by split, and ``test`` there is RefCOCO's testA.
* lmms-lab: one row an object with its picture: ``image`` ({bytes, path} or bytes), ``answer`` (expressions),
  ``segmentation`` (one polygon, or a list of them), ``question_id``. There is no train split.
* ``moondream/refcoco-m``: one row a picture, ``image`` as above; ``samples`` is a list of objects with ``sentences``
  (texts) and ``mask`` (a COCO run-length code). Read in code that loads it: its card names no columns of ``samples``.

Needs pyarrow (``pip install 'dual-loop[parquet]'``). Reasons of :class:`~dual_loop.errors.SampleError`:
``missing_file``, ``truncated_file``, ``not_an_image``, ``unsafe_path``, ``bad_polygon``, ``broken_rle``,
``broken_json``, ``size_mismatch``, ``empty_mask``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dual_loop.data.captions import check_captions
from dual_loop.data.coco_masks import mend_polygons
from dual_loop.data.images import read_picture
from dual_loop.data.limits import RefusedFile, check_file, max_file_bytes, of_content, parse_json
from dual_loop.data.masks import check_mask, decode_segmentation, fit_mask
from dual_loop.data.reader import Reader, take_regions
from dual_loop.data.refcoco import find_coco_image
from dual_loop.errors import ConfigError, EnvironmentProblem, SampleError, bad_sample, explain, shorten
from dual_loop.types import RegionSample

JXU_COLUMNS = {"image_id", "ref_id", "sentences", "raw_anns", "raw_image_info"}
LMMS_COLUMNS = {"image", "answer", "segmentation"}
MOONDREAM_COLUMNS = {"image", "samples"}

Row = Mapping[str, Any]


class RefParquet(Reader):
    """Parquet files of references, grouped by image.

    Args:
        path: a file, or a folder of files of one layout (also in its ``data/``).
        images: folder of the COCO images, for files without pixels.
        polygons: ``union`` or ``summed``, see :class:`~dual_loop.data.refcoco.RefCoco`.

    Raises:
        ConfigError: the file cannot be read, has other columns, or needs ``images``.
        EnvironmentProblem: pyarrow is not installed.
    """

    name = "refcoco"

    def __init__(self, path: str | Path, images: str | Path | None = None, polygons: str = "union") -> None:
        self.path = Path(path)
        self._decode = partial(decode_segmentation, summed=polygons == "summed")
        self._table = _open_table(self.path)
        columns = set(self._table.column_names)
        self.has_pixels = columns >= LMMS_COLUMNS or columns >= MOONDREAM_COLUMNS
        if columns >= MOONDREAM_COLUMNS:
            self.protocol = "RefCOCO-M: gIoU and cIoU over all expressions, against its own masks"
        if not self.has_pixels and not columns >= JXU_COLUMNS:
            layouts = (JXU_COLUMNS, LMMS_COLUMNS, MOONDREAM_COLUMNS)
            expected = "; or ".join(", ".join(sorted(layout)) for layout in layouts)
            raise ConfigError(explain("not a known layout of references", str(path), sorted(columns), expected))
        if not self.has_pixels and images is None:
            raise ConfigError(explain("the file holds no pixels", str(path), fix="give --refcoco_images DIR"))
        self.images = Path(images or ".").expanduser()
        # lmms-lab rows carry their picture; rows of one photograph share its file name where that is given.
        key = next((name for name in ("image_id", "file_name", "question_id") if name in columns), None)
        names = self._table.column(key).to_pylist() if key else range(self._table.num_rows)
        groups: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            groups.setdefault(str(name).removesuffix(".jpg"), []).append(row)
        self._groups = sorted(groups.items())

    def __len__(self) -> int:
        return len(self._groups)

    def entry_id(self, index: int) -> str:
        """Return ``<file stem>/<image>``."""
        return f"{self.path.stem}/{self._groups[index][0]}"

    def image_path(self, index: int) -> Path | None:
        """Return the image file, None where the pixels are in the parquet file."""
        return None if self.has_pixels else self._find_image(self._record(self._groups[index][1][0]))

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Return the same as :meth:`load_all`: mirrors are for evaluation."""
        return self.load_all(index)

    def load_all(self, index: int) -> RegionSample:
        """Read one image with all its references; those that cannot be used are passed over.

        Raises:
            SampleError: see the module; the reason of the first reference where none can be used.
        """
        _, rows = self._groups[index]
        records, rows = self._records(rows)
        if self.has_pixels:
            stored = records[0]["image"]
            raw = stored.get("bytes") if isinstance(stored, Mapping) else stored
            raw = raw if isinstance(raw, bytes) else b""
            try:
                picture = read_picture(io.BytesIO(raw), False, f"{self.path}, row {rows[0]}")
            except SampleError as error:
                raise SampleError("truncated_file", str(error)) from error
        else:
            picture = read_picture(self._find_image(records[0]), apply_exif=False)
        names = [f"ref{record.get('ref_id', row)}" for row, record in zip(rows, records, strict=True)]
        if len(set(names)) < len(names):
            names = [f"{name}_{row}" for name, row in zip(names, rows, strict=True)]
        captions: dict[int, tuple[str, ...]] = {}

        def decode(number: int) -> np.ndarray:
            record, where = records[number], f"{self.path}, row {rows[number]}"
            with of_content(where):
                mask, captions[number] = self._mask(record, picture.size, where), _expressions(record, where)
            check_mask(mask, where)
            check_captions(captions[number], where)
            return mask

        taken = take_regions(range(len(rows)), decode, names.__getitem__)
        if not taken.numbers:
            raise SampleError(taken.passed_over[0].reason, taken.passed_over[0].message)
        ids, texts = [names[number] for number in taken.numbers], [captions[number] for number in taken.numbers]
        return self._sample(index, picture, taken, ids, texts)

    def _records(self, rows: list[int]) -> tuple[list[Row], list[int]]:
        """Return the objects of ``rows``, and the row of each."""
        records = [self._record(row) for row in rows]
        if "samples" not in self._table.column_names:
            return records, rows
        with of_content(f"{self.path}, row {rows[0]}: samples"):
            found = [
                ({"image": record["image"], "segmentation": one["mask"], "answer": one["sentences"]}, row)
                for row, record in zip(rows, records, strict=True)
                for one in record["samples"]
            ]
            return [record for record, _ in found], [row for _, row in found]

    def _record(self, row: int) -> Row:
        return dict(self._table.slice(row, 1).to_pylist()[0])

    def _find_image(self, record: Row) -> Path:
        with of_content(f"{self.path}, image {shorten(record['image_id'])}"):
            image_id = int(record["image_id"])
            name = _json(record["raw_image_info"], str(self.path)).get("file_name")
            return find_coco_image(self.images, str(name or f"{image_id:012d}.jpg"), image_id)

    def _mask(self, record: Row, size: tuple[int, int], where: str) -> np.ndarray:
        if not self.has_pixels:
            info = _json(record["raw_image_info"], where)
            segmentation = _json(record["raw_anns"], where).get("segmentation")
            stored = (int(info.get("height", size[0])), int(info.get("width", size[1])))
            return fit_mask(self._decode(mend_polygons(segmentation, where), *stored, where), size, where)
        segmentation = record["segmentation"]
        if isinstance(segmentation, str):
            segmentation = _json(segmentation, where)
        return self._decode(mend_polygons(segmentation, where), *size, where)


def _open_table(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
        from pyarrow.lib import ArrowException
    except ImportError as error:
        fix = "pip install 'dual-loop[parquet]'"
        raise EnvironmentProblem(explain("parquet files need pyarrow", str(path), "not installed", fix=fix)) from error
    try:
        batches, left, schema = [], max_file_bytes(), None
        for part in sorted(chain(path.glob("*.parquet"), path.glob("data/*.parquet"))) if path.is_dir() else [path]:
            check_file(part)
            with parquet.ParquetFile(part) as file:
                schema = schema or file.schema_arrow
                for batch in file.iter_batches(batch_size=64):  # a column of one value is a few bytes at any length
                    batches.append(batch)
                    left -= batch.nbytes
                    if left < 0:
                        limit = f"{max_file_bytes():,} bytes when it is unpacked (data.max_file_mb)"
                        raise RefusedFile(f"more than {limit}")
        if schema is None:
            raise FileNotFoundError("no *.parquet and no data/*.parquet")
        return pyarrow.Table.from_batches(batches, schema)
    except (OSError, ValueError, MemoryError, ArrowException) as error:
        raise ConfigError(explain("a parquet file cannot be read", str(path), error, fix="get it again")) from error


def _json(text: Any, where: str) -> Any:
    try:
        value = parse_json(text) if isinstance(text, str) else text
    except ValueError as error:
        raise bad_sample("broken_json", "a column holds no JSON", where, shorten(text)) from error
    return value if isinstance(value, (dict, list)) else {}


def _expressions(record: Row, where: str) -> tuple[str, ...]:
    if "sentences" in record:
        texts = [s.get("sent") or s.get("raw") for s in record["sentences"] if isinstance(s, Mapping)]
    else:
        answer = record["answer"]
        texts = [answer] if isinstance(answer, str) else list(answer or ())
    if not all(isinstance(text, str) for text in texts):
        raise bad_sample("broken_json", "an expression is no text", where, shorten(texts), "text")
    return tuple(text.strip() for text in texts if text and text.strip())

"""The leakage guard: training images that are held out for evaluation in RefCOCO, RefCOCO+ or RefCOCOg.

The three sets share COCO's photographs but not their splits, and other collections contain COCO images under names of
their own. Two ways to find them:

* **by id** (:func:`leaked_by_id`): the COCO id of an image, as RefCOCO states it or as a file name carries it (twelve
  digits that stand alone, ``COCO_train2014_000000581857.jpg`` or ``000000581857.jpg``). Costs nothing; blind to renamed
  files.
* **by sight** (:func:`leaked_by_sight`): every image is reduced to 24 x 24 grey values, and pairs whose values
  correlate by at least 0.98 count as the same photograph. Finds copies that were renamed, resized or compressed
  again, also where colours were changed a little; blind to crops and mirror images. Reads every image once.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dual_loop.config import DataConfig
from dual_loop.data.images import decoding
from dual_loop.data.limits import use_limits
from dual_loop.data.reader import Reader
from dual_loop.data.refcoco import open_parts
from dual_loop.data.string_table import StringTable
from dual_loop.errors import ConfigError, SampleError, explain
from dual_loop.iteration import evenly_spread, in_chunks
from dual_loop.types import NeededSize, RegionSample

logger = logging.getLogger(__name__)

COCO_NAME = re.compile(r"(?<![0-9A-Za-z])(\d{12})(?![0-9A-Za-z])")
_DIGITS = re.compile(rb"[0-9]{12,}")
THUMBNAIL_SIDE = 24
SAME_CORRELATION = 0.98
_CHUNK = 4096


@dataclass(frozen=True)
class HeldOutImage:
    """An image that must not be trained on: its COCO id, the split that holds it, and its file if it is there."""

    coco_id: int
    split: str
    path: Path | None


@dataclass(frozen=True)
class Leak:
    """A training entry that shows a held-out image."""

    source: str
    entry: int
    entry_id: str
    held_out: HeldOutImage
    found_by: str

    def __str__(self) -> str:
        image = f"COCO image {self.held_out.coco_id} of {self.held_out.split}"
        return f"{self.source}/{self.entry_id} is {image} (found by {self.found_by})"


def coco_id_of_name(name: str) -> int | None:
    """Return the COCO id that a file name carries, None where there is none."""
    match = COCO_NAME.search(name)
    return int(match[1]) if match else None


def held_out_of(data: DataConfig) -> dict[int, HeldOutImage]:
    """Return the images of ``refcoco_dir`` and ``eval_dir`` in a split that is not ``train``, by COCO id."""
    use_limits(data)
    parts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the readers themselves say which sets are not there
        for given, datasets in ((data.refcoco_dir, data.refcoco_datasets), (data.eval_dir, data.eval_datasets)):
            root = Path(given or "").expanduser()
            if given is not None and root.is_dir():
                parts += open_parts(root, datasets, data.refcoco_images, data.index_dir)
    found: dict[int, HeldOutImage] = {}
    for part in parts:
        for split in part.split_names:
            for number, _, _ in part.entries(split) if split != "train" else ():
                coco_id = int(part.image_ids[number])
                path: Path | None = None
                with contextlib.suppress(SampleError):
                    path = part.find_image(number)
                found.setdefault(coco_id, HeldOutImage(coco_id, f"{part.label} {split}", path))
    return found


def leaked_by_id(source: Reader, held_out: Mapping[int, HeldOutImage]) -> list[Leak]:
    """Return the entries whose COCO id is held out; works from the index alone.

    Where ``named_rows()`` offers tables they are searched as a whole, a million names in well under a second; other
    sources are asked name by name.
    """
    own_id = getattr(source, "coco_id", None)
    entries: Iterable[int] = range(len(source) if held_out else 0)
    tables, rows = source.named_rows()
    if held_out and tables:
        suspects = np.concatenate([_suspect_rows(table, held_out) for table in tables])
        entries = np.flatnonzero(np.isin(rows, suspects)).tolist()
    leaks = []
    for index in entries:
        name = source.entry_id(index)
        number = own_id(index) if own_id is not None else coco_id_of_name(name)
        if number is not None and number in held_out:
            leaks.append(Leak(source.name, index, name, held_out[number], "id"))
    return leaks


def _suspect_rows(table: StringTable, held_out: Mapping[int, HeldOutImage]) -> np.ndarray:
    """Return all rows that may hold a held-out id, and a few that do not: the strings have no borders in the search.

    A run of digits longer than twelve may be made of the end of one string and the beginning of the next, so every
    string that it touches is suspect. A run of twelve over a border is no id in either.
    """
    found = [
        match.span()
        for match in _DIGITS.finditer(np.ascontiguousarray(table.data).data)
        if match.end() - match.start() > 12 or int(match[0]) in held_out
    ]
    spans = np.array(found, np.int64).reshape(-1, 2)
    # Empty strings share an offset with their neighbour: "right" finds the last of them, which holds the bytes.
    first = np.searchsorted(table.offsets, spans[:, 0], side="right") - 1
    last = np.searchsorted(table.offsets, spans[:, 1] - 1, side="right") - 1
    touched = [np.arange(start, stop + 1) for start, stop in zip(first.tolist(), last.tolist(), strict=True)]
    return np.unique(np.concatenate([np.empty(0, np.int64), *touched]))


def leaked_by_sight(
    source: Reader, held_out: Sequence[HeldOutImage], limit: int | None = None
) -> tuple[list[Leak], int]:
    """Return the entries that look like a held-out image, and how many entries were looked at.

    Args:
        source: entries without an image file of their own (frame pairs) are looked at through their first frame.
        held_out: those without a file are left out.
        limit: look at so many entries at most, evenly spread; None looks at all.
    """
    known = [(image, print_) for image in held_out if (print_ := fingerprint(image.path)) is not None]
    if not known:
        return [], 0
    count = len(source) if limit is None else limit
    table = np.stack([print_ for _, print_ in known])
    leaks, looked_at = [], 0
    for chunk in in_chunks(evenly_spread(len(source), count), _CHUNK):
        seen = []
        for index in chunk:
            try:
                path = source.image_path(index)
                print_ = fingerprint(source.load(index, np.random.default_rng(0)).image if path is None else path)
            except SampleError:
                continue
            if print_ is not None:
                seen.append((index, print_))
        looked_at += len(seen)
        if seen:
            likeness = np.stack([print_ for _, print_ in seen]) @ table.T
            for (index, _), row in zip(seen, likeness, strict=True):
                best = int(row.argmax())
                if row[best] >= SAME_CORRELATION:
                    leaks.append(Leak(source.name, index, source.entry_id(index), known[best][0], "sight"))
    return leaks, looked_at


def fingerprint(image: Path | np.ndarray | None) -> np.ndarray | None:
    """Return 24 x 24 grey values of an image, centred and of length 1: (576,) float32; None where it is unreadable.

    The product of two fingerprints is their correlation. An image of one grey value has none.
    """
    if image is None:
        return None
    opened: contextlib.AbstractContextManager[Image.Image]
    if isinstance(image, np.ndarray):
        opened = contextlib.nullcontext(Image.fromarray(image))
    else:
        opened = decoding(image, str(image))
    try:
        with opened as picture:
            picture.draft("L", (4 * THUMBNAIL_SIDE, 4 * THUMBNAIL_SIDE))  # lets a JPEG decode at an eighth of its size
            small = picture.convert("L").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    except SampleError:
        return None
    values: np.ndarray = np.asarray(small, np.float32).ravel()
    values = values - values.mean()
    length = float(np.linalg.norm(values))
    return values / length if length > 1.0 else None


def guard(sources: Sequence[Reader], data: DataConfig) -> list[Reader]:
    """Apply ``data.leakage_guard`` by id and return the sources to train on.

    Raises:
        ConfigError: under ``error`` where something leaks, under ``drop`` where nothing would be left of a source.
    """
    if data.leakage_guard == "off":
        return list(sources)
    held_out = held_out_of(data)
    guarded: list[Reader] = []
    for source in sources:
        leaks = leaked_by_id(source, held_out)
        if not leaks:
            guarded.append(source)
            continue
        done = {"drop": "they are left out", "warn": "they are trained on", "error": "nothing was started"}
        what = f"training images are held out for evaluation; {done[data.leakage_guard]}"
        seen = f"{len(leaks)} of {len(source)} entries, for example {leaks[0]}"
        fix = "set data.leakage_guard=drop to leave them out; `dual-loop data check` lists them, renamed copies too"
        message = explain(what, f"{source.name}, leakage guard", seen, "no image of val, testA, testB or test", fix)
        if data.leakage_guard == "error" or (data.leakage_guard == "drop" and len(leaks) == len(source)):
            raise ConfigError(message)
        logger.warning(message)
        kept = np.delete(np.arange(len(source)), [leak.entry for leak in leaks])
        guarded.append(Subset(source, kept) if data.leakage_guard == "drop" else source)
    return guarded


class Subset(Reader):
    """Some entries of a reader, as a source of the same name.

    ``kept`` holds their indices in ``source``.
    """

    def __init__(self, source: Reader, kept: np.ndarray) -> None:
        self.source, self.name, self.left_out, self._rows = source, source.name, source.left_out, kept

    def entry_id(self, index: int) -> str:
        return self.source.entry_id(int(self._rows[index]))

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
        return self.source.load_reduced(int(self._rows[index]), rng, needed)

    def image_path(self, index: int) -> Path | None:
        return self.source.image_path(int(self._rows[index]))

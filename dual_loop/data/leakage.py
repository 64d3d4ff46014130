"""The leakage guard: training images that are held out for evaluation in RefCOCO, RefCOCO+ or RefCOCOg.

The three sets share COCO's photographs but not their splits, and other collections contain COCO images under names of
their own. Two ways to find them:

* **by id** (:func:`leaked_by_id`): the COCO id of an image, as RefCOCO states it or as a file name carries it (twelve
  digits that stand alone, ``COCO_train2014_000000581857.jpg`` or ``000000581857.jpg``). Costs nothing.
* **by sight** (:func:`leaked_by_sight`): 6 x 6 grey values of every image, in all quarter turns and mirrored, are
  correlated with those of 81 crops of each held-out image; likely pairs are compared at 24 x 24 with the crop that fits
  best, and count as the same photograph from 0.95 on. Finds copies that were renamed, resized, compressed again, turned
  or mirrored, or lost up to 10 % on any side. Reads every image once.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
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
from dual_loop.iteration import evenly_spread, progress_bar
from dual_loop.types import NeededSize, RegionSample

logger = logging.getLogger(__name__)

COCO_NAME = re.compile(r"(?<![0-9A-Za-z])(\d{12})(?![0-9A-Za-z])")
_DIGITS = re.compile(rb"[0-9]{12,}")
THUMBNAIL_SIDE, FINE, COARSE = 96, 24, 6
SAME_CORRELATION = 0.95
SUSPECT_CORRELATION = 0.9
"""At 6 x 6. Of 80 photographs of COCO all changed copies were above 0.92, and few of the others above 0.9."""

SUSPECTS = 5
"""Most held-out images that one image is compared with at 24 x 24."""

STEP = 1 / 60
CROPS = np.array(list(product((STEP, 3 * STEP, 5 * STEP), repeat=4)))
"""Parts that are cut off left, above, right and below; every crop up to 10 % is within one step of one of these."""
NEAR = np.array(list(product((-STEP, 0.0, STEP), repeat=4)))


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

    Tables of ``named_rows()`` are searched as a whole, a million names in well under a second.
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

    So every string is suspect that a run of more than twelve digits touches; of twelve over a border neither has an id.
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

    Entries without an image file of their own (frame pairs) are looked at through their first frame; with ``limit`` so
    many at most, evenly spread. Held-out images without a file are left out.
    """
    known = [(image, small) for image in held_out if (small := thumbnail(image.path)) is not None]
    if not known:
        return [], 0
    table = np.concatenate([prints_of_crops(small, CROPS, COARSE) for _, small in known]).T
    leaks, looked_at = [], 0
    indices = evenly_spread(len(source), len(source) if limit is None else limit)
    for index in progress_bar(f"looking for held-out images in {source.name}", "image", len(indices), indices):
        try:
            path = source.image_path(index)
            small = thumbnail(source.load(index, np.random.default_rng(0)).image if path is None else path)
        except SampleError:
            continue
        if small is None:
            continue
        looked_at += 1
        likeness = (_turned(small, COARSE) @ table).reshape(8, len(known), len(CROPS))
        for number in np.argsort(-likeness.max(axis=(0, 2)), kind="stable")[:SUSPECTS].tolist():
            turn, crop = np.unravel_index(likeness[:, number].argmax(), (8, len(CROPS)))
            if likeness[turn, number, crop] < SUSPECT_CORRELATION:
                break
            fitting, best = CROPS[crop], 0.0
            for _ in range(2):  # the crop that fits best at 6 x 6 may be two steps off
                near = np.clip(fitting + NEAR, 0, None)
                fine = prints_of_crops(known[number][1], near, FINE) @ _turned(small, FINE)[turn]
                fitting, best = near[fine.argmax()], float(fine.max())
            if best >= SAME_CORRELATION:
                leaks.append(Leak(source.name, index, source.entry_id(index), known[number][0], "sight"))
                break
    return leaks, looked_at


def thumbnail(image: Path | np.ndarray | None) -> np.ndarray | None:
    """Return an image as (96, 96) grey values 0..255, float32; None where it is unreadable or of one grey value."""
    if image is None:
        return None
    in_memory = contextlib.nullcontext(Image.fromarray(image)) if isinstance(image, np.ndarray) else None
    try:
        with in_memory or decoding(str(image), str(image)) as picture:
            picture.draft("L", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))  # lets a JPEG decode at an eighth of its size
            small = picture.convert("L").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    except SampleError:
        return None
    values = np.asarray(small, np.float32)
    return values if _pooled(values, FINE).std() * FINE > 1.0 else None


def prints_of_crops(small: np.ndarray, crops: np.ndarray, side: int) -> np.ndarray:
    """Return fingerprints (n, side * side) float32 of what is left by n crops: parts off left, above, right, below."""
    whole = np.array([0, 0, THUMBNAIL_SIDE, THUMBNAIL_SIDE])
    picture, boxes = Image.fromarray(small), whole + crops * THUMBNAIL_SIDE * [1, 1, -1, -1]
    resized = [picture.resize((side, side), Image.Resampling.BOX, tuple(box)) for box in boxes.tolist()]
    return _normalised(np.stack([np.asarray(crop) for crop in resized]))


def _turned(small: np.ndarray, side: int) -> np.ndarray:
    """Return fingerprints (8, side * side) of a thumbnail and its quarter turns, and of their mirror images."""
    values = _pooled(small, side)
    return _normalised(np.stack([np.rot90(one, turns) for one in (values, values[:, ::-1]) for turns in range(4)]))


def _pooled(small: np.ndarray, side: int) -> np.ndarray:
    size = THUMBNAIL_SIDE // side
    return np.asarray(small.reshape(side, size, side, size).mean(axis=(1, 3)))


def _normalised(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(len(values), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6))


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
    """Some entries of a reader, as a source of the same name; ``kept`` holds their indices in ``source``."""

    def __init__(self, source: Reader, kept: np.ndarray) -> None:
        self.source, self.name, self.left_out, self._rows = source, source.name, source.left_out, kept

    def entry_id(self, index: int) -> str:
        return self.source.entry_id(int(self._rows[index]))

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
        return self.source.load_reduced(int(self._rows[index]), rng, needed)

    def image_path(self, index: int) -> Path | None:
        return self.source.image_path(int(self._rows[index]))

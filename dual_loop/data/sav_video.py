"""Reader of SA-V as released: videos with masklets, from which frame pairs are drawn.

Layout (Ravi et al. 2024, arXiv 2408.00714), at any depth, also doubled (``sav_000/sav_train/sav_000/``)::

    root/
      **/sav_<id>.mp4            24 frames a second
      **/sav_<id>_manual.json    masklets, 6 annotated frames a second
      **/sav_<id>_auto.json      optional

``masklet`` in a JSON file is a list over annotated frames of a list over objects of run-length codes; the list is
rectangular, and an absent object has an empty code. Annotated frame i belongs to video frame ``i * step``, with
``step`` the whole number nearest to the ratio of frames (4 in the release); an annotated frame behind the end of the
video is never drawn. Video frame n is the n-th in the order of presentation: its time stamp is read from the packets,
the container is asked for the key frame before it, and frames are decoded until that time stamp is met, so B-frames
and variable rates change nothing.

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``broken_json``,
``broken_rle``, ``size_mismatch``, ``no_frame_pair``, ``no_frame``.
"""

from __future__ import annotations

import functools
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dual_loop.data.index import TreeListing, build_in_parts, join_parts, load_or_build
from dual_loop.data.index_file import StringTable
from dual_loop.data.masks import decode_rle
from dual_loop.data.reader import check_root, choose_capped, layout_error
from dual_loop.data.video_frames import VideoFrames
from dual_loop.errors import SampleError, explain
from dual_loop.types import RegionSample

LAYOUT = """
  root/
    **/sav_<id>.mp4
    **/sav_<id>_manual.json
    **/sav_<id>_auto.json    (optional)
"""

KINDS = ("manual", "auto")
RECORDS_KEPT = 4
"""Parsed JSON files that a process keeps; one has some megabytes."""


class SavVideos:
    """SA-V videos as a :class:`~dual_loop.types.RegionSource`; an entry is a masklet: one object of one JSON file.

    Args:
        root: folder that holds the files at any depth.
        max_samples: keep this many masklets, drawn with a fixed seed; None keeps all.
        regions_per_image: most objects of a pair; besides the entry's own those that both frames show.
        masklets: ``both``, ``manual`` or ``auto``.
        min_seconds, max_seconds: distance of the two frames of a pair.
        min_area: least share of the frame that an object must cover in both, 0..1.
        index_dir: see :func:`~dual_loop.data.index.load_or_build`.

    Raises:
        ConfigError: the folder does not exist, or holds no masklet with two visible frames.
        EnvironmentProblem: PyAV is not installed.
    """

    name = "sav"

    def __init__(
        self,
        root: str | Path,
        max_samples: int | None = None,
        regions_per_image: int = 1,
        masklets: str = "both",
        min_seconds: float = 0.5,
        max_seconds: float = 2.0,
        min_area: float = 0.001,
        index_dir: str | Path | None = None,
    ) -> None:
        self.root = check_root(root, "SA-V", LAYOUT)
        self.regions_per_image, self.min_area = regions_per_image, min_area
        self.min_seconds, self.max_seconds = min_seconds, max_seconds
        kinds = KINDS if masklets == "both" else (masklets,)
        key = {"kind": "sav_videos", "root": str(self.root), "masklets": list(kinds)}
        arrays = load_or_build(index_dir, key, lambda: self._build_index(index_dir, key, kinds))
        self._videos = StringTable.from_arrays(arrays, "video")
        self._records = StringTable.from_arrays(arrays, "record")
        self._entries = arrays["entry"]
        if not len(self._entries):
            seen = f"{len(self._videos)} videos with {len(self._records)} annotation files, no masklet seen twice"
            raise layout_error("the SA-V folder holds no video with masklets", self.root, seen, LAYOUT)
        self._kept = choose_capped(len(self._entries), max_samples, "sav_max_samples")
        self._frames = VideoFrames()
        self._parsed: OrderedDict[str, Mapping[str, Any]] = OrderedDict()

    def _build_index(
        self, index_dir: str | Path | None, key: Mapping[str, Any], kinds: Sequence[str]
    ) -> dict[str, np.ndarray]:
        listing = TreeListing(self.root, (".mp4", ".json"), index_dir, key)
        present = set(listing.files)
        records = [
            (path, path.removesuffix(f"_{kind}.json") + ".mp4")
            for path in listing.files
            for kind in kinds
            if path.endswith(f"_{kind}.json")
        ]
        records = [(record, video) for record, video in records if video in present]
        folders: dict[str, list[str]] = {}
        for record, _ in records:
            folders.setdefault(record.rpartition("/")[0], []).append(record)
        parts = [json.dumps(folders[folder]) for folder in sorted(folders)]
        build = functools.partial(count_visible, str(self.root))
        found = build_in_parts(parts, build, index_dir, key, describe="SA-V masklets") if parts else []
        joined = join_parts(found) if found else count_visible(str(self.root), "[]")
        number = {record: row for row, (record, _) in enumerate(records)}
        names = StringTable.from_arrays(joined, "name")
        rows = np.array([number[names[row]] for row in range(len(names))], np.int32)
        visible = joined["visible"]
        entries = np.stack([np.repeat(rows, joined["num_objects"]), _columns(joined["num_objects"])], 1)
        return {
            **StringTable.from_strings(video for _, video in records).to_arrays("video"),
            **StringTable.from_strings(record for record, _ in records).to_arrays("record"),
            "entry": entries[visible >= 2].astype(np.int32),
            **listing.watched_arrays(),
        }

    def __len__(self) -> int:
        return len(self._kept)

    def named_rows(self) -> tuple[list[StringTable], np.ndarray]:
        """Return tables whose rows contain the entries' names, and the row of each entry, (n,) int64."""
        return [self._records], np.asarray(self._entries)[self._kept, 0].astype(np.int64)

    def entry_id(self, index: int) -> str:
        """Return ``sav_<id>_<kind>#<object>``, after the sub-folders."""
        row, column = self._entries[int(self._kept[index])]
        return f"{self._records[int(row)].removesuffix('.json')}#{int(column)}"

    def image_path(self, index: int) -> Path | None:
        """Return None: frames are inside the video."""
        return None

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Draw a frame pair of masklet ``index``: captioned on one frame, compared on the other.

        Raises:
            SampleError: see the module.
        """
        row, column = (int(value) for value in self._entries[int(self._kept[index])])
        path = self.root / self._videos[row]
        record = self._record(row)
        frames: list[Any] = record["masklet"]
        where = str(self.root / self._records[row])
        length = self._frames.length(path)
        step = max(1, round(length / len(frames)))
        rate = self._frames.rate(path) / step
        areas = self._areas(frames, column, where)[: 1 + (length - 1) // step]
        first, second = self._draw_pair(areas, rate, rng, f"{where}#{column}")
        columns = [column, *self._others(frames, column, (first, second), rng, where)]
        images, masks = [], []
        for number in (first, second):
            own = np.stack([_decode(frames[number][k], f"{where}[{number}][{k}]") for k in columns])
            images.append(self._frames.read(path, number * step, own.shape[1:]))
            masks.append(own)
        return RegionSample(
            source=self.name,
            sample_id=f"{self.entry_id(index)}@{first * step}-{second * step}",
            image=images[0],
            masks=masks[0],
            region_ids=tuple(str(k) for k in columns),
            captions=((),) * len(columns),
            target_image=images[1],
            target_masks=masks[1],
        )

    def _record(self, row: int) -> Mapping[str, Any]:
        name = self._records[row]
        if name not in self._parsed:
            self._parsed[name] = read_record(self.root / name)
            if len(self._parsed) > RECORDS_KEPT:
                self._parsed.popitem(last=False)
        self._parsed.move_to_end(name)
        return self._parsed[name]

    def _areas(self, frames: Sequence[Any], column: int, where: str) -> np.ndarray:
        """Return the share of the frame that an object covers on every annotated frame, (n,) float."""
        return np.array([area_share(frame[column], f"{where}[{number}]") for number, frame in enumerate(frames)])

    def _draw_pair(self, areas: np.ndarray, rate: float, rng: np.random.Generator, where: str) -> tuple[int, int]:
        """Return two annotated frames in random order that show the object at the wanted distance."""
        seen = np.flatnonzero(areas >= max(self.min_area, 1e-12))
        for first in rng.permutation(seen):
            seconds = np.abs(seen - first) / rate
            fitting = seen[
                (seconds >= self.min_seconds - 1e-9) & (seconds <= self.max_seconds + 1e-9) & (seen != first)
            ]
            if len(fitting):
                return int(first), int(rng.choice(fitting))
        raise SampleError(
            "no_frame_pair",
            explain(
                "no two frames of a masklet can be paired",
                where,
                f"{len(seen)} of {len(areas)} annotated frames with enough area, {rate:g} a second",
                f"two of them {self.min_seconds:g} to {self.max_seconds:g} seconds apart",
                "widen sav_min_seconds, sav_max_seconds or sav_min_area, or let the sample be skipped",
            ),
        )

    def _others(
        self, frames: Sequence[Any], column: int, pair: tuple[int, int], rng: np.random.Generator, where: str
    ) -> list[int]:
        """Return further objects that both frames show, drawn, up to ``regions_per_image`` with the entry's own."""
        wanted, found = self.regions_per_image - 1, []
        for other in rng.permutation(len(frames[pair[0]])) if wanted else ():
            shares = [area_share(frames[number][other], f"{where}[{number}]") for number in pair]
            if other != column and min(shares) >= max(self.min_area, 1e-12):
                found.append(int(other))
            if len(found) == wanted:
                break
        return found


def count_visible(root: str, part: str) -> dict[str, np.ndarray]:
    """Return, for the JSON files that ``part`` lists, on how many annotated frames each object is visible.

    Returns:
        ``name_bytes, name_offsets``; ``num_objects`` (files,) int64; ``visible`` (objects of all files,) int32. A file
        that cannot be read has one object that counts as visible, so that loading it reports what is wrong.
    """
    names, counts = json.loads(part), []
    for name in names:
        try:
            frames = read_record(Path(root) / name)["masklet"]
            counts.append(np.array([[_is_visible(code) for code in frame] for frame in frames]).sum(0))
        except SampleError:
            counts.append(np.array([2]))
    return {
        **StringTable.from_strings(names).to_arrays("name"),
        "num_objects": np.array([len(count) for count in counts], np.int64),
        "visible": np.concatenate([np.zeros(0, np.int32), *counts]).astype(np.int32),
    }


def read_record(path: Path) -> Mapping[str, Any]:
    """Return an annotation file of SA-V whose ``masklet`` is rectangular and not empty.

    Raises:
        SampleError: ``missing_file``; ``broken_json`` where it is damaged or of another structure.
    """
    fix = "download this file again"
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise SampleError("missing_file", explain("an annotation file is missing", str(path), fix=fix)) from error
    except (OSError, ValueError, RecursionError) as error:
        seen = f"{type(error).__name__}: {error}"
        message = explain("an annotation file is damaged", str(path), seen, "complete JSON", fix)
        raise SampleError("broken_json", message) from error
    frames: Any = record.get("masklet") if isinstance(record, dict) else None
    is_list = isinstance(frames, list) and bool(frames) and all(isinstance(frame, list) for frame in frames)
    if not is_list or not frames[0] or len({len(frame) for frame in frames}) != 1:
        expected = '"masklet": [[{"size", "counts"}, one an object], one an annotated frame]'
        message = explain("an annotation file is not of SA-V", str(path), f"{str(record)[:60]}...", expected, fix)
        raise SampleError("broken_json", message)
    return dict(record)


def area_share(code: Any, where: str) -> float:
    """Return the share of the frame under a run-length code, 0..1; 0 for an empty one.

    Raises:
        SampleError: ``broken_rle``.
    """
    return float(decode_rle(code, where).mean()) if _is_visible(code) else 0.0


def _is_visible(code: Any) -> bool:
    """Tell an empty code (absent object) from others without decoding: it is one run of zeros."""
    if not isinstance(code, dict) or not code.get("counts"):
        return False
    size, counts = code.get("size", (0, 0)), code["counts"]
    return bool(counts != _empty_counts(int(size[0]), int(size[1])))


@functools.lru_cache(maxsize=64)
def _empty_counts(height: int, width: int) -> str:
    from pycocotools import mask as coco

    return str(coco.encode(np.zeros((height, width), np.uint8, order="F"))["counts"].decode())


def _decode(code: Any, where: str) -> np.ndarray:
    return np.asarray(decode_rle(code, where), dtype=bool)


def _columns(num_objects: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    starts = np.repeat(np.cumsum(num_objects) - num_objects, num_objects)
    columns: np.ndarray = np.arange(int(num_objects.sum())) - starts
    return columns

"""Reader of SA-V as released: videos with masklets, from which frame pairs or clips are drawn.

SA-V is of Ravi et al. 2024, arXiv 2408.00714. Its files (:data:`LAYOUT`) may lie at any depth, also doubled
(``sav_000/sav_train/sav_000/``): videos of 24 frames a second, 6 of them annotated.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.index import Key, build_in_parts, join_parts, list_tree, load_or_build
from dual_loop.data.layout import layout_error
from dual_loop.data.limits import check_file, check_pixels
from dual_loop.data.masks import decode_rle
from dual_loop.data.reader import Reader, read_annotations
from dual_loop.data.string_table import StringTable
from dual_loop.errors import EnvironmentProblem, SampleError, explain
from dual_loop.types import RegionSample

LAYOUT = """
  root/
    **/sav_<id>.mp4
    **/sav_<id>_manual.json
    **/sav_<id>_auto.json    (optional)
"""

RECORDS_KEPT = 4
"""Parsed JSON files that a process keeps; one has some megabytes."""

VIDEOS_KEPT = 64
"""Videos whose time stamps a process remembers."""

ATTEMPTS = 2
"""Key frames before a frame that are tried before the start of the video."""

Codes = list[list[Any]]
"""The run-length codes of a JSON file: by annotated frame, then by object."""


class SavVideos(Reader):
    """SA-V videos; an entry is a masklet: one object of one JSON file.

    Args (further ones are those of :class:`~dual_loop.data.reader.Reader`):
        root: folder that holds the files at any depth.
        masklets: ``both``, ``manual`` or ``auto``.
        min_seconds, max_seconds: distance of the other frames from the captioned one.
        min_area: least share of the frame that an object must cover in all, 0..1.
        frames: of a clip, 2 or more; fewer where the limits leave fewer.

    Raises:
        ConfigError: the folder does not exist, or holds no masklet with two visible frames.
        EnvironmentProblem: PyAV is not installed.
    """

    name, title, layout = "sav", "SA-V", LAYOUT

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
        frames: int = 2,
    ) -> None:
        super().__init__(root, index_dir, regions_per_image, min_area)
        self.min_seconds, self.max_seconds, self.frames = min_seconds, max_seconds, frames
        kinds = ["manual", "auto"] if masklets == "both" else [masklets]
        key = {"kind": "sav_videos", "root": str(self.root), "masklets": kinds}
        arrays = load_or_build(index_dir, key, lambda: self._build_index(key, kinds))
        self._videos = StringTable.from_arrays(arrays, "video")
        self._records = StringTable.from_arrays(arrays, "record")
        if not len(arrays["entry"]):
            seen = f"{len(self._videos)} videos with {len(self._records)} annotation files, no masklet seen twice"
            raise layout_error("the SA-V folder holds no video with masklets", self.root, seen, LAYOUT)
        records, columns = np.asarray(arrays["entry"], np.int64).T
        self._set_entries(np.arange(len(records)), max_samples, "sav_max_samples", self._records)
        self._rows, self._columns = records[self._rows], columns[self._rows]
        _import_av()

    def _build_index(self, key: Key, kinds: Sequence[str]) -> dict[str, np.ndarray]:
        files, watched = list_tree(self.root, (".mp4", ".json"), self.index_dir, key)
        present = set(files)
        videos: dict[str, str] = {}
        folders: dict[str, list[str]] = {}
        for path in files:
            for kind in kinds:
                video = path.removesuffix(f"_{kind}.json") + ".mp4"
                if path.endswith(f"_{kind}.json") and video in present:
                    videos[path] = video
                    folders.setdefault(path.rpartition("/")[0], []).append(path)
        parts = [json.dumps(folders[folder]) for folder in sorted(folders)] or ["[]"]
        build = functools.partial(count_visible, str(self.root))
        found = join_parts(build_in_parts(parts, build, self.index_dir, key, describe="SA-V masklets"))
        names, counts = StringTable.from_arrays(found, "name"), found["num_objects"]
        number = {record: row for row, record in enumerate(videos)}
        rows = np.array([number[names[row]] for row in range(len(names))], np.int32)
        columns = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        entries = np.stack([np.repeat(rows, counts), columns], 1)
        return {
            **StringTable.from_strings(videos.values()).to_arrays("video"),
            **StringTable.from_strings(videos).to_arrays("record"),
            "entry": entries[found["visible"] >= 2].astype(np.int32),
            **watched,
        }

    def entry_id(self, index: int) -> str:
        """Return ``sav_<id>_<kind>#<object>``, after the sub-folders."""
        return f"{self._records[int(self._rows[index])].removesuffix('.json')}#{int(self._columns[index])}"

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Draw a frame pair or clip of masklet ``index``: captioned on its first frame, compared on the others."""
        row, column = int(self._rows[index]), int(self._columns[index])
        path, record = self.root / self._videos[row], self.root / self._records[row]
        codes = _kept_masklets(record)
        stamps, _, rate = video_times(path)
        step = max(1, round(len(stamps) / len(codes)))
        areas = [area_share(frame[column], f"{record}[{number}]") for number, frame in enumerate(codes)]
        shown = np.array(areas[: 1 + (len(stamps) - 1) // step])
        clip = self._draw_frames(shown, rate / step, rng, f"{record}#{column}")
        columns = [column]
        for other in rng.permutation(len(codes[clip[0]])).tolist() if self.regions_per_image > 1 else ():
            seen = min(area_share(codes[number][other], f"{record}[{number}]") for number in clip)
            if other != column and 0 < seen >= self.min_area:
                columns.append(other)
            if len(columns) == self.regions_per_image:
                break
        images, masks = [], []
        for number in clip:
            drawn = [decode_rle(codes[number][k], f"{record}[{number}][{k}]") for k in columns]
            masks.append(np.stack(drawn))
            images.append(read_frame(path, number * step, drawn[0].shape))
        name = f"{self.entry_id(index)}@{'-'.join(str(number * step) for number in clip)}"
        pair = (images[0], masks[0], tuple(map(str, columns)), ((),) * len(columns), images[1], masks[1])
        return RegionSample(self.name, name, *pair, later_targets=tuple(zip(images, masks, strict=True))[2:])

    def _draw_frames(self, areas: np.ndarray, rate: float, rng: np.random.Generator, where: str) -> list[int]:
        """Return annotated frames in random order that show the object, at the wanted distance from the first."""
        seen = np.flatnonzero((areas > 0) & (areas >= self.min_area))
        for first in rng.permutation(seen):
            seconds = np.abs(seen - first) / rate
            is_fitting = (seconds >= self.min_seconds - 1e-9) & (seconds <= self.max_seconds + 1e-9) & (seen != first)
            if is_fitting.any():
                fitting = seen[is_fitting]
                clip = [int(first), int(rng.choice(fitting))]
                if self.frames > 2:
                    clip += rng.permutation(fitting[fitting != clip[1]])[: self.frames - 2].tolist()
                return clip
        found = f"{len(seen)} of {len(areas)} annotated frames with enough area, {rate:g} a second"
        expected = f"two of them {self.min_seconds:g} to {self.max_seconds:g} seconds apart"
        fix = "widen sav_min_seconds, sav_max_seconds or sav_min_area, or let the sample be skipped"
        message = explain("no two frames of a masklet can be paired", where, found, expected, fix)
        raise SampleError("no_frame_pair", message)


# --- annotation files ------------------------------------------------------------------------------------------------


def count_visible(root: str, part: str) -> dict[str, np.ndarray]:
    """Return, for the JSON files that ``part`` lists, on how many annotated frames each object is visible.

    Returns:
        ``name_bytes, name_offsets``; ``num_objects`` (files,) int64; ``visible`` (objects of all files,) int32. A file
        that cannot be read has one object that counts as visible, so that loading it reports what is wrong.
    """
    names, counts = json.loads(part), []
    for name in names:
        try:
            codes = read_masklets(Path(root) / name)
            counts.append(np.array([[_is_visible(code) for code in frame] for frame in codes]).sum(0))
        except SampleError:
            counts.append(np.array([2]))
    return {
        **StringTable.from_strings(names).to_arrays("name"),
        "num_objects": np.array([len(count) for count in counts], np.int64),
        "visible": np.concatenate([np.zeros(0, np.int32), *counts]).astype(np.int32),
    }


def read_masklets(path: Path) -> Codes:
    """Return ``masklet`` of an annotation file of SA-V: rectangular and not empty.

    Raises:
        SampleError: ``missing_file``; ``broken_json`` where it is damaged or of another structure.
    """
    record = read_annotations(path, str(path))
    frames = record.get("masklet") if isinstance(record, dict) else None
    is_list = isinstance(frames, list) and bool(frames) and all(isinstance(frame, list) for frame in frames)
    if not isinstance(frames, list) or not is_list or not frames[0] or len({len(frame) for frame in frames}) != 1:
        expected = '"masklet": [[{"size", "counts"}, one an object], one an annotated frame]'
        seen, fix = f"{str(record)[:60]}...", "download this file again"
        message = explain("an annotation file is not of SA-V", str(path), seen, expected, fix)
        raise SampleError("broken_json", message)
    return frames


_kept_masklets = functools.lru_cache(RECORDS_KEPT)(read_masklets)


def area_share(code: object, where: str) -> float:
    """Return the share of the frame under a run-length code, 0..1; 0 for an empty one.

    Raises:
        SampleError: ``broken_rle``.
    """
    return float(decode_rle(code, where).mean()) if _is_visible(code) else 0.0


def _is_visible(code: object) -> bool:
    """Tell an empty code (absent object) from others without decoding: it is one run of zeros."""
    if not isinstance(code, dict) or not code.get("counts"):
        return False
    size = code.get("size", (0, 0))
    return bool(code["counts"] != _empty_counts(int(size[0]), int(size[1])))


@functools.lru_cache(maxsize=64)
def _empty_counts(height: int, width: int) -> str:
    return str(encode_rle(np.zeros((height, width), bool))["counts"])


# --- frames ----------------------------------------------------------------------------------------------------------


class VideoTimes(NamedTuple):
    """Time stamps of all frames to be decoded and of the key frames, ascending; the average rate, frames a second."""

    stamps: list[int]
    keys: list[int]
    rate: float


def read_frame(path: Path, number: int, size: tuple[int, ...] | None = None) -> np.ndarray:
    """Return frame ``number`` (0-based, in the order of presentation) of a video as (H, W, 3) uint8 RGB.

    Args:
        size: (H, W) that the frame must have; a frame that has it only once its rotation is applied is turned.

    Raises:
        SampleError: ``missing_file``, ``truncated_file``, ``no_frame``, ``size_mismatch``.
    """
    stamps, keys, _ = video_times(path)
    if not 0 <= number < len(stamps):
        message = explain("a video has no such frame", str(path), number, f"0 to {len(stamps) - 1}")
        raise SampleError("no_frame", message)
    av = _import_av()
    before = [key for key in keys if key <= stamps[number]]
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # loader workers already use the cores
            # The container seeks by the time of decoding, and may land on the key frame behind the wanted frame.
            for key in [*before[: -ATTEMPTS - 1 : -1], stamps[0]]:
                container.seek(key, stream=stream, backward=True)
                frame = next(f for f in container.decode(stream) if f.pts is not None and f.pts >= stamps[number])
                if frame.pts == stamps[number]:
                    return _upright(frame, size, f"{path}, frame {number}")
    except (av.error.FFmpegError, StopIteration) as error:
        raise _damaged(path, f"frame {number}: {type(error).__name__}: {error}") from error
    raise _damaged(path, f"frame {number} cannot be decoded")


@functools.lru_cache(VIDEOS_KEPT)
def video_times(path: Path) -> VideoTimes:
    """Return what the packets of a video tell.

    Raises:
        SampleError: ``missing_file``, ``truncated_file``.
    """
    av = _import_av()
    try:
        check_file(path)
        with av.open(str(path)) as container:
            stream = next(iter(container.streams.video), None)
            if stream is not None:
                check_pixels(stream.height, stream.width, str(path))
            packets = [packet for packet in container.demux(stream) if packet.pts is not None] if stream else []
            unit = stream.time_base if stream else 0
    except FileNotFoundError as error:
        raise SampleError("missing_file", explain("a video is missing", str(path), fix="download it again")) from error
    except (OSError, av.error.FFmpegError) as error:
        raise _damaged(path, error) from error
    if not packets:
        raise _damaged(path, "no frame")
    stamps = sorted(packet.pts for packet in packets)
    keys = sorted(packet.pts for packet in packets if packet.is_keyframe)
    seconds = float((stamps[-1] - stamps[0]) * unit)
    return VideoTimes(stamps, keys, (len(stamps) - 1) / seconds if seconds > 0 else 1.0)


def _upright(frame: Any, size: tuple[int, ...] | None, where: str) -> np.ndarray:
    image: np.ndarray = frame.to_ndarray(format="rgb24")
    if size is None or image.shape[:2] == tuple(size):
        return image
    turns = round(float(getattr(frame, "rotation", 0) or 0) / 90) % 4
    turned: np.ndarray = np.ascontiguousarray(np.rot90(image, turns))
    if turns and turned.shape[:2] == tuple(size):
        return turned
    fix = "convert or download this video and its masklets again"
    message = explain("a frame and its mask differ in size", where, image.shape[:2], tuple(size), fix)
    raise SampleError("size_mismatch", message)


def _damaged(path: Path, seen: object) -> SampleError:
    message = explain("a video is damaged", str(path), seen, "a complete video", "download it again")
    return SampleError("truncated_file", message)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        what, fix = "videos cannot be read without PyAV", "pip install 'dual-loop[video]', or convert them to pairs"
        raise EnvironmentProblem(explain(what, "sav_dir", str(error), fix=fix)) from error
    return av

"""Reader of SA-V as released: videos with masklets, from which frame pairs or clips are drawn.

SA-V is of Ravi et al. 2024, arXiv 2408.00714. Its files (:data:`LAYOUT`) may lie at any depth, also doubled
(``sav_000/sav_train/sav_000/``): videos of 24 frames a second, 6 of them annotated.

``masklet`` in a JSON file is a list over annotated frames of a list over objects of run-length codes; an absent object
has an empty code, null, or a list that ends before it. Annotated frame i belongs to video frame ``i * step``
(:func:`annotation_step`); one behind the end of the video is never drawn.

Video frame n is the n-th that a player shows: frames that an edit list hides and what a cut file lacks do not count.
Its time stamp is read from the packets, and frames are decoded from the key frame before until that time stamp is met.

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``broken_json``,
``broken_rle``, ``size_mismatch``, ``unknown_step``, ``no_frame_pair``, ``no_frame``, ``bad_rotation``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from dual_loop.data.index import Key, build_in_parts, join_parts, list_tree, load_or_build
from dual_loop.data.layout import layout_error
from dual_loop.data.limits import MAX_SIDE, check_file, check_pixels, max_pixels
from dual_loop.data.masks import decode_rle
from dual_loop.data.reader import Reader, read_annotations
from dual_loop.data.string_table import StringTable
from dual_loop.errors import EnvironmentProblem, SampleError, bad_sample, explain, shorten
from dual_loop.types import RegionSample, SkippedRegion

LAYOUT = """
  root/
    **/sav_<id>.mp4
    **/sav_<id>_manual.json
    **/sav_<id>_auto.json    (optional)
"""

LEFT_OUT = ("annotation files without a video", "videos without an annotation file")

RECORDS_KEPT, VIDEOS_KEPT = 4, 64
"""Parsed JSON files of some megabytes each, and time stamps of videos, that a process keeps."""

ATTEMPTS = 2
"""Key frames before a frame that are tried before the start of the video."""

ANNOTATED_RATE = 6.0
"""Annotated frames a second of SA-V."""

UNEVEN = 0.4
"""Frames by which a time stamp may be off its place under a constant rate; one frame left out is off by 0.5 or more."""

Codes = list[list[Any]]
"""The run-length codes of a JSON file: by annotated frame, then by object."""


class SavVideos(Reader):
    """SA-V videos; an entry is a masklet: one object of one JSON file.

    Args (further ones are those of :class:`~dual_loop.data.reader.Reader`):
        masklets: ``both``, ``manual`` or ``auto``.
        min_seconds, max_seconds: distance of the other frames from the captioned one.
        min_area: least share of each frame that an object must cover, 0..1.
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
        key = {"kind": "sav_videos", "root": str(self.root), "masklets": kinds, "version": 2}
        arrays = load_or_build(index_dir, key, lambda: self._build_index(key, kinds))
        self._videos = StringTable.from_arrays(arrays, "video")
        self._records = StringTable.from_arrays(arrays, "record")
        if not len(arrays["entry"]):
            seen = f"{len(self._videos)} videos with {len(self._records)} annotation files, no masklet seen twice"
            raise layout_error("the SA-V folder holds no video with masklets", self.root, seen, LAYOUT)
        self.left_out = dict(zip(LEFT_OUT, arrays["left_out"].tolist(), strict=True))
        records, columns = np.asarray(arrays["entry"], np.int64).T
        self._set_entries(np.arange(len(records)), max_samples, "sav_max_samples", self._records)
        self._rows, self._columns = records[self._rows], columns[self._rows]
        _import_av()

    def _build_index(self, key: Key, kinds: Sequence[str]) -> dict[str, np.ndarray]:
        files, watched = list_tree(self.root, (".mp4", ".json"), self.index_dir, key)
        endings = tuple(f"_{kind}.json" for kind in kinds)
        videos = {path: path.rpartition("_")[0] + ".mp4" for path in files if path.endswith(endings)}
        present = {path for path in files if path.endswith(".mp4")}
        left_out = [sum(video not in present for video in videos.values()), len(present - {*videos.values()})]
        videos = {path: video for path, video in videos.items() if video in present}
        folders: dict[str, list[str]] = {}
        for path in videos:
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
            "left_out": np.array(left_out, np.int64),
            **watched,
        }

    def entry_id(self, index: int) -> str:
        """Return ``sav_<id>_<kind>#<object>``, after the sub-folders."""
        return f"{self._records[int(self._rows[index])].removesuffix('.json')}#{int(self._columns[index])}"

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Draw a frame pair or clip of masklet ``index``: captioned on its first frame, compared on the others."""
        row, column = int(self._rows[index]), int(self._columns[index])
        path, record = self.root / self._videos[row], self.root / self._records[row]
        (codes, frame_count), times = _kept_record(record), video_times(path)
        step = annotation_step(times, len(codes), frame_count, str(path))
        areas = [area_share(_code_of(frame, column), f"{record}[{number}]") for number, frame in enumerate(codes)]
        shown = np.array(areas[: 1 + (len(times.stamps) - 1) // step])
        clip = self._draw_frames(shown, times.rate / step, rng, f"{record}#{column}")
        columns = [column]
        passed_over: list[SkippedRegion] = []
        for other in rng.permutation(len(codes[clip[0]])).tolist() if self.regions_per_image > 1 else ():
            try:
                seen = min(area_share(_code_of(codes[number], other), f"{record}[{number}]") for number in clip)
                if other != column and 0 < seen >= self.min_area:
                    columns.append(other)
            except SampleError as error:
                passed_over.append(SkippedRegion(str(other), error.reason, str(error)))
            if len(columns) == self.regions_per_image:
                break
        images, masks = [], []
        for number in clip:
            drawn = [decode_rle(codes[number][k], f"{record}[{number}][{k}]") for k in columns]
            masks.append(np.stack(drawn))
            images.append(read_frame(path, number * step, drawn[0].shape))
        name = f"{self.entry_id(index)}@{'-'.join(str(number * step) for number in clip)}"
        pair = (images[0], masks[0], tuple(map(str, columns)), ((),) * len(columns), images[1], masks[1])
        later = tuple(zip(images, masks, strict=True))[2:]
        return RegionSample(self.name, name, *pair, later_targets=later, passed_over=tuple(passed_over))

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
        fix = "widen sav_min_seconds, sav_max_seconds or sav_min_area"
        raise bad_sample("no_frame_pair", "no two frames of a masklet can be paired", where, found, expected, fix)


def count_visible(root: str, part: str) -> dict[str, np.ndarray]:
    """Return, for the JSON files that ``part`` lists, on how many annotated frames each object is visible.

    Returns:
        ``name_bytes, name_offsets``; ``num_objects`` (files,) int64; ``visible`` (objects of all files,) int32. A file
        that cannot be read has one object that counts as visible, so that loading it reports what is wrong.
    """
    names, counts = json.loads(part), []
    for name in names:
        try:
            codes, _ = read_masklets(Path(root) / name)
            count = np.zeros(max(map(len, codes)), np.int64)
            for frame in codes:
                count[: len(frame)] += np.array([_is_visible(code) for code in frame], np.int64)
            counts.append(count)
        except SampleError:
            counts.append(np.array([2]))
    return {
        **StringTable.from_strings(names).to_arrays("name"),
        "num_objects": np.array([len(count) for count in counts], np.int64),
        "visible": np.concatenate([np.zeros(0, np.int32), *counts]).astype(np.int32),
    }


def read_masklets(path: Path) -> tuple[Codes, float]:
    """Return ``masklet`` of an annotation file (null is a frame without objects), and its video's frames, 0 where mum.

    Raises:
        SampleError: ``missing_file``; ``broken_json`` where it is damaged or of another structure.
    """
    read = read_annotations(path, str(path))
    record: dict[str, Any] = read if isinstance(read, dict) else {}
    frames = record.get("masklet")
    if not isinstance(frames, list) or not all(isinstance(frame, list | None) for frame in frames) or not any(frames):
        expected = '"masklet": [[{"size", "counts"}, one an object], one an annotated frame]'
        seen, fix = shorten(read), "download this file again"
        raise bad_sample("broken_json", "an annotation file is not of SA-V", str(path), seen, expected, fix)
    count = record.get("video_frame_count")
    if not isinstance(count, (int, float)) or not 0 <= count < 2**31:  # JSON can say Infinity, NaN and 10**400
        count = 0
    return [frame or [] for frame in frames], count


_kept_record = functools.lru_cache(RECORDS_KEPT)(read_masklets)


def _code_of(frame: list[Any], column: int) -> object:
    return frame[column] if column < len(frame) else None


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
    size = code.get("size")
    if not isinstance(size, list) or [type(side) for side in size] != [int, int]:
        return True  # decoding it says what is wrong
    return code["counts"] not in (_empty_counts(*size), [size[0] * size[1]])


@functools.lru_cache(maxsize=64)
def _empty_counts(height: int, width: int) -> str | None:
    """Return COCO's string of one run, None for a size that no frame has."""
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        return None
    run = {"size": [height, width], "counts": [height * width]}
    return str(coco_mask.frPyObjects(run, height, width)["counts"].decode())


class VideoTimes(NamedTuple):
    """What the packets of a video tell.

    Attributes:
        stamps, keys: times of all frames that are shown, and of all key frames, ascending, in units of the container.
        rate, is_even: mean rate in frames a second, and whether every frame is where it puts it.
        frame_count: frames that the container claims to have, 0 where it is mum.
    """

    stamps: list[int]
    keys: list[int]
    rate: float
    is_even: bool
    frame_count: int


def annotation_step(times: VideoTimes, num_annotated: int, frame_count: float, where: str) -> int:
    """Return how many video frames lie between two annotated ones, by the rate of the video and that of the masks.

    It is 4 in the release, 5 for 30 frames a second. Under an uneven rate the n-th frame is not the one at the n-th
    time, and nobody knows which was annotated; only a record that counts the same frames (``frame_count``) and has
    masks to their end says that frames were counted. More masks than there are frames for are of another step.

    Raises:
        SampleError: ``unknown_step``.
    """
    count = len(times.stamps)
    step = max(1, round(times.rate / ANNOTATED_RATE))
    most = max(count, times.frame_count, frame_count) / step + 1
    if times.is_even and abs(times.rate / ANNOTATED_RATE / step - 1) < 0.02 and num_annotated <= most + 1:
        return step
    counted = round((count - 1) / max(1, num_annotated - 1))
    if frame_count == count and num_annotated == -(-count // max(1, counted)):
        return counted
    seen = f"{count} frames, {times.rate:.4g} a second, {'even' if times.is_even else 'uneven'}; {num_annotated} masks"
    expected = f"an even rate, a multiple of {ANNOTATED_RATE:g} a second, and at most {int(most)} masks"
    what, fix = "which frames were annotated is not known", "download this video again, or convert it to frame pairs"
    raise bad_sample("unknown_step", what, where, seen, expected, fix)


def read_frame(path: Path, number: int, size: tuple[int, ...] | None = None) -> np.ndarray:
    """Return frame ``number`` (0-based, in the order of presentation) of a video as (H, W, 3) uint8 RGB, as shown.

    Args:
        size: (H, W) that the frame must have; a frame that has it only as it is stored is not turned.

    Raises:
        SampleError: ``missing_file``, ``truncated_file``, ``no_frame``, ``size_mismatch``, ``bad_rotation``.
    """
    times = video_times(path)
    if not 0 <= number < len(times.stamps):
        raise bad_sample("no_frame", "a video has no such frame", str(path), number, f"0 to {len(times.stamps) - 1}")
    stamp = times.stamps[number]
    before = [key for key in times.keys if key <= stamp]
    with _opened(path, f"frame {number}") as (container, stream):
        # The container seeks by the time of decoding, and may land on the key frame behind the wanted frame.
        for key in [*before[: -ATTEMPTS - 1 : -1], min(times.keys[0], times.stamps[0])]:
            container.seek(key, stream=stream, backward=True)
            # Behind the key frame of an open group come frames that refer to the group before.
            with suppress(_import_av().error.FFmpegError):
                frame = next((f for f in _decoded(container, stream) if f.pts is not None and f.pts >= stamp), None)
                if frame is not None and frame.pts == stamp and not frame.is_corrupt:
                    return _upright(frame, size, f"{path}, frame {number}")
    raise _damaged(path, f"frame {number} cannot be decoded")


@contextmanager
def _opened(path: Path, what: str) -> Iterator[tuple[Any, Any]]:
    """Give a video's container and stream; what goes wrong with them, inside as well, becomes a ``SampleError``."""
    av = _import_av()
    try:
        check_file(path)
        # Decoders refuse frames above the limit, whatever the container says of their size.
        limits = {"max_pixels": str(max_pixels())}
        with av.open(str(path), format="mp4", options=limits, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise _damaged(path, "no video that can be decoded")
            check_pixels(stream.height, stream.width, str(path))
            stream.thread_type = "NONE"  # loader workers already use the cores
            # Without "explode" damaged parts of a picture are filled from its neighbours.
            stream.codec_context.options = {**limits, "err_detect": "explode"}
            yield container, stream
    except SampleError:
        raise
    except FileNotFoundError as error:
        raise bad_sample("missing_file", "a video is missing", str(path), fix="download it again") from error
    except Exception as error:  # of PyAV, depending on the place of the damage
        raise _damaged(path, f"{what}: {type(error).__name__}: {error}") from error


@functools.lru_cache(VIDEOS_KEPT)
def video_times(path: Path) -> VideoTimes:
    """Return what the packets of a video tell; ``missing_file`` or ``truncated_file`` where they tell nothing."""
    with _opened(path, "its packets") as (container, stream):
        whole = takewhile(lambda packet: not packet.is_corrupt, container.demux(stream))
        packets = [(p.pts, p.dts, p.is_keyframe, p.is_discard) for p in whole if p.pts is not None]
        unit, frame_count = stream.time_base, stream.frames
    shown = np.sort([pts for pts, _, _, is_hidden in packets if not is_hidden])
    keys = sorted(pts for pts, _, is_key, _ in packets if is_key)
    if not len(shown) or not keys:
        raise _damaged(path, "no frame")
    shown = shown[: _complete(shown, packets[-1][1])]
    span = float((shown[-1] - shown[0]) * unit)
    rate = (len(shown) - 1) / span if span > 0 else 1.0
    off = (shown - shown[0]) * float(unit) * rate - np.arange(len(shown))
    return VideoTimes(shown.tolist(), keys, rate, bool(np.abs(off).max() < UNEVEN), frame_count)


def _complete(stamps: np.ndarray, last: int | None) -> int:
    """Return how many frames there are before the first one that is missing, ``last`` the last time of decoding.

    Packets are stored in the order of decoding. Where a file is cut, frames behind ``last`` may lack one before them.
    """
    gaps = np.diff(stamps)
    is_hole = (stamps[1:] > (stamps[-1] if last is None else last)) & (gaps > 1.5 * np.median(gaps))
    return 1 + int(is_hole.argmax()) if is_hole.any() else len(stamps)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the frames from here on, those before the place where a file is cut included."""
    for packet in container.demux(stream):
        if packet.is_corrupt:
            yield from stream.decode()
            return
        yield from packet.decode()


def _upright(frame: Any, size: tuple[int, ...] | None, where: str) -> np.ndarray:
    """Return the picture as the container turns and mirrors it (ISO 14496-12), or as it is stored where that fits."""
    stored: np.ndarray = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get(_import_av().sidedata.sidedata.Type.DISPLAYMATRIX)
    # A point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist() if matrix is not None else (1, 0, 0, 0, 1)
    if (a == d == 0) == (b == c == 0):
        what, expected = "a video is not turned by right angles", "0, 90, 180 or 270 degrees"
        raise bad_sample("bad_rotation", what, where, [a, b, c, d], expected)
    shown = stored if a else stored.swapaxes(0, 1)
    shown = np.ascontiguousarray(shown[:: 1 if b + d > 0 else -1, :: 1 if a + c > 0 else -1])
    fitting = [image for image in (shown, stored) if size is None or image.shape[:2] == tuple(size)]
    if not fitting:
        what, fix = "a frame and its mask differ in size", "download this video and its masklets again"
        raise bad_sample("size_mismatch", what, where, shown.shape[:2], size, fix)
    return fitting[0]


def _damaged(path: Path, seen: object) -> SampleError:
    return bad_sample("truncated_file", "a video is damaged", str(path), seen, "a complete video", "download it again")


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        what, fix = "videos cannot be read without PyAV", "pip install 'dual-loop[video]', or convert them to pairs"
        raise EnvironmentProblem(explain(what, "sav_dir", str(error), fix=fix)) from error
    return av

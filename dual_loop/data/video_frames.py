"""Single frames of a video by their number, through PyAV: exact with B-frames and variable rates."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dual_loop.errors import EnvironmentProblem, SampleError, explain

VIDEOS_KEPT = 64
"""Videos whose time stamps a process remembers."""


ATTEMPTS = 2
"""Key frames before a frame that are tried before the start of the video."""


@dataclass(frozen=True)
class _Video:
    """Time stamps of all frames and of the key frames, ascending, and the average rate, frames a second."""

    stamps: list[int]
    keys: list[int]
    rate: float


class VideoFrames:
    """Reads frames; remembers the time stamps of the last videos."""

    def __init__(self) -> None:
        _import_av()
        self._known: OrderedDict[Path, _Video] = OrderedDict()

    def length(self, path: Path) -> int:
        """Return the number of frames that can be decoded, as the packets tell.

        Raises:
            SampleError: ``missing_file``, ``truncated_file``.
        """
        return len(self._of(path).stamps)

    def rate(self, path: Path) -> float:
        """Return the average number of frames a second."""
        return self._of(path).rate

    def read(self, path: Path, number: int, size: tuple[int, ...] | None = None) -> np.ndarray:
        """Return frame ``number`` (0-based, in the order of presentation) as (H, W, 3) uint8 RGB.

        Args:
            size: (H, W) that the frame must have; a frame that has it only once its rotation is applied is turned.

        Raises:
            SampleError: ``missing_file``, ``truncated_file``, ``no_frame``, ``size_mismatch``.
        """
        known = self._of(path)
        stamps = known.stamps
        if not 0 <= number < len(stamps):
            message = explain("a video has no such frame", str(path), number, f"0 to {len(stamps) - 1}")
            raise SampleError("no_frame", message)
        av = _import_av()
        before = [key for key in known.keys if key <= stamps[number]]
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

    def _of(self, path: Path) -> _Video:
        if path not in self._known:
            self._known[path] = _read_packets(path)
            if len(self._known) > VIDEOS_KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(path)
        return self._known[path]


def _read_packets(path: Path) -> _Video:
    av = _import_av()
    if not path.is_file():
        raise SampleError("missing_file", explain("a video is missing", str(path), fix="download it again"))
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise _damaged(path, "no video stream")
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.pts is not None]
            stamps = sorted(packet.pts for packet in packets)
            keys = sorted(packet.pts for packet in packets if packet.is_keyframe)
            seconds = float((stamps[-1] - stamps[0]) * stream.time_base) if len(stamps) > 1 else 0.0
    except av.error.FFmpegError as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not stamps:
        raise _damaged(path, "no frame")
    return _Video(stamps, keys, (len(stamps) - 1) / seconds if seconds > 0 else 1.0)


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


def _damaged(path: Path, seen: str) -> SampleError:
    message = explain("a video is damaged", str(path), seen, "a complete video", "download it again")
    return SampleError("truncated_file", message)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        fix = "pip install 'dual-loop[video]', or convert the videos to frame pairs"
        raise EnvironmentProblem(
            explain("videos cannot be read without PyAV", "sav_dir", str(error), fix=fix)
        ) from error
    return av

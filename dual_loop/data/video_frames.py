"""Single frames of a video by their number, through PyAV: exact with B-frames and variable rates."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from dual_loop.errors import EnvironmentProblem, SampleError, explain

VIDEOS_KEPT = 64
"""Videos whose time stamps a process remembers."""


class VideoFrames:
    """Reads frames; remembers the time stamps of the last videos."""

    def __init__(self) -> None:
        _import_av()
        self._known: OrderedDict[Path, tuple[list[int], float]] = OrderedDict()

    def length(self, path: Path) -> int:
        """Return the number of frames that can be decoded, as the packets tell.

        Raises:
            SampleError: ``missing_file``, ``truncated_file``.
        """
        return len(self._stamps(path)[0])

    def rate(self, path: Path) -> float:
        """Return the average number of frames a second."""
        return self._stamps(path)[1]

    def read(self, path: Path, number: int, size: tuple[int, ...] | None = None) -> np.ndarray:
        """Return frame ``number`` (0-based, in the order of presentation) as (H, W, 3) uint8 RGB.

        Args:
            size: (H, W) that the frame must have; a frame that has it only once its rotation is applied is turned.

        Raises:
            SampleError: ``missing_file``, ``truncated_file``, ``no_frame``, ``size_mismatch``.
        """
        stamps, _ = self._stamps(path)
        if not 0 <= number < len(stamps):
            message = explain("a video has no such frame", str(path), number, f"0 to {len(stamps) - 1}")
            raise SampleError("no_frame", message)
        av = _import_av()
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                stream.thread_type = "NONE"  # loader workers already use the cores
                container.seek(stamps[number], stream=stream, backward=True)
                for frame in container.decode(stream):
                    if frame.pts is not None and frame.pts >= stamps[number]:
                        if frame.pts == stamps[number]:
                            return _upright(frame, size, f"{path}, frame {number}")
                        break
        except av.error.FFmpegError as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        raise _damaged(path, f"frame {number} cannot be decoded")

    def _stamps(self, path: Path) -> tuple[list[int], float]:
        """Return the sorted time stamps of all frames, and the average rate."""
        if path not in self._known:
            self._known[path] = _read_stamps(path)
            if len(self._known) > VIDEOS_KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(path)
        return self._known[path]


def _read_stamps(path: Path) -> tuple[list[int], float]:
    av = _import_av()
    if not path.is_file():
        raise SampleError("missing_file", explain("a video is missing", str(path), fix="download it again"))
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise _damaged(path, "no video stream")
            stream = container.streams.video[0]
            stamps = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
            seconds = float((stamps[-1] - stamps[0]) * stream.time_base) if len(stamps) > 1 else 0.0
    except av.error.FFmpegError as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not stamps:
        raise _damaged(path, "no frame")
    return stamps, (len(stamps) - 1) / seconds if seconds > 0 else 1.0


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

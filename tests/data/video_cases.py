"""SA-V videos of the kinds that people have; ``python tests/data/video_cases.py`` counts frames that fit their mask.

A case writes a video whose frames say their number, and masks of the frames that a player shows. It has a reason where
samples are bad: the file is damaged, or nobody can know which frame a mask belongs to.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from video_maker import SIZE, code_of, picture, true_mask

from dual_loop.data.sav_video import SavVideos
from dual_loop.errors import SampleError

Turn = Callable[[np.ndarray], np.ndarray]
FAST, FRAGMENTS = {"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
SKIPPED = 18
"""Frames that an edit list hides: not a multiple of the step, nor of the distance of key frames."""
HALF_TURN, LEFT, RIGHT, MIRROR = (-1, 0, 0, -1), (0, -1, 1, 0), (0, 1, -1, 0), (-1, 0, 0, 1)


@dataclass(frozen=True)
class Case:
    """A video of ``count`` frames and its masks.

    Attributes:
        stamps: from frames to times in units of ``base``; None is one unit a frame.
        edits: (shown ticks of 1/rate, first frame or -1) of an edit list. cut: part of the file that is there.
        matrix: a, b, c, d of the display matrix; masks are drawn after ``turn``.
        shown: numbers of the frames that a player shows; None is all.
        masks: how many there are; None is to the end. change: of the list of masks. more: keys of the record.
        reason: of bad samples; None where there are none.
    """

    reason: str | None = None
    count: int = 61
    rate: Fraction = Fraction(24)
    step: int = 4
    base: Fraction | None = None
    stamps: Callable[[np.ndarray], np.ndarray] | None = None
    options: dict[str, str] = field(default_factory=dict)
    encoder: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] = SIZE
    edits: tuple[tuple[int, int], ...] = ()
    cut: float = 1.0
    damage: Callable[[bytes], bytes] = bytes
    matrix: tuple[float, ...] = ()
    turn: Turn = np.asarray
    shown: Callable[[int], Any] = np.arange
    masks: int | None = None
    change: Callable[[list], list] = list
    more: dict[str, object] = field(default_factory=dict)
    cover: bool = False

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        video = folder / "sav_000001.mp4"
        self._encode(video)
        data = video.read_bytes()
        if self.edits:
            data = with_edits(data, self.edits, self.rate)
        if self.matrix:
            data = with_matrix(data, self.matrix)
        data = self.damage(data)
        video.write_bytes(data[: int(len(data) * self.cut)])
        numbers = list(self.shown(self.count))[:: self.step][: self.masks]
        codes = self.change([[code_of(self.turn(true_mask(int(n), self.size)))] for n in numbers])
        record = {"video_id": "sav_000001", "masklet": codes, **self.more}
        (folder / "sav_000001_manual.json").write_text(json.dumps(record))

    def _encode(self, path: Path) -> None:
        import av

        base = self.base or 1 / self.rate
        ticks = np.arange(self.count) if self.stamps is None else self.stamps(np.arange(self.count))
        with av.open(str(path), "w", options=self.options) as container:
            if self.cover:
                art = container.add_stream("mjpeg", rate=1)
                art.height, art.width, art.pix_fmt = 32, 32, "yuvj420p"
                art.disposition = av.stream.Disposition.attached_pic
            stream = container.add_stream("libx264", rate=self.rate, options=self.encoder)
            stream.height, stream.width, stream.pix_fmt = *self.size, "yuv420p"
            stream.gop_size, stream.bit_rate, stream.codec_context.max_b_frames = 12, 2_000_000, 2
            stream.codec_context.time_base = base
            if self.cover:
                container.mux(art.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
            for number, tick in enumerate(ticks.tolist()):
                frame = av.VideoFrame.from_ndarray(picture(number, self.size), format="rgb24")
                frame.pts, frame.time_base = tick, base
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


# --- boxes of the container (ISO 14496-12); the index lies behind the frames, so that no offset changes ---------------


def place_of(data: bytes, name: bytes) -> tuple[int, int]:
    """Return where the first box called ``name`` starts and ends."""
    start = data.index(name) - 4
    return start, start + struct.unpack(">I", data[start : start + 4])[0]


def with_edits(data: bytes, edits: tuple[tuple[int, int], ...], rate: Fraction) -> bytes:
    """Return the file with these edits in place of its own."""
    start, end = place_of(data, b"mdhd")
    units = struct.unpack(">I", data[start + 20 : start + 24])[0]
    start, end = place_of(data, b"mvhd")
    film_units = struct.unpack(">I", data[start + 20 : start + 24])[0]
    start, end = place_of(data, b"elst")
    first = struct.unpack(">i", data[start + 20 : start + 24])[0]  # the delay of B-frames
    entries = b"".join(
        struct.pack(">IiI", round(shown / rate * film_units), -1 if n < 0 else first + round(n / rate * units), 0x10000)
        for shown, n in edits
    )
    box = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    grown = len(box) - (end - start)
    changed = bytearray(data[:start] + box + data[end:])
    for parent in (b"moov", b"trak", b"edts"):
        place, stop = place_of(data, parent)
        changed[place : place + 4] = struct.pack(">I", stop - place + grown)
    return bytes(changed)


def with_matrix(data: bytes, abcd: tuple[float, ...]) -> bytes:
    start, _ = place_of(data, b"tkhd")
    a, b, c, d = (round(value * 65536) for value in abcd)
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return data[: start + 48] + matrix + data[start + 84 :]


def without_fragment(data: bytes) -> bytes:
    """Return a fragmented file that lacks its second fragment, as where two downloads were joined."""
    starts = [place - 4 for place in range(len(data)) if data[place : place + 4] == b"moof"]
    return data[: starts[1]] + data[starts[2] :]


def zeros_inside(data: bytes) -> bytes:
    """Return the file with 600 bytes of frames overwritten, as a download with a hole leaves it."""
    start, end = place_of(data, b"mdat")
    middle = (start + end) // 2
    return data[:middle] + bytes(600) + data[middle + 600 :]


def uneven(numbers: np.ndarray) -> np.ndarray:
    return np.cumsum(np.random.default_rng(0).integers(1, 9, len(numbers)))


def in_thousandths(rate: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda numbers: np.rint(numbers * 1000 / rate).astype(int)


EDITED = {"edits": ((43, SKIPPED),), "shown": lambda count: np.arange(SKIPPED, count)}
SQUARE = {"size": (64, 64)}
THOUSANDTHS = {"base": Fraction(1, 1000)}

CASES = {
    "plain": Case(),
    "no B-frames": Case(encoder={"bf": "0"}),
    "pyramid of B-frames": Case(encoder={"bf": "5", "b_pyramid": "normal", "refs": "4"}),
    "open groups of pictures": Case(encoder={"x264-params": "open-gop=1"}),
    "only key frames": Case(encoder={"g": "1"}),
    "one key frame": Case(encoder={"g": "250"}),
    "index in front": Case(options=FAST),
    "fragmented": Case(options=FRAGMENTS),
    "negative start of decoding": Case(options={"movflags": "negative_cts_offsets"}),
    "starts late": Case(stamps=lambda numbers: numbers + 30),
    "cover picture": Case(cover=True),
    "edit list hides the start": Case(**EDITED),
    "edit list, of open groups": Case(**EDITED, encoder={"x264-params": "open-gop=1"}),
    "edit list, one key frame": Case(**EDITED, encoder={"g": "250"}),
    "edit list hides the end": Case(edits=((37, 0),), shown=lambda count: np.arange(37)),
    "empty edit first": Case(edits=((10, -1), (61, 0))),
    "empty edit and hidden start": Case(edits=((7, -1), (43, SKIPPED)), shown=lambda count: np.arange(SKIPPED, count)),
    "two edits": Case(edits=((13, 0), (31, 30)), shown=lambda count: [*range(13), *range(30, count)]),
    "two edits, swapped": Case(
        "unknown_step", edits=((31, 30), (13, 0)), shown=lambda count: [*range(30, count), *range(13)]
    ),
    "two edits that overlap": Case(edits=((30, 0), (41, 20)), shown=lambda count: [*range(30), *range(20, count)]),
    "turned left": Case(matrix=LEFT, turn=lambda m: np.rot90(m, 1)),
    "turned right": Case(matrix=RIGHT, turn=lambda m: np.rot90(m, -1)),
    "turned by 180 degrees": Case(matrix=HALF_TURN, turn=lambda m: np.rot90(m, 2)),
    "mirrored": Case(matrix=MIRROR, turn=np.fliplr),
    "square, turned left": Case(**SQUARE, matrix=LEFT, turn=lambda m: np.rot90(m, 1)),
    "square, turned right": Case(**SQUARE, matrix=RIGHT, turn=lambda m: np.rot90(m, -1)),
    "square, turned by 180 degrees": Case(**SQUARE, matrix=HALF_TURN, turn=lambda m: np.rot90(m, 2)),
    "turned, masks as stored": Case(matrix=LEFT),
    "turned by 45 degrees": Case("bad_rotation", matrix=(0.7, 0.7, -0.7, 0.7)),
    "12 a second": Case(rate=Fraction(12), step=2),
    "30 a second": Case(rate=Fraction(30), step=5),
    "60 a second": Case(rate=Fraction(60), step=10, count=121),
    "23.976 a second": Case(rate=Fraction(24000, 1001)),
    "29.97 a second": Case(rate=Fraction(30000, 1001), step=5),
    "24 a second in 1/1000": Case(**THOUSANDTHS, stamps=in_thousandths(24)),
    "29.97 a second in 1/1000": Case(**THOUSANDTHS, stamps=in_thousandths(29.97), step=5),
    "24 a second in 1/90000": Case(base=Fraction(1, 90000), stamps=lambda n: n * 3750),
    "24 a second in 1/100": Case(base=Fraction(1, 100), stamps=lambda n: np.rint(n * 100 / 24).astype(int)),
    "25 a second": Case("unknown_step", rate=Fraction(25)),
    "uneven rate": Case("unknown_step", base=Fraction(1, 96), stamps=uneven),
    "uneven rate, frames counted": Case(base=Fraction(1, 96), stamps=uneven, more={"video_frame_count": 61.0}),
    "one frame left out": Case("unknown_step", stamps=lambda numbers: numbers + (numbers > 30)),
    "annotation stops early": Case(masks=6),
    "annotation goes on": Case(change=lambda masks: [*masks, masks[-1]]),
    "uneven rate, infinite count": Case(
        "unknown_step", base=Fraction(1, 96), stamps=uneven, more={"video_frame_count": float("inf")}
    ),
    "every frame annotated": Case("unknown_step", step=1),
    "objects null on some frames": Case(change=lambda masks: [m if k % 4 else [None] for k, m in enumerate(masks)]),
    "frames null": Case(change=lambda masks: [m if k % 4 else None for k, m in enumerate(masks)]),
    "an object that comes later": Case(change=lambda masks: [m if k < 4 else m * 2 for k, m in enumerate(masks)]),
    "size null": Case("broken_rle", change=lambda masks: [*masks[:-1], [{"size": None, "counts": "x"}]]),
    "size of words": Case("broken_rle", change=lambda masks: [*masks[:-1], [{"size": ["a", "b"], "counts": "x"}]]),
    "huge size": Case("broken_rle", change=lambda masks: [*masks[:-1], [{"size": [10**9, 10**9], "counts": "x"}]]),
    "masklet null": Case("broken_json", change=lambda masks: None),
    "masklet of nulls": Case("broken_json", change=lambda masks: [None] * len(masks)),
    "cut at 3 %": Case("truncated_file", options=FAST, cut=0.03),
    "cut at 40 %, index in front": Case(count=121, options=FAST, cut=0.4),
    "cut at 60 %, index in front": Case(options=FAST, cut=0.6),
    "cut at 67 %, edit list in front": Case(**EDITED | {"edits": ((103, SKIPPED),)}, count=121, options=FAST, cut=0.67),
    "cut at 95 %, index in front": Case(options=FAST, cut=0.95),
    "cut at 60 %, index behind": Case("truncated_file", cut=0.6),
    "cut at 99 %, index behind": Case(cut=0.99),
    "cut at 40 %, fragmented": Case("unknown_step", options=FRAGMENTS, cut=0.4),
    "cut at 80 %, fragmented": Case("unknown_step", options=FRAGMENTS, cut=0.8),
    "cut at 80 %, fragmented, frames counted": Case(options=FRAGMENTS, cut=0.8, more={"video_frame_count": 61}),
    "a fragment is missing": Case("unknown_step", options=FRAGMENTS, damage=without_fragment),
    "zeros inside": Case("truncated_file", damage=zeros_inside),
    "zeros inside, no B-frames": Case("truncated_file", damage=zeros_inside, encoder={"bf": "0"}),
}


def fitting(folder: Path, frames: int = 2, draws: int = 12) -> tuple[int, int, Counter[str]]:
    """Return how many drawn frames fit their mask, how many do not, and the reasons of bad samples."""
    source = SavVideos(folder, min_area=0.0001, frames=frames)
    fits, wrong, reasons = 0, 0, Counter[str]()
    for seed in range(draws * len(source)):
        try:
            sample = source.load(seed % len(source), np.random.default_rng(seed))
        except SampleError as error:
            reasons[error.reason] += 1
            continue
        shown = [(sample.image, sample.masks), (sample.target_image, sample.target_masks), *sample.later_targets]
        for image, [mask] in shown:
            red = (image[..., 0] > 150) & (image[..., 1] < 100)
            is_same = (red & mask).sum() > 0.8 * (red | mask).sum()
            fits, wrong = fits + is_same, wrong + (not is_same)
    return int(fits), int(wrong), reasons


def main() -> int:
    worst = 0
    print(f"| {'case':40} | {'fit':>4} | {'do not':>6} | bad samples |\n| --- | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for place, (name, case) in enumerate(CASES.items()):
            case.write(Path(folder) / str(place))
            fits, wrong, reasons = fitting(Path(folder) / str(place))
            worst = max(worst, wrong)
            print(f"| {name:40} | {fits:4} | {wrong:6} | {', '.join(f'{k} {v}' for k, v in reasons.items())} |")
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())

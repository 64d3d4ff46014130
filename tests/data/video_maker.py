"""Small SA-V-like videos whose frames say their own number, with masklets."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

BITS = 8
SIZE = (48, 64)


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Eight black or white blocks in the upper half spell ``number``; a red square below moves to the right."""
    image = np.full((*size, 3), 90, np.uint8)
    for bit in range(BITS):
        image[: size[0] // 2, bit * 8 : bit * 8 + 8] = 255 if number >> bit & 1 else 0
    image[object_rows(size), object_columns(number)] = (220, 30, 30)
    return image


def object_rows(size: tuple[int, int]) -> slice:
    return slice(size[0] // 2 + 4, size[0] // 2 + 20)


def object_columns(number: int) -> slice:
    return slice(number % 40, number % 40 + 16)


def number_of(image: np.ndarray) -> int:
    """Read the number that :func:`picture` wrote."""
    blocks = [image[4 : image.shape[0] // 2 - 4, bit * 8 + 2 : bit * 8 + 6].mean() for bit in range(BITS)]
    return sum((block > 127) << bit for bit, block in enumerate(blocks))


def write_video(path: Path, count: int, codec: str = "libx264", stamps: list[int] | None = None) -> None:
    """Encode ``count`` frames at 24 a second with key frames every 12 and B-frames; ``stamps`` are uneven times."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        stream.gop_size, stream.bit_rate = 12, 2_000_000
        stream.codec_context.max_b_frames = 2
        base = Fraction(1, 24 if stamps is None else 96)
        stream.codec_context.time_base = base
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts = number if stamps is None else stamps[number]
            frame.time_base = base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def code_of(mask: np.ndarray) -> dict[str, Any]:
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def true_mask(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[object_rows(size), object_columns(number)] = True
    return mask


def write_masklets(path: Path, annotated: int, hidden: tuple[int, ...] = (), step: int = 4) -> None:
    """Object 0 follows the square and is hidden on some annotated frames; object 1 is the upper left; 2 never shows."""
    corner, nothing = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    corner[:20, :20] = True
    frames = [
        [code_of(nothing if i in hidden else true_mask(i * step)), code_of(corner), code_of(nothing)]
        for i in range(annotated)
    ]
    record = {
        "video_id": path.stem,
        "video_frame_count": float(annotated * step),
        "masklet_first_appeared_frame": [0.0, 0.0, 0.0],
        "masklet": frames,
    }
    path.write_text(json.dumps(record))

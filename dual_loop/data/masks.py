"""Masks: run-length codes, polygons, resizing, pooling to the prompt grid; safe paths."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dual_loop.data.coco_masks import decode_polygons
from dual_loop.data.limits import check_pixels
from dual_loop.errors import ConfigError, SampleError, bad_sample, explain, shorten

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 1 << 28
"""Largest H*W that ``data.max_pixels`` may allow; a run of a code is never longer."""

MAX_CHARACTERS_PER_RUN = 7
"""A run of the COCO string has 5 bits a character; 7 characters hold every length below :data:`MAX_PIXELS`."""

MAX_CODE_LENGTH = 1 << 23
"""Most characters or runs of one code: they are taken apart as arrays of 64-bit integers."""

SIZE_TOLERANCE = 2
"""Pixels per side by which a mask may differ from its image before the pair counts as mismatched."""


def decode_rle(rle: object, where: str) -> np.ndarray:
    """Decode a COCO run-length code ``{"size": [H, W], "counts": str | bytes | list of int}``: (H, W) bool.

    Runs alternate background, foreground, ... in column-major order. The code is checked completely before a mask is
    made (pycocotools reads out of bounds on a damaged string): every run is non-negative and they sum to H*W.

    Raises:
        SampleError: reason ``broken_rle``.
    """
    if not isinstance(rle, Mapping) or "counts" not in rle or "size" not in rle:
        raise _broken_rle("a run-length code lacks its keys", where, shorten(rle), '{"size": [H, W], "counts": ...}')
    size, counts = rle["size"], rle["counts"]
    is_pair = isinstance(size, (list, tuple)) and len(size) == 2 and all(_is_length(side) for side in size)
    if not is_pair:
        expected = f"[H, W], integers from 1 to {MAX_PIXELS}"
        raise _broken_rle("size of a run-length code is wrong", where, shorten(size), expected)
    height, width = int(size[0]), int(size[1])
    check_pixels(height, width, where, "broken_rle")
    if isinstance(counts, (str, bytes, Sequence)) and len(counts) > MAX_CODE_LENGTH:
        expected = f"at most {MAX_CODE_LENGTH:,}"
        raise _broken_rle("a run-length code is too long", where, f"{len(counts):,} characters or runs", expected)
    if isinstance(counts, (str, bytes)):
        runs = _parse_rle_string(counts, where)
    elif isinstance(counts, Sequence) and all(_is_length(run) for run in counts):
        runs = np.asarray(counts, dtype=np.int64)
    else:
        expected = f"str, bytes, or integers from 0 to {MAX_PIXELS}"
        raise _broken_rle("the counts of a run-length code are wrong", where, shorten(counts), expected)
    if runs.size and (int(runs.min()) < 0 or int(runs.max()) > height * width):
        seen = f"lengths from {runs.min()} to {runs.max()}"
        raise _broken_rle("a run is negative or too long", where, seen, f"0 to {height * width}")
    if int(runs.sum()) != height * width:
        raise _broken_rle("the runs do not fill the mask", where, int(runs.sum()), f"{height} * {width} pixels")
    values = (np.arange(runs.size) % 2).astype(bool)
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def _is_length(value: object) -> bool:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return is_integer and 0 <= value <= MAX_PIXELS  # type: ignore[operator]


def _parse_rle_string(counts: str | bytes, where: str) -> np.ndarray:
    """Return the run lengths (int64) of COCO's string code, checked character by character.

    Each character minus 48 holds 5 bits, lowest first, and a continuation flag (32); the last character's bit 16 is
    the sign. From the fourth run on, the value is the difference to the run two before (pycocotools maskApi.c).
    """
    try:
        raw = counts.encode("ascii") if isinstance(counts, str) else bytes(counts)
    except UnicodeEncodeError as error:
        raise _broken_rle("a run-length string is not ASCII", where, shorten(counts), "'0' to 'o'") from error
    codes = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - 48
    if codes.size == 0 or codes.min() < 0 or codes.max() > 63:
        raise _broken_rle("a run-length string is empty or has other characters", where, shorten(counts), "'0' to 'o'")
    ends = np.flatnonzero((codes & 32) == 0)
    if ends.size == 0 or ends[-1] != codes.size - 1:
        raise _broken_rle("a run-length string stops inside a run", where, f"...{shorten(raw[-8:])}", "a complete run")
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if int(lengths.max()) > MAX_CHARACTERS_PER_RUN:
        raise _broken_rle("a run is too long", where, f"{lengths.max()} characters", f"<= {MAX_CHARACTERS_PER_RUN}")
    place = np.arange(codes.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values = values - np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _broken_rle(what: str, where: str, seen: object, expected: object) -> SampleError:
    return bad_sample("broken_rle", what, where, seen, expected, "download or convert this file again")


def decode_segmentation(segmentation: object, height: int, width: int, where: str, summed: bool = False) -> np.ndarray:
    """Decode a COCO ``segmentation`` (a run-length code, or polygons in pixels) of an image of that size: (H, W) bool.

    ``summed``: see :func:`~dual_loop.data.coco_masks.decode_polygons`.

    Raises:
        SampleError: ``bad_polygon``, ``broken_rle``, or ``size_mismatch`` where a code has another size.
    """
    if isinstance(segmentation, Mapping):
        mask = decode_rle(segmentation, where)
        if mask.shape != (height, width):
            raise _size_mismatch(mask.shape, (height, width), where, 0)
        return mask
    return decode_polygons(segmentation, height, width, where, summed)


def safe_join(root: str | Path, relative: str) -> Path:
    """Return ``root / relative`` for a name that was read from a data file.

    The check is on the name alone: links that the owner of ``root`` placed inside it are followed.

    Raises:
        SampleError: ``unsafe_path`` where ``relative`` is empty, absolute, or leaves ``root`` (also by ``..``).
    """
    text = str(relative).replace("\\", "/")
    normal = os.path.normpath(text)
    has_drive = len(text) > 1 and text[1] == ":"
    if not text or "\0" in text or text.startswith("/") or has_drive or normal.split("/")[0] in ("..", "."):
        what, fix = "a data file names a path outside its folder", "do not use this file unless you know who wrote it"
        expected = "a relative path below the folder"
        raise bad_sample("unsafe_path", what, str(root), shorten(relative), expected, fix)
    return Path(root) / normal


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (..., H, W) to (..., H2, W2) by the nearest pixel centre.

    Output row ``i`` takes input row ``floor((i + 0.5) * H / H2)``, likewise for columns, computed in integers (the
    rule of Pillow's NEAREST; torch's ``mode="nearest"`` takes ``floor(i * H / H2)`` instead).
    """
    height, width = mask.shape[-2:]
    rows = (2 * np.arange(size[0]) + 1) * height // (2 * size[0])
    columns = (2 * np.arange(size[1]) + 1) * width // (2 * size[1])
    return np.ascontiguousarray(mask[..., rows[:, None], columns])


def fit_mask(mask: np.ndarray, size: tuple[int, int], where: str) -> np.ndarray:
    """Return ``mask`` (H, W) at the image's ``size``: as it is, or resized where it differs by at most 2 pixels a side.

    Raises:
        SampleError: ``size_mismatch``.
    """
    if mask.shape == tuple(size):
        return mask
    if max(abs(mask.shape[0] - size[0]), abs(mask.shape[1] - size[1])) > SIZE_TOLERANCE:
        raise _size_mismatch(mask.shape, size, where, SIZE_TOLERANCE)
    return resize_mask(mask, size)


def check_mask(mask: np.ndarray, where: str) -> None:
    """Raise ``SampleError`` (``empty_mask``) where ``mask`` (H, W) has no pixel."""
    if not mask.any():
        raise bad_sample("empty_mask", "a mask is empty", where, "0 pixels", "1 pixel or more")


def target_vanished(mask: np.ndarray, where: str) -> SampleError:
    """Return the error for a mask (H, W) of which nothing is left in what the model learns from."""
    seen = f"{np.count_nonzero(mask)} pixels of {mask.shape[0]} x {mask.shape[1]} (H x W)"
    what, fix = "a region has no pixel left in its target", "raise the minimum area of the data set"
    return bad_sample("target_vanished", what, where, seen, "a larger object", fix)


def _size_mismatch(seen: Sequence[int], expected: Sequence[int], where: str, tolerance: int) -> SampleError:
    allowed = f"{tuple(expected)} (H, W)" + (f", {tolerance} pixels more or less" if tolerance else "")
    what, fix = "a mask and its image differ in size", "use the original image: this one is resized or of another mask"
    return bad_sample("size_mismatch", what, where, f"{tuple(seen)} (H, W)", allowed, fix)


def pool_mask_to_grid(
    masks: torch.Tensor | np.ndarray, grid_size: int = 16, threshold: float = 0.5, mode: str = "area"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool masks to the G x G grid of image tokens; no mask is left without a cell.

    ``area`` keeps the cells that the mask covers by at least ``threshold`` (in (0, 1]); coverage is exact, so a cell
    that is exactly half covered is kept. ``nearest`` is ``torch.nn.functional.interpolate(mode="nearest")`` to (G, G),
    as Sa2VA trains. In both modes the best-covered cell (the first in row-major order on ties) is kept where no cell
    would be left: a region without a token cannot be captioned.

    Args:
        masks: (N, H, W) bool, integer or float, foreground where > 0; torch or numpy.
        grid_size: G.

    Returns:
        (N, G, G) bool, and (N,) bool that is True where the best-covered cell had to be kept; both on ``masks.device``.

    Raises:
        SampleError: ``empty_mask`` where a mask has no foreground pixel.
        ConfigError: unknown ``mode`` or a ``threshold`` outside (0, 1].
    """
    import torch

    if mode not in ("area", "nearest"):
        raise ConfigError(explain("unknown grid pooling", "data.grid_pooling", mode, "area or nearest"))
    if not 0 < threshold <= 1 or math.isnan(threshold):
        raise ConfigError(explain("coverage threshold out of range", "threshold", threshold, "above 0, at most 1"))
    stack = torch.from_numpy(np.ascontiguousarray(masks)) if isinstance(masks, np.ndarray) else masks
    if stack.ndim != 3:
        raise ValueError(explain("masks to pool have the wrong shape", seen=tuple(stack.shape), expected="(N, H, W)"))
    grid = torch.zeros(stack.shape[0], grid_size, grid_size, dtype=torch.bool, device=stack.device)
    rescued = torch.zeros(stack.shape[0], dtype=torch.bool, device=stack.device)
    for index, mask in enumerate(stack):  # one at a time: N float copies of a large image would fill the memory
        foreground = mask if mask.dtype == torch.bool else mask > 0
        if mode == "nearest":
            pixels = foreground.view(torch.uint8)[None, None]
            grid[index] = torch.nn.functional.interpolate(pixels, (grid_size, grid_size), mode="nearest")[0, 0] > 0
            if bool(grid[index].any()):
                continue
        covered = _covered_area(foreground, grid_size, f"mask {index} of {stack.shape[0]}")
        if mode == "area":
            grid[index] = covered >= threshold * foreground.numel()
        if not bool(grid[index].any()):
            rescued[index] = True
            grid[index].view(-1)[covered.argmax()] = True
    return grid, rescued


def area_fractions(masks: np.ndarray, size: int) -> torch.Tensor:
    """Return the part of each cell of a Q x Q grid that masks (N, H, W) bool cover: (N, Q, Q) float32 in 0..1.

    Raises:
        SampleError: ``empty_mask`` where a mask has no foreground pixel.
    """
    import torch

    stack = torch.from_numpy(np.ascontiguousarray(masks))
    cells = [_covered_area(mask, size, f"mask {index} of {len(stack)}") for index, mask in enumerate(stack)]
    return torch.stack(cells).div_(stack[0].numel()).float()


def _covered_area(foreground: torch.Tensor, grid_size: int, where: str) -> torch.Tensor:
    """Return (G, G) float64: covered area of each cell in units of 1/G**2 pixel, exact; a full cell has H*W."""
    import torch

    rows = torch.nonzero(foreground.any(dim=1)).flatten()
    if rows.numel() == 0:
        raise bad_sample("empty_mask", "a mask to pool is empty", where, "0 pixels", "1 pixel or more")
    columns = torch.nonzero(foreground.any(dim=0)).flatten()
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    box = foreground[top:bottom, left:right].to(torch.float64)
    height, width = foreground.shape
    by_row = _overlap(height, grid_size, top, bottom, foreground.device)
    by_column = _overlap(width, grid_size, left, right, foreground.device)
    return by_row @ box @ by_column.T


def _overlap(side: int, grid_size: int, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Return (G, stop - start) float64: overlap of each cell with pixels ``start`` to ``stop``, in 1/G pixel."""
    import torch

    cells = torch.arange(grid_size, device=device)[:, None] * side
    pixels = torch.arange(start, stop, device=device)[None, :] * grid_size
    overlap = torch.minimum(cells + side, pixels + grid_size) - torch.maximum(cells, pixels)
    return overlap.clamp(min=0).to(torch.float64)

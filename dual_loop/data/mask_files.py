"""Masks that are stored as images or arrays: what their values mean.

=====================================  ================================================================================
stored                                 read as
=====================================  ================================================================================
one value besides 0, 1 bit, bool       one object
palette, integers of 16 bits or more   labels; 0 is background
grey of 8 bits, areas of one value     labels; 255 beside others is void (``data.masks_void``)
grey of 8 bits, soft edges; JPEG       one object, from half the range on (128)
floats of 0 to 1                       one object, from 0.5 on
colours                                labels, black is background, VOC's (224, 224, 192) void
alpha                                  transparent pixels are background; where the rest has one colour, or those of a
                                       photograph, what is opaque is the object
``.npy`` of N planes                   N objects
=====================================  ================================================================================

What could be either is refused: ``ambiguous_mask``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dual_loop.data.images import open_image_file
from dual_loop.data.limits import array_header, check_file, check_pixels, max_file_bytes, max_pixels, open_file
from dual_loop.errors import SampleError, bad_sample

MASK_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".npy")
MAX_LABELS = 4096
"""Most objects of a file: a photograph among the masks would have more."""

_VOC_VOID = 0xE0E0C0
_LEAST_TONE = 64
"""Grey values from here on are tones rather than numbers of classes: 255 beside them may be an object as well."""


class MaskFile(NamedTuple):
    """The objects of a file.

    Attributes:
        values: (H, W) integers, or (N, H, W) bool. labels: the value, or the plane from 1 on, of each object by its
            name: ``""`` for the one object of a mask, else the number or the colour ``rrggbb``.
    """

    values: np.ndarray
    labels: Mapping[str, int]

    def mask(self, label: int) -> np.ndarray:
        """Return the object of ``label`` (0 where there is none): (H, W) bool."""
        if self.values.ndim == 3:
            return np.ascontiguousarray(self.values[label - 1])
        return np.ascontiguousarray(self.values == label if label else np.zeros_like(self.values, bool))


def read_mask(path: Path, void: int | None = 255, contents: io.BytesIO | None = None) -> MaskFile:
    """Read a mask file, or an image's ``contents`` that are called ``path``; an empty mask has the one label 0.

    Raises:
        SampleError: ``missing_file``, ``truncated_file``, ``not_an_image``, ``too_large``, ``ambiguous_mask``.
    """
    is_lossy, is_numbered = False, False
    if contents is None and path.suffix.lower() == ".npy":
        values = _load_array(path)
    else:
        image = open_image_file(contents or path, str(path))
        is_lossy, is_numbered = image.format in ("JPEG", "MPO"), image.mode == "P"
        values = _opaque_values(image)
    if values.ndim == 3 and values.dtype == bool:
        return MaskFile(values, {str(number): number for number in range(1, len(values) + 1)})
    if values.ndim == 3:
        channels = values[:, :, :3].astype(np.int64)
        if np.ptp(channels, axis=2).max(initial=0) > (32 if is_lossy else 0):
            return _colours(channels, is_lossy, void, path)
        values = values[:, :, 0]
    if values.dtype.kind == "f":
        values = _of_floats(values, path)
    if values.dtype != np.uint8 or is_numbered:
        return _numbers(values, void if is_numbered else None if void is None else 65535, path)
    return _grey(values, is_lossy, void, path)


def _ambiguous(path: Path, seen: str, expected: str, fix: str) -> SampleError:
    return bad_sample("ambiguous_mask", "a mask is neither one object nor labels", str(path), seen, expected, fix)


def _numbers(values: np.ndarray, void: int | None, path: Path) -> MaskFile:
    """Every value above 0 is an object, ``void`` only where it is alone."""
    if values.dtype == bool:
        values = values.astype(np.uint8)
    labels = [int(value) for value in np.unique(values) if value > 0]
    if len(labels) > 1 and void in labels:
        labels.remove(void)
        if len(labels) == 1:
            return MaskFile(values, {"": labels[0]})
    if len(labels) > MAX_LABELS:
        raise _ambiguous(path, f"{len(labels):,} values", f"at most {MAX_LABELS:,} labels", "is it a photograph?")
    if len(labels) <= 1:
        return MaskFile(values, {"": labels[0] if labels else 0})
    return MaskFile(values, {str(label): label for label in labels})


def _grey(values: np.ndarray, is_lossy: bool, void: int | None, path: Path) -> MaskFile:
    found = np.unique(values[values > 0]).tolist()
    if not is_lossy and len(found) <= 1:
        return _numbers(values, None, path)
    if is_lossy and found[-1:] < [128]:
        if found[-1:] > [15]:
            raise _ambiguous(path, f"grey values up to {found[-1]} in a JPEG", "black and white", "save masks as PNG")
        return MaskFile(values, {"": 0})
    is_soft = is_lossy
    if not is_lossy and found[-1] >= 128:
        # In labels most pixels have neighbours of their value on all sides; in a soft edge hardly any has.
        inner = _inner(values)[(values > 0) & (values < 255)]
        share = float(inner.mean()) if len(inner) else 1.0
        is_soft = share < 0.1
        if not is_soft and 255 in found and void == 255 and (share < 0.4 or found[0] >= _LEAST_TONE):
            seen, fix = f"{len(found)} grey values and 255", "threshold the mask, or save labels as a palette image"
            raise _ambiguous(path, seen, "0 and 255, or labels below 64 with 255 for void", fix)
    return MaskFile((values >= 128).astype(np.uint8), {"": 1}) if is_soft else _numbers(values, void, path)


def _inner(values: np.ndarray) -> np.ndarray:
    """Return where a pixel has the value of its four neighbours, as far as there are any: (H, W) bool."""
    padded = np.pad(values, 1, mode="edge")
    shifted = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return np.asarray(np.logical_and.reduce([values == other for other in shifted]))


def _colours(channels: np.ndarray, is_lossy: bool, void: int | None, path: Path) -> MaskFile:
    codes = channels[:, :, 0] << 16 | channels[:, :, 1] << 8 | channels[:, :, 2]
    found = [int(code) for code in np.unique(codes) if code and not (code == _VOC_VOID and void is not None)]
    if is_lossy or len(found) > MAX_LABELS or (len(found) > 1 and _inner(codes)[codes > 0].mean() < 0.4):
        seen, fix = f"{len(found):,} colours{' in a JPEG' * is_lossy}", "save colour maps as PNG, or as labels"
        raise _ambiguous(path, seen, "one colour an object, without soft edges", fix)
    names = {f"{code:06x}": code for code in found}
    return MaskFile(codes, names if len(found) > 1 else {"": found[0] if found else 0})


def _opaque_values(image: Image.Image) -> np.ndarray:
    """Return the values of a mask image, (H, W) or (H, W, 3), with transparent pixels at 0."""
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}.get(image.mode, "RGB"))
    values: np.ndarray = np.asarray(image)
    if image.mode not in ("LA", "PA", "RGBA"):
        return values
    colours, alpha = values[:, :, :-1], values[:, :, -1].astype(int)
    if alpha.min() == alpha.max():
        return colours.squeeze(2) if colours.shape[2] == 1 else colours
    is_opaque = 2 * alpha >= alpha.max()
    kept = np.where(is_opaque[:, :, None], colours, 0).astype(np.uint8)
    codes = (colours.astype(np.int64) << np.arange(0, 8 * colours.shape[2], 8)).sum(axis=2)
    if len(np.unique(codes[is_opaque])) == 1 or _inner(codes)[is_opaque].mean() < 0.4:
        return np.asarray(is_opaque)
    return kept.squeeze(2) if kept.shape[2] == 1 else kept


def _load_array(path: Path) -> np.ndarray:
    """Return a ``.npy`` as (H, W) of any number, (H, W, 3) uint8, or (N, H, W) bool; its header is looked at first."""
    expected = "(H, W), (H, W, 3) uint8 or (N, H, W), of bool, integers or floats"
    try:
        if check_file(path) > max_file_bytes():
            raise ValueError("larger than data.max_file_mb")
        with open_file(path) as file:
            array_header(file)
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        shape = tuple(side for side in stored.shape if side != 1) if stored.ndim > 2 else stored.shape
        if stored.dtype.kind not in "buif" or len(shape) not in (2, 3):
            raise ValueError(f"{stored.shape} {stored.dtype}")
        has_colours = len(shape) == 3 and shape[2] in (3, 4) and stored.dtype == np.uint8
        height, width = shape[:2] if has_colours else shape[-2:]
        check_pixels(height, width, str(path))
        if stored.size > max_pixels() * (3 if has_colours else 1):
            raise ValueError(f"{stored.size:,} values, more than data.max_pixels")
        values = np.array(stored).reshape(shape)
    except FileNotFoundError as error:
        raise bad_sample("missing_file", "a mask is missing", str(path)) from error
    except (OSError, ValueError, TypeError, AttributeError, SyntaxError, EOFError, OverflowError, MemoryError) as error:
        raise bad_sample("not_an_image", "an array is not a mask", str(path), str(error), expected) from error
    if len(shape) == 2 or has_colours:
        return values
    return values > (0.5 if values.dtype.kind == "f" else 0)


def _of_floats(values: np.ndarray, path: Path) -> np.ndarray:
    if np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1:
        return np.asarray(values >= 0.5)
    if np.isfinite(values).all() and (values == np.round(values)).all() and np.abs(values).max() < 2**31:
        return values.astype(np.int64)
    seen = f"floats from {values.min():g} to {values.max():g}"
    raise _ambiguous(path, seen, "floats of 0 to 1, or whole numbers", "save masks with integers")

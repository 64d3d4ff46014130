"""Reader of SA-V frame pairs: one npz a pair, with two frames and the same object's mask on each (:data:`LAYOUT`).

A file may hold more than two frames; with ``frames`` above 2 it is a clip of as many of them. SA-V is of Ravi et al.
2024, arXiv 2408.00714; it was converted to pairs. Frames may differ in size; their scale and that of masks is told from
dtype and maximum, array by array (:func:`to_uint8_frame`, :func:`to_bool_mask`).

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``missing_key``, ``bad_array``,
``too_large``, ``size_mismatch``, ``empty_mask``.
"""

from __future__ import annotations

import math
import os
import zipfile
from itertools import chain, takewhile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dual_loop.data.index import list_tree, load_or_build
from dual_loop.data.layout import layout_error
from dual_loop.data.limits import RefusedFile, array_header, check_pixels, max_pixels, open_file
from dual_loop.data.masks import check_mask
from dual_loop.data.reader import Reader
from dual_loop.data.string_table import StringTable
from dual_loop.errors import SampleError, bad_sample, shorten
from dual_loop.types import RegionSample

LAYOUT = """
  root/
    **/masklet_data_<n>.npz    (any depth; frame1, frame2 (H, W, 3); mask1, mask2 (H, W); frame3, mask3, ... in clips)
"""

PREFIX = "masklet_data_"
_DIRECTORY_BYTES, _ZIP_END_BYTES = 2**20, 22 + 2**16
"""Most bytes of the table of members of an archive; its last record with the longest comment behind it."""


class SavPairs(Reader):
    """SA-V frame pairs; every entry has one region.

    ``frames``: most frames that are read of a file, 2 or more.

    Raises:
        ConfigError: the folder does not exist or holds no pair.
    """

    name, title, layout = "sav", "SA-V", LAYOUT

    def __init__(
        self, root: str | Path, max_samples: int | None = None, index_dir: str | Path | None = None, frames: int = 2
    ) -> None:
        super().__init__(root, index_dir)
        self.frames = frames
        key = {"kind": "sav", "root": str(self.root)}

        def build() -> dict[str, np.ndarray]:
            files, watched = list_tree(self.root, (".npz",), index_dir, key)
            paths = StringTable.from_strings(path for path in files if path.rsplit("/", 1)[-1].startswith(PREFIX))
            return {**paths.to_arrays("path"), **watched}

        self._paths = StringTable.from_arrays(load_or_build(index_dir, key, build), "path")
        if not len(self._paths):
            raise layout_error("the SA-V folder holds no frame pair", self.root, f"no {PREFIX}*.npz", LAYOUT)
        self._set_entries(np.arange(len(self._paths)), max_samples, "sav_max_samples", self._paths)

    def entry_id(self, index: int) -> str:
        """Return the path below the root, without ``.npz``."""
        return self._paths[int(self._rows[index])].removesuffix(".npz")

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Read pair ``index``. The caption is made from frame 1, the segmentation compared on frame 2 and those behind.

        The third and later frames are left out where they do not show the object.
        """
        path = self.root / self._paths[int(self._rows[index])]
        arrays = _read_npz(path, self.frames)
        images, masks = [], []
        for number in range(1, len(arrays) // 2 + 1):
            image = to_uint8_frame(arrays[f"frame{number}"], f"{path}[frame{number}]")
            where = f"{path}[mask{number}]"
            mask = to_bool_mask(arrays[f"mask{number}"], where)
            if number > 2 and not mask.any():
                continue
            if mask.shape != image.shape[:2]:
                what = "a mask and its frame differ in size"
                raise bad_sample("size_mismatch", what, where, mask.shape, image.shape[:2])
            check_mask(mask, where)
            images.append(image)
            masks.append(mask[None])
        later = tuple(zip(images, masks, strict=True))[2:]
        pair = (images[0], masks[0], ("0",), ((),), images[1], masks[1])
        return RegionSample(self.name, self.entry_id(index), *pair, later_targets=later)


def _read_npz(path: Path, frames: int) -> dict[str, np.ndarray]:
    """Return the frames and masks of an npz file, at most ``frames`` of each; pickled objects are refused."""
    fix = "copy or convert this file again, or remove it"
    arrays: dict[str, np.ndarray] = {}
    try:
        with open_file(path) as file, zipfile.ZipFile(_check_directory(file)) as archive:
            stored = {name.removesuffix(".npy"): name for name in archive.namelist()}
            keys = ["frame1", "mask1", "frame2", "mask2"]
            missing = [key for key in keys if key not in stored]
            if missing:
                what, expected = "a frame pair lacks " + ", ".join(missing), ", ".join(keys)
                raise bad_sample("missing_key", what, str(path), shorten(sorted(stored)), expected, fix)
            more = [(f"frame{number}", f"mask{number}") for number in range(3, frames + 1)]
            keys += chain.from_iterable(takewhile(set(stored).issuperset, more))
            left = 4 * max_pixels()
            for key in keys:
                arrays[key] = _read_array(archive, stored[key], f"{path}[{key}]", left)
                left -= arrays[key].nbytes
    except SampleError:
        raise
    except FileNotFoundError as error:
        raise bad_sample("missing_file", "a frame pair is missing", str(path), fix=fix) from error
    except Exception as error:  # damaged archives raise nearly anything, depending on which byte is wrong
        raise bad_sample("truncated_file", "a frame pair is damaged", str(path), error, "a whole npz", fix) from error
    return arrays


def _check_directory(file: BinaryIO) -> BinaryIO:
    """Return the file of a zip archive whose table of members is small; all of it becomes objects when it is opened."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _ZIP_END_BYTES))
    tail = file.read()
    place = tail.rfind(b"PK\5\6", 0, len(tail) - 18)
    size = int.from_bytes(tail[place + 12 : place + 16], "little")
    if place < 0 or size > _DIRECTORY_BYTES or tail[place - 20 : place - 16] == b"PK\6\7":
        seen = "zip64" if place >= 0 and size <= _DIRECTORY_BYTES else f"{size:,} bytes"
        raise RefusedFile("no npz archive" if place < 0 else f"a table of members that is too large ({seen})")
    return file


def _read_array(archive: zipfile.ZipFile, name: str, where: str, most: int) -> np.ndarray:
    """Return an array of an archive, of at most ``most`` bytes: its header is looked at before it is decompressed."""
    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in another way than numpy does")
    with archive.open(name) as member:
        shape, dtype = array_header(member)
        if dtype.hasobject:
            raise _bad_array("an array holds Python objects, which only pickle can read", where, dtype, "numbers")
        if (size := math.prod(shape) * dtype.itemsize) > most:
            expected = f"at most {most:,} bytes (4 x data.max_pixels for all arrays)"
            raise bad_sample("too_large", "an array is too large", where, f"{shape} {dtype}, {size:,} bytes", expected)
        member.seek(0)
        return np.asarray(np.lib.format.read_array(member, allow_pickle=False))


def to_uint8_frame(array: np.ndarray, where: str) -> np.ndarray:
    """Return a frame as (H, W, 3) uint8.

    Integers are 0..255 as they are; floats are 0..1 where their maximum is at most 1, else 0..255.

    Raises:
        SampleError: ``bad_array`` for another shape, dtype or range, and for values that are not finite.
    """
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise _bad_array("a frame has the wrong shape", where, array.shape, "(H, W, 3)")
    check_pixels(array.shape[0], array.shape[1], where)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    low, high = _range_of(array, where)
    if low < 0 or high > 255:
        raise _bad_array("a frame is out of range", where, f"{low:g} to {high:g}", "0..255 or 0..1")
    scale = 255 if array.dtype.kind == "f" and high <= 1 else 1
    return np.rint(array.astype(np.float32) * scale).astype(np.uint8)


def to_bool_mask(array: np.ndarray, where: str) -> np.ndarray:
    """Return a mask as (H, W) bool: above half of its scale, which is 1 where the maximum is at most 1, else 255.

    Raises:
        SampleError: ``bad_array``, also for a maximum in between (2..127), which is a map of labels and no mask.
    """
    if array.ndim != 2 or 0 in array.shape:
        raise _bad_array("a mask has the wrong shape", where, array.shape, "(H, W)")
    if array.dtype == np.bool_:
        return np.ascontiguousarray(array)
    low, high = _range_of(array, where)
    if low < 0 or high > 255 or 1 < high <= 127.5:
        raise _bad_array("a mask is out of range", where, f"{low:g} to {high:g}", "{0, 1} or {0, 255}")
    return np.ascontiguousarray(array > (0.5 if high <= 1 else 127.5))


def _range_of(array: np.ndarray, where: str) -> tuple[float, float]:
    if array.dtype.kind not in "iuf":
        raise _bad_array("an array has an unknown dtype", where, array.dtype, "uint8 or float")
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        raise _bad_array("an array is not finite", where, f"{low:g} to {high:g}", "finite values")
    return low, high


def _bad_array(what: str, where: str, seen: object, expected: str) -> SampleError:
    return bad_sample("bad_array", what, where, seen, expected, "convert this pair again, or remove it")

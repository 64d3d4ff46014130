"""What pycocotools does: polygons are drawn, masks become run-length codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from dual_loop.data.limits import check_pixels
from dual_loop.errors import SampleError, bad_sample, explain, shorten

MAX_OUTLINE = 2_000_000
"""Longest outline of an object in pixels: pycocotools makes five points of 20 bytes of each pixel of it."""


def encode_rle(mask: np.ndarray) -> dict[str, object]:
    """Encode ``mask`` (H, W), foreground where > 0, as ``{"size": [H, W], "counts": str}`` (COCO's string code)."""
    if mask.ndim != 2:
        raise ValueError(explain("a mask to encode has the wrong shape", seen=mask.shape, expected="(H, W)"))
    rle = coco_mask.encode(np.asfortranarray((mask > 0).astype(np.uint8)))  # a new run begins at every change of value
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def mend_polygons(segmentation: object, where: str) -> object:
    """Return polygons as tools mean them: one as a flat list, points as [x, y] pairs, without pieces below 3 points.

    What is no list of numbers is returned as it is, for :func:`decode_polygons` to refuse.

    Raises:
        SampleError: ``bad_polygon`` where all coordinates are parts of the image rather than pixels.
    """
    try:
        if not isinstance(segmentation, list):
            return segmentation
        is_one = bool(segmentation) and all(np.ndim(item) == 0 or np.shape(item) == (2,) for item in segmentation)
        pieces = [np.asarray(piece, np.float64).reshape(-1) for piece in ([segmentation] if is_one else segmentation)]
    except (TypeError, ValueError, OverflowError, RecursionError):
        return segmentation
    kept = [piece.tolist() for piece in pieces if piece.size >= 6]
    if kept and max(map(max, kept)) <= 1:
        fix = "multiply x by the width and y by the height"
        raise bad_sample("bad_polygon", "a polygon is in parts of the image", where, shorten(kept[0]), "pixels", fix)
    return kept or segmentation


def decode_polygons(segmentation: object, height: int, width: int, where: str, summed: bool = False) -> np.ndarray:
    """Draw polygons ``[x1, y1, x2, y2, ...]`` in pixels on an image: (H, W) bool; ``where`` is for the message.

    They have at least 3 points each, finite, near the image: pycocotools takes four numbers for a box and walks along
    every edge, so both a short polygon and a point that is millions of pixels away have to be stopped here.

    They are united. ``summed`` adds them up, which exchanges inside and outside where they overlap: published Sa2VA and
    LISA figures were counted against these masks.

    Raises:
        SampleError: ``bad_polygon``, ``too_large``.
    """
    check_pixels(height, width, where)

    def bad(what: str, seen: str, expected: str) -> SampleError:
        return bad_sample("bad_polygon", what, where, seen, expected, "leave this annotation out or mend it")

    if not isinstance(segmentation, Sequence) or isinstance(segmentation, (str, bytes)) or not segmentation:
        raise bad("a segmentation is unknown", shorten(segmentation), "polygons or a run-length code")
    reach = 2 * max(height, width)
    polygons, outline = [], 0.0
    for polygon in segmentation:
        try:
            points = np.asarray(polygon, dtype=np.float64)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise bad("a polygon is not numbers", shorten(polygon), "[x1, y1, x2, y2, ...]") from error
        if points.ndim != 1 or points.size < 6 or points.size % 2:
            seen = f"{points.size} numbers, {points.ndim} dimensions"
            raise bad("a polygon has too few points", seen, "3 points or more, as x, y pairs")
        if not np.isfinite(points).all() or np.abs(points).max() > reach:
            expected = f"finite coordinates within {width} x {height} pixels"
            raise bad("a polygon lies far outside its image", shorten(points.tolist()), expected)
        corners = points.reshape(-1, 2)
        outline += np.abs(corners - np.roll(corners, 1, axis=0)).max(1).sum()
        if outline > MAX_OUTLINE:
            raise bad("a polygon has too long an outline", f"{outline:,.0f} pixels", f"at most {MAX_OUTLINE:,}")
        polygons.append(points.tolist())
    codes = coco_mask.frPyObjects(polygons, height, width)
    if summed:
        total = np.zeros((height, width), np.uint8, order="F")
        for code in codes:  # one at a time: all of them decoded would be as many images
            total += coco_mask.decode(code)
        code = coco_mask.encode(total)
    else:
        code = coco_mask.merge(codes)
    return np.ascontiguousarray(coco_mask.decode(code) > 0)

"""The files of SA-1B, listed and paired: what its reader looks up.

Image and JSON belong together when their stems agree and their folders agree once parts named ``img`` and ``js`` are
taken out. The index holds the union: an image without JSON, or JSON without image, is a bad sample when it is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dual_loop.data.index import Key, build_in_parts, index_folder, join_parts, list_tree
from dual_loop.data.string_table import StringTable
from dual_loop.data.tar import TAR_SUFFIXES, list_tar

PREFIX = "sa_"

Place = tuple[int, int, int]
"""Number of the archive, offset in it (uncompressed), size; :data:`OUTSIDE` for a file of its own."""

OUTSIDE: Place = (-1, 0, 0)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def build_index(
    root: Path, index_dir: str | Path | None, key: Key, name_of: Callable[[str], str]
) -> dict[str, np.ndarray]:
    """Return the tables of all entries, of their places, and of the archives and what is damaged in them.

    Args:
        index_dir, key: see :func:`~dual_loop.data.index.load_or_build`.
        name_of: from a path to the name of its entry, the same for an image and its JSON file.
    """
    listed, watched = list_tree(root, (*IMAGE_SUFFIXES, ".json", *TAR_SUFFIXES), index_dir, key)
    tars = [path for path in listed if path.lower().endswith(TAR_SUFFIXES)]
    files = [(path, OUTSIDE) for path in listed if not path.lower().endswith(TAR_SUFFIXES)]
    paths = [str(root / tar) for tar in tars]
    build = functools.partial(list_tar, str(index_folder(index_dir)), PREFIX)
    count, describe = (lambda part: len(part["member_place"])), "SA-1B archives"
    parts = build_in_parts(paths, build, index_dir, key, describe=describe, count=count)
    for number, (tar, part) in enumerate(zip(tars, parts, strict=True)):
        names, places = StringTable.from_arrays(part, "member"), part["member_place"].tolist()
        files += [(f"{tar}/{names[row]}", (number, *place)) for row, place in enumerate(places)]
    found = {**watched, **StringTable.from_strings([]).to_arrays("damage")}
    kept = [{name: part[name] for name in found} for part in parts]
    return {**_pair_up(files, name_of), **StringTable.from_strings(tars).to_arrays("tar"), **join_parts([found, *kept])}


def _pair_up(files: Sequence[tuple[str, Place]], name_of: Callable[[str], str]) -> dict[str, np.ndarray]:
    """Return the tables of images and JSON files, row by row those of one entry, with their places (n, 3) int64."""
    pairs: dict[str, list[tuple[str, Place]]] = {}
    for path, place in files:
        if path.rsplit("/", 1)[-1].startswith(PREFIX) and path.lower().endswith((*IMAGE_SUFFIXES, ".json")):
            entry = pairs.setdefault(name_of(path), [("", OUTSIDE), ("", OUTSIDE)])
            entry[path.lower().endswith(".json")] = (path, place)
    ordered = [pairs[name] for name in sorted(pairs)]
    arrays: dict[str, np.ndarray] = {}
    for column, name in enumerate(("image", "record")):
        arrays |= StringTable.from_strings(pair[column][0] for pair in ordered).to_arrays(name)
        arrays[f"{name}_place"] = np.array([pair[column][1] for pair in ordered], np.int64).reshape(-1, 3)
    return arrays

"""The files of SA-1B, listed and paired: what its reader looks up.

Image and JSON belong together when their stems agree and their folders agree once parts named ``img``, ``js``,
``images`` and ``annotations`` are taken out; what is then alone is paired by its stem (images in one archive, JSON in
another). An image that is unpacked as well as archived, or in two archives, is one entry. The index holds the union,
also an image without JSON and JSON without an image. Files whose names do not begin with ``sa_``, as in some mirrors,
count where no others are there, and in pairs alone.
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
KINDS = {**dict.fromkeys(IMAGE_SUFFIXES, 0), ".json": 1}
"""Column of an entry by the ending of a file."""


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
    build = functools.partial(list_tar, str(index_folder(index_dir)), "")
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
        kind = path[path.rfind(".") :].lower()
        if kind in KINDS:
            entry = pairs.setdefault(name_of(path), [("", OUTSIDE), ("", OUTSIDE)])
            entry[KINDS[kind]] = (path, place)
    _pair_by_stem(pairs)
    own = {name: pair for name, pair in pairs.items() if name[name.rfind("/") + 1 :].startswith(PREFIX)}
    pairs = own or {name: pair for name, pair in pairs.items() if pair[0][0] and pair[1][0]}
    num_doubled = _drop_doubled(pairs) if any(place != OUTSIDE for _, place in files) else 0
    ordered = [pairs[name] for name in sorted(pairs)]
    arrays: dict[str, np.ndarray] = {"num_doubled": np.array([num_doubled], np.int64)}
    for column, name in enumerate(("image", "record")):
        arrays |= StringTable.from_strings(pair[column][0] for pair in ordered).to_arrays(name)
        arrays[f"{name}_place"] = np.array([pair[column][1] for pair in ordered], np.int64).reshape(-1, 3)
    return arrays


def _pair_by_stem(pairs: dict[str, list[tuple[str, Place]]]) -> None:
    """Join an image and a JSON file that are alone, where no others of their stem are."""
    alone: dict[str, list[list[str]]] = {}
    for name, (image, record) in pairs.items():
        if not image[0] or not record[0]:
            alone.setdefault(name[name.rfind("/") + 1 :], [[], []])[not image[0]].append(name)
    for images, records in alone.values():
        if len(images) == len(records) == 1:
            pairs[images[0]][1] = pairs.pop(records[0])[1]


def _drop_doubled(pairs: dict[str, list[tuple[str, Place]]]) -> int:
    """Keep one entry of each stem that is archived: unpacked before archived, a pair before half of one."""
    if len({name[name.rfind("/") + 1 :] for name in pairs}) == len(pairs):
        return 0
    kept: dict[str, str] = {}
    order = sorted(pairs, key=lambda name: (not all(path for path, _ in pairs[name]), pairs[name][0][1], name))
    doubled = []
    for name in order:
        first = kept.setdefault(name[name.rfind("/") + 1 :], name)
        if first != name and any(place != OUTSIDE for one in (first, name) for _, place in pairs[one]):
            doubled.append(name)
    for name in doubled:
        del pairs[name]
    return len(doubled)

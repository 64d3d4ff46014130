"""The files of RefCOCO and gRefCOCO, read and checked: references, annotations and images become one index.

The ``.p`` files are pickles of dicts, lists, strings and numbers. The unpickler here refuses every global but the three
that an integer of NumPy asks for, which this module stands in for. A sentence's ``sent`` is taken, else its ``raw``.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypedDict, cast

import numpy as np

from dual_loop.data.index_file import ANY_SIZE, watched_arrays
from dual_loop.data.limits import parse_json, read_file
from dual_loop.data.masks import safe_join
from dual_loop.data.string_table import StringTable
from dual_loop.errors import ConfigError, SampleError, explain, shorten


class _IntegerType:
    """Stands in for ``numpy.dtype`` of an integer: how its bytes are read."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch(r"[<>|=]?[iu][1248]", code):
            raise pickle.UnpicklingError(f"asks for the global numpy.dtype of {code}, which is no integer")
        self.signed, self.big = code[-2] == "i", code[0] == ">"

    def __setstate__(self, state: Sequence[object]) -> None:
        self.big = state[1] == ">"


def _integer(kind: _IntegerType, data: str | bytes) -> int:
    raw = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data  # of Python 2
    return int.from_bytes(raw, "big" if kind.big else "little", signed=kind.signed)


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1" if encoding == "latin1" else "ascii")


_STAND_INS = {("numpy", "dtype"): _IntegerType, ("_codecs", "encode"): _encode}
_STAND_INS |= {(f"numpy.{core}.multiarray", "scalar"): _integer for core in ("core", "_core")}


class _PlainUnpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Loads dicts, lists, strings and numbers; refuses everything that needs another global.

    It extends the unpickler in Python: the one in C takes gigabytes for an opcode of five bytes that names a high
    number. An array of bytes is made at any size it claims.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (stand_in := _STAND_INS.get((module_name, global_name))) is not None:
            return stand_in
        raise pickle.UnpicklingError(f"asks for the global {module_name}.{global_name}")


class Reference(TypedDict):
    """A record of a refs file; further keys are not read. Of gRefCOCO ``ann_id`` is a list, ``[-1]`` for no target."""

    ref_id: int
    ann_id: int | list[int]
    image_id: int
    split: str
    sentences: list[dict[str, str]]


def load_refs(path: Path) -> list[Reference]:
    """Read a ``refs(...).p`` of Python 2 or 3 without running anything in it, or JSON; return its checked records.

    Strings of Python 2 are taken as UTF-8, and as Latin-1 where they are none.

    Raises:
        ConfigError: the pickle asks for a global, is damaged, or has another structure.
    """
    fix = "do not use this file; get the refs from their original source"
    try:
        raw = read_file(path)
        if path.suffix == ".json":
            refs = parse_json(raw)
        else:
            if not raw.startswith(b"\x80"):  # a pickle of lines, whose ends a copy between systems may have changed
                raw = raw.replace(b"\r\n", b"\n")
            refs = _PlainUnpickler(io.BytesIO(raw), encoding="utf-8", errors="surrogateescape").load()
    except pickle.UnpicklingError as error:
        expected = "a pickle of dicts, lists, strings and integers alone"
        raise ConfigError(explain("a refs file was refused", str(path), str(error), expected, fix)) from error
    except Exception as error:  # damaged pickles raise nearly anything, MemoryError and RecursionError among them
        fix = "copy or download it again"
        raise ConfigError(explain("a refs file is damaged", str(path), error, "a complete file", fix)) from error
    if not isinstance(refs, list) or not refs:
        seen = type(refs).__name__ if refs else "an empty list"
        raise ConfigError(explain("a refs file has another structure", str(path), seen, "a list of references", fix))
    left = 8 * len(raw) + 2**20
    for number, ref in enumerate(refs):
        left -= _weight(ref)
        if left < 0:
            what, seen = "a refs file holds the same parts again and again", f"{len(raw):,} bytes"
            raise ConfigError(explain(what, str(path), seen, "not 8 times as much text", fix))
        if not _is_reference(ref):
            expected = "ref_id, image_id (integers), ann_id (integer or list of integers), split (string), "
            expected += "sentences (list of {sent or raw: string})"
            what, where = "a reference has another structure", f"{path}, reference {number}"
            raise ConfigError(explain(what, where, shorten(ref), expected, "get the file again"))
        ref["split"] = _text(ref["split"])
        ref["sentences"] = [{key: _text(value) for key, value in one.items()} for one in ref["sentences"]]
    return refs


def _weight(ref: object) -> int:
    """Return how much there is to look at in a record: parts of a pickle can be in it any number of times."""
    if not isinstance(ref, dict):
        return 1
    parts = [part for part in (ref.get("sentences"), ref.get("ann_id")) if isinstance(part, list)]
    texts = [one.get("sent", one.get("raw")) for one in parts[0] if isinstance(one, dict)] if parts else []
    return sum(map(len, parts)) + sum(len(text) for text in texts if isinstance(text, str))


def _is_reference(ref: object) -> bool:
    if not isinstance(ref, dict) or not isinstance(ref.get("split"), str) or not isinstance(ref.get("sentences"), list):
        return False
    targets = ref.get("ann_id")
    numbers = [ref.get("ref_id"), ref.get("image_id"), *(targets if isinstance(targets, list) else [targets])]
    return all(type(number) is int and abs(number) < 2**63 for number in numbers) and all(
        isinstance(one, dict) and isinstance(one.get("sent", one.get("raw")), str) for one in ref["sentences"]
    )


def _text(value: Any) -> Any:
    """Return a string of Python 2 that is no UTF-8 as Latin-1."""
    if isinstance(value, str) and any("\udc80" <= letter <= "\udcff" for letter in value):
        return value.encode("utf-8", "surrogateescape").decode("latin1")
    return value


def build_index(refs_path: Path, instances_path: Path, image_folder: Path) -> dict[str, np.ndarray]:
    """Join references, annotations and images into arrays; rows are sorted by image, then by ref_id.

    A row's ``segmentation`` is JSON: a list with that of each target, or a text that says why the reference cannot be
    used. An image with expressions without a target alone gets a row for its first annotation, without sentences.

    Raises:
        ConfigError: a file is damaged or has another structure, or they do not belong together.
    """
    watched = [_state(path) for path in (refs_path, instances_path)]
    try:
        tree = parse_json(read_file(instances_path))
        images = {
            _number(image["id"]): (str(image["file_name"]), _number(image.get("height")), _number(image.get("width")))
            for image in tree["images"]
        }
        annotations: dict[int, Mapping[str, Any]] = {_number(item["id"]): item for item in tree["annotations"]}
        classes = {number: _number(item.get("category_id", -1)) for number, item in annotations.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        what, fix = "instances.json is damaged or has another structure", "copy or download it again"
        expected = "images with id, file_name, height, width; annotations with id, segmentation"
        raise ConfigError(explain(what, str(instances_path), error, expected, fix)) from error
    loaded = load_refs(refs_path)
    refs = [ref for ref in loaded if ref["image_id"] in images]
    if not refs:
        what, seen = "no reference names an image of instances.json", f"image_id {loaded[0]['image_id']}, the first"
        raise ConfigError(explain(what, str(refs_path), seen, fix="take both files from the same release"))
    rows = [(f"ref{ref['ref_id']}", ref) for ref in refs] + list(_beside_no_target(refs, annotations))
    rows.sort(key=lambda row: (row[1]["image_id"], row[1]["ref_id"]))
    names, joined = [name for name, _ in rows], [ref for _, ref in rows]
    times = Counter[str]()
    for place, name in enumerate(names):  # an id that is there twice names two regions
        times[name] += 1
        names[place] = name if times[name] == 1 else f"{name}_{times[name]}"
    image_ids = sorted({ref["image_id"] for ref in joined})
    image_numbers = {image_id: number for number, image_id in enumerate(image_ids)}
    splits = sorted({ref["split"] for ref in joined})
    sentences = [[" ".join(one.get("sent", one.get("raw", "")).split()) for one in ref["sentences"]] for ref in joined]
    targets = [_targets(ref, annotations) for ref in joined]
    there, folders = images_there(image_folder, [(images[i][0], i) for i in image_ids])
    return {
        "image_ids": np.array(image_ids, np.int64),
        "image_sizes": np.array([images[i][1:] for i in image_ids], np.int64).reshape(-1, 2),
        "image_there": np.array(there, bool),
        "ref_images": np.array([image_numbers[ref["image_id"]] for ref in joined], np.int64),
        "ref_classes": np.array([classes.get(([*target_ids(ref), -1])[0], -1) for ref in joined], np.int64),
        "ref_splits": np.array([splits.index(ref["split"]) for ref in joined], np.int64),
        "ref_no_target": np.array([found == [] for found in targets], bool),
        "num_unlisted": np.array([len(loaded) - len(refs)], np.int64),
        **StringTable.from_strings(names).to_arrays("ref_name"),
        **StringTable.from_strings(images[i][0] for i in image_ids).to_arrays("image_file"),
        **StringTable.from_strings(splits).to_arrays("split"),
        **StringTable.from_strings(map(json.dumps, targets)).to_arrays("segmentation"),
        **StringTable.from_strings(json.dumps([*filter(None, own)]) for own in sentences).to_arrays("sentence"),
        **watched_arrays([*watched, *folders]),
    }


def _number(value: Any) -> int:
    number = int(value or 0)
    if abs(number) >= 2**63:
        raise ValueError(f"{number} is out of range")
    return number


def target_ids(ref: Reference) -> list[int]:
    """Return the annotations that a reference names; none where it has no target."""
    named = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    return [number for number in named if number >= 0]


def _targets(ref: Reference, annotations: Mapping[int, Mapping[str, Any]]) -> list[object] | str:
    """Return the segmentation of each target, or why the reference cannot be used."""
    found = []
    for number in target_ids(ref):
        if (item := annotations.get(number)) is None:
            return f"annotation {number} is not in instances.json"
        if item.get("image_id", ref["image_id"]) != ref["image_id"]:
            return f"annotation {number} is of image {item['image_id']}, the reference of image {ref['image_id']}"
        found.append(item.get("segmentation"))
    return found


def _beside_no_target(
    refs: Sequence[Reference], annotations: Mapping[int, Mapping[str, Any]]
) -> Iterable[tuple[str, Reference]]:
    """Yield name and row of an object for each image of a split that has expressions without a target alone."""
    lacking = {(ref["image_id"], ref["split"]) for ref in refs}
    lacking -= {(ref["image_id"], ref["split"]) for ref in refs if target_ids(ref)}
    first: dict[object, int] = {}
    for number, item in annotations.items() if lacking else ():
        first.setdefault(item.get("image_id"), number)
    for image_id, split in sorted(lacking):
        if image_id in first:
            number = first[image_id]
            ref = {"ref_id": -1, "ann_id": number, "image_id": image_id, "split": split, "sentences": []}
            yield f"ann{number}", cast(Reference, ref)


def coco_names(name: str, image_id: int) -> tuple[str, ...]:
    """Return what a COCO image may be called: its own ``name``, or either name of COCO."""
    return name, f"COCO_train2014_{image_id:012d}.jpg", f"{image_id:012d}.jpg"


def images_there(folder: Path, images: Iterable[tuple[str, int]]) -> tuple[list[bool], list[tuple[str, int, int]]]:
    """Tell which COCO images, by name and id, are below ``folder``; return that and the listed folders to watch."""
    listed: dict[Path, set[str]] = {}
    watched = [_state(folder)]

    def is_there(name: str, image_id: int) -> bool:
        try:
            paths = [safe_join(folder, candidate) for candidate in coco_names(name, image_id)]
        except SampleError:
            return True  # the name leaves the folder: reading it says what is wrong
        for parent in {path.parent for path in paths} - listed.keys():
            if parent.is_dir():
                watched.append(_state(parent))
            listed[parent] = set(os.listdir(parent)) if parent.is_dir() else set()
        return any(path.name in listed[path.parent] for path in paths)

    return [is_there(*image) for image in images], watched


def _state(path: Path) -> tuple[str, int, int]:
    state = path.stat()
    return str(path), state.st_mtime_ns, ANY_SIZE if path.is_dir() else state.st_size

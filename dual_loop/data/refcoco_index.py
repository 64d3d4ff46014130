"""The files of RefCOCO, read and checked: references, annotations and images become one index.

The ``.p`` files are pickles. They need dicts, lists, strings and numbers only, so the unpickler here refuses every
global; a file that asks for one is refused outright. A sentence's ``sent`` is taken, else its ``raw``.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import NoReturn, TypedDict

import numpy as np

from dual_loop.data.index_file import watch_files
from dual_loop.data.limits import parse_json, read_file
from dual_loop.data.string_table import StringTable
from dual_loop.errors import ConfigError, explain


class _PlainUnpickler(pickle.Unpickler):
    """Loads dicts, lists, strings and numbers; refuses everything that needs a global."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"asks for the global {module_name}.{global_name}")


class Reference(TypedDict):
    """A record of a refs file; further keys are not read."""

    ref_id: int
    ann_id: int
    image_id: int
    split: str
    sentences: list[dict[str, str]]


def load_refs(path: Path) -> list[Reference]:
    """Read a ``refs(...).p`` file of Python 2 or 3 without running anything in it; return its checked records.

    Raises:
        ConfigError: the pickle asks for a global (refused, as it could run any code), is damaged, or has another
            structure.
    """
    fix = "do not use this file; get the refs from their original source"
    try:
        refs = _PlainUnpickler(io.BytesIO(read_file(path)), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        expected = "a pickle of dicts, lists, strings and numbers alone"
        raise ConfigError(explain("a refs file was refused", str(path), str(error), expected, fix)) from error
    except Exception as error:  # damaged pickles raise nearly anything, MemoryError and RecursionError among them
        fix = "copy or download it again"
        raise ConfigError(explain("a refs file is damaged", str(path), error, "a complete pickle", fix)) from error
    if not isinstance(refs, list) or not refs:
        seen = type(refs).__name__ if refs else "an empty list"
        raise ConfigError(explain("a refs file has another structure", str(path), seen, "a list of references", fix))
    for number, ref in enumerate(refs):
        sound = isinstance(ref, dict) and isinstance(ref.get("split"), str) and isinstance(ref.get("sentences"), list)
        sound = sound and all(type(ref.get(key)) is int for key in ("ref_id", "ann_id", "image_id"))
        if not sound or not all(
            isinstance(s, dict) and isinstance(s.get("sent", s.get("raw")), str) for s in ref["sentences"]
        ):
            where, seen = f"{path}, reference {number}", f"{str(ref)[:80]}..."
            expected = "ref_id, ann_id, image_id (integers), split (string), sentences (list of {sent or raw: string})"
            fix = "get the file again"
            raise ConfigError(explain("a reference has another structure", where, seen, expected, fix))
    return refs


def build_index(refs_path: Path, instances_path: Path) -> dict[str, np.ndarray]:
    """Join references, annotations and images into arrays; rows are sorted by image, then by ref_id.

    Raises:
        ConfigError: a file is damaged or has another structure, or they do not belong together.
    """
    watched = watch_files([refs_path, instances_path])
    where, fix = str(instances_path), "copy or download instances.json again"
    try:
        tree = parse_json(read_file(instances_path))
        images = {
            int(image["id"]): (str(image["file_name"]), int(image["height"]), int(image["width"]))
            for image in tree["images"]
        }
        annotations = {int(item["id"]): item["segmentation"] for item in tree["annotations"]}
        classes = {int(item["id"]): int(item.get("category_id", -1)) for item in tree["annotations"]}
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        expected = "images with id, file_name, height, width; annotations with id, segmentation"
        what = "instances.json is damaged or has another structure"
        raise ConfigError(explain(what, where, error, expected, fix)) from error
    refs = sorted(load_refs(refs_path), key=lambda ref: (ref["image_id"], ref["ref_id"]))
    for ref in refs:
        for key, value, known in (("image_id", ref["image_id"], images), ("ann_id", ref["ann_id"], annotations)):
            if value not in known:
                what, where = f"a reference names an unknown {key}", f"{refs_path}, ref_id {ref['ref_id']}"
                expected, fix = f"an id of {instances_path}", "take both files from the same release"
                raise ConfigError(explain(what, where, value, expected, fix))
    image_ids = sorted({ref["image_id"] for ref in refs})
    image_numbers = {image_id: number for number, image_id in enumerate(image_ids)}
    splits = sorted({ref["split"] for ref in refs})
    sentences = [[text for s in ref["sentences"] if (text := s.get("sent", s.get("raw", "")).strip())] for ref in refs]
    return {
        "image_ids": np.array(image_ids, np.int64),
        "image_sizes": np.array([images[i][1:] for i in image_ids], np.int64).reshape(-1, 2),
        "ref_ids": np.array([ref["ref_id"] for ref in refs], np.int64),
        "ref_images": np.array([image_numbers[ref["image_id"]] for ref in refs], np.int64),
        "ref_classes": np.array([classes[ref["ann_id"]] for ref in refs], np.int64),
        "ref_splits": np.array([splits.index(ref["split"]) for ref in refs], np.int64),
        **StringTable.from_strings(images[i][0] for i in image_ids).to_arrays("image_file"),
        **StringTable.from_strings(splits).to_arrays("split"),
        **StringTable.from_strings(json.dumps(annotations[ref["ann_id"]]) for ref in refs).to_arrays("segmentation"),
        **StringTable.from_strings(json.dumps(texts) for texts in sentences).to_arrays("sentence"),
        **watched,
    }

"""Evaluation sets of the field: a row of :data:`SETS` each, and one reader.

Formats, as they were read in public code (nothing of it is used here):

* ReasonSeg (Lai et al. 2023, arXiv 2308.00692): a JSON beside each picture, ``text``, ``is_sentence`` and labelme's
  ``shapes`` (dvlab-research/LISA, README.md, utils/data_processing.py, utils/dataset.py).
* GroundingSuite's GSEval (Hu et al. 2025, arXiv 2503.10596): lines of ``idx``, ``image_path``, ``caption``,
  ``class_id``, ``segmentation`` (hustvl/GroundingSuite, evaluate_grounding.py). No file of it says which stratum a
  ``class_id`` is; the texts of the file and the metrics of PANORAMA agree.
* DLC-Bench (Lian et al. 2025, arXiv 2504.16072): COCO JSON (NVlabs/describe-anything, evaluation/).
* ParaDLC-Bench (Sun et al. 2026, arXiv 2606.19534): a list of images with ``annotations`` of ``index`` and ``mask_rle``
  (MSALab-PKU/PerceptionDLM, evaluation/ParaDLC-Bench).

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``not_an_image``,
``unsafe_path``, ``broken_json``, ``bad_polygon``, ``broken_rle``, ``size_mismatch``, ``empty_mask``,
``special_token``, ``too_large``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from dual_loop.data.captions import check_captions
from dual_loop.data.coco_masks import mend_polygons
from dual_loop.data.images import read_picture
from dual_loop.data.layout import layout_error
from dual_loop.data.limits import SAMPLE_BYTES, open_file, parse_json, read_file, read_lines
from dual_loop.data.masks import check_mask, decode_rle, decode_segmentation, fit_mask, safe_join
from dual_loop.data.names import EVAL_SETS
from dual_loop.data.own_lists import read_coco
from dual_loop.data.reader import Reader, take_regions
from dual_loop.errors import ConfigError, SampleError, bad_sample, explain, shorten
from dual_loop.types import RegionSample

MAX_SHAPES, MAX_POINTS = 500, 50_000
"""Of a labelme file: each shape is drawn on a picture of its own, and each edge is looked at in every row."""

Record = Mapping[str, Any]
Records = dict[str, dict[str, Record]]
"""The regions of each image: by the image's name below the root, and by their own name."""


@dataclass(frozen=True)
class EvalSet:
    """One set.

    Attributes:
        title, layout: for messages.
        index: file that lists the regions, or ``{split}``, a folder of files beside the pictures.
        folders: where ``index`` may be below the given folder.
        read: of the path of ``index``, its records; SampleError where they have another structure.
        protocol: what the set fixes, printed with the result.
        judge: the program of the authors that reads the captions, where there is one.
        apply_exif: whether masks are drawn on the picture as its EXIF orientation turns it.
    """

    title: str
    layout: str
    index: str
    folders: tuple[str, ...]
    read: Callable[[Path], Records]
    protocol: str
    judge: str = ""
    apply_exif: bool = False


def _field(record: object, key: str, kinds: tuple[type, ...], where: str) -> Any:
    """Return a value of a record; one that is missing or of another type is ``broken_json``."""
    value = record.get(key) if isinstance(record, Mapping) else record
    if not isinstance(record, Mapping) or not isinstance(value, kinds):
        expected = f"{key!r}: {' or '.join(kind.__name__ for kind in kinds)}"
        fix = "download this file again"
        raise bad_sample("broken_json", f"a record has no usable {key!r}", where, shorten(value), expected, fix)
    return value


def _add(records: Records, image: str, name: str, record: Record, where: str) -> None:
    own = records.setdefault(image, {})
    if name in own:
        raise bad_sample("broken_json", "two regions of an image have one name", where, name, "different names")
    own[name] = record


def _read_reasonseg(folder: Path) -> Records:
    """Return a region for each picture; its JSON is read when it is asked for."""
    pictures = sorted(path.stem for path in folder.iterdir() if path.suffix == ".jpg")
    return {f"{folder.name}/{name}.jpg": {"target": {"file": folder / f"{name}.json"}} for name in pictures}


def _read_gseval(file: Path) -> Records:
    records: Records = {}
    with open_file(file) as stream:
        for number, line in enumerate(read_lines(stream), start=1):
            if line.strip():
                where, record = f"{file}, line {number}", _parse(line, f"{file}, line {number}")
                kind = STRATA.get(_field(record, "class_id", (int,), where))
                if kind is None:
                    seen, expected = record["class_id"], ", ".join(map(str, STRATA))
                    raise bad_sample("broken_json", "a stratum is unknown: 'class_id'", where, seen, expected)
                texts = (_field(record, "caption", (str,), where).strip(),)
                found = {"segmentation": record.get("segmentation"), "texts": texts, "group": kind}
                name = str(_field(record, "idx", (int, str), where))
                _add(records, _field(record, "image_path", (str,), where), name, found, where)
    return records


STRATA = {1: "stuff", 2: "part", 3: "multi", 4: "single"}
"""Of GSEval, by ``class_id``."""


def _read_dlc(file: Path) -> Records:
    """Return the annotations of a COCO file by their ids."""
    records: Records = {}
    for image, regions in read_coco(file, crowds=True).regions.items():
        for place, region in enumerate(map(json.loads, regions)):
            _add(records, f"images/{image}", _field(region, "id", (str,), f"{file}: {image}, {place}"), region, image)
    return records


def _read_paradlc(file: Path) -> Records:
    """Return the annotations by the judge's keys, ``<image_id>_<index>``."""
    records: Records = {}
    images = _parse(read_file(file), str(file))
    for place, image in enumerate(_field({"images": images}, "images", (list,), str(file))):
        where = f"{file}, image {place}"
        name = _field(image, "file_name", (str,), where).replace("\\", "/").rpartition("/")[2]
        size = [_field(image, side, (int,), where) for side in ("height", "width")]
        for region in _field(image, "annotations", (list,), where):
            key = f"{_field(image, 'image_id', (int, str), where)}_{_field(region, 'index', (int, str), where)}"
            found = {"segmentation": region.get("mask_rle"), "size": size}
            _add(records, f"images/{name}", key, found, where)
    return records


def _parse(text: bytes | str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise bad_sample("broken_json", "not JSON", where, error, fix="download this file again") from error


SETS: Mapping[str, EvalSet] = {
    "reasonseg": EvalSet(
        "ReasonSeg",
        "\n  root/val/<name>.jpg   root/val/<name>.json      (or root/ReasonSeg/val, root/reason_seg/ReasonSeg/val)",
        "{split}",
        ("", "ReasonSeg", "reason_seg/ReasonSeg"),
        _read_reasonseg,
        "gIoU and cIoU (2308.00692); pixels of ignored shapes are in no intersection and no union; the first text of "
        "an image, short (a phrase) or long (a sentence); shapes with their outlines, smaller ones over larger ones",
        apply_exif=True,
    ),
    "gseval": EvalSet(
        "GSEval",
        "\n  root/GroundingSuite-Eval.jsonl   root/unlabeled2017/*.jpg      (or below root/GSEval)",
        "GroundingSuite-Eval.jsonl",
        ("", "GSEval"),
        _read_gseval,
        "gIoU over all expressions and by stratum (2503.10596); an answer without a mask counts as IoU 0",
    ),
    "dlc-bench": EvalSet(
        "DLC-Bench",
        "\n  root/annotations.json   root/images/*.jpg      (or below annotations/, DLC-Bench/annotations/)",
        "annotations.json",
        ("", "annotations", "DLC-Bench", "DLC-Bench/annotations"),
        _read_dlc,
        "captions of given regions for a judge (2504.16072)",
        "eval_model_outputs.py --pred FILE of NVlabs/describe-anything (Llama 3.1 8B)",
    ),
    "paradlc-bench": EvalSet(
        "ParaDLC-Bench",
        "\n  root/annotations.json   root/images/*.jpg      (or below annotations/, ParaDLC-Bench/annotations/)",
        "annotations.json",
        ("", "annotations", "ParaDLC-Bench", "ParaDLC-Bench/annotations"),
        _read_paradlc,
        "captions of given regions, each written alone, for a judge (2606.19534)",
        "eval_gpt_with_image.py --pred FILE of MSALab-PKU/PerceptionDLM (GPT-5.2, with the image)",
    ),
}


class EvalSetReader(Reader):
    """One set of :data:`SETS`; an entry is an image with all its regions.

    Args:
        name: of the set. root: folder that holds it. split: of :data:`~dual_loop.data.names.EVAL_SETS`; "": the first.

    Raises:
        ConfigError: the files are not there, or have another structure.
    """

    def __init__(self, name: str, root: str | Path, split: str = "") -> None:
        self.name, self._set = name, SETS[name]
        self.title, self.layout = self._set.title, self._set.layout
        self.protocol, self.judge = self._set.protocol, self._set.judge
        super().__init__(root)
        index = self._set.index.format(split=split or next(iter(EVAL_SETS[name]), ""))
        found = [self.root / folder / index for folder in self._set.folders if (self.root / folder / index).exists()]
        try:
            self._images = sorted(self._set.read(found[0]).items()) if found else []
        except SampleError as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            raise ConfigError(explain("a file cannot be read", str(found[0]), error, fix="get it again")) from error
        if not self._images:
            seen = "no image" if found else "nothing there"
            raise layout_error(f"{self.title} is not there", self.root / index, seen, self.layout)
        self.root = found[0].parent

    def __len__(self) -> int:
        return len(self._images)

    def entry_id(self, index: int) -> str:
        """Return the image's name without its suffix and without a leading ``images/``."""
        return self._images[index][0].rpartition(".")[0].removeprefix("images/")

    def image_path(self, index: int) -> Path:
        """Return the image file."""
        return safe_join(self.root, self._images[index][0])

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Return the same as :meth:`load_all`: the set is for evaluation."""
        return self.load_all(index)

    def load_all(self, index: int) -> RegionSample:
        """Read an image with all its regions; those that cannot be used are passed over.

        Raises:
            SampleError: see the module; the reason of the first region where none can be used.
        """
        path, (_, records) = self.image_path(index), self._images[index]
        picture, names = read_picture(path, self._set.apply_exif), list(records)
        found: dict[int, Found] = {}

        def decode(number: int) -> np.ndarray:
            record, where = records[names[number]], f"{self.root}: {self.entry_id(index)}#{names[number]}"
            one = _labelme(record["file"], picture.size) if "file" in record else _coco(record, picture.size, where)
            check_mask(one.mask, where)
            check_captions(one.texts, where)
            if not all(one.texts):
                raise bad_sample("broken_json", "an expression is empty", where, one.texts, "words")
            found[number] = one
            return one.mask

        taken = take_regions(range(len(names)), decode, names.__getitem__)
        if not taken.numbers:
            raise SampleError(taken.passed_over[0].reason, taken.passed_over[0].message)
        own = [found[number] for number in taken.numbers]
        ids, texts = [names[number] for number in taken.numbers], [one.texts for one in own]
        sample = self._sample(index, picture, taken, ids, texts)
        return replace(sample, groups=tuple(one.group for one in own), ignored=own[0].ignored)


class Found(NamedTuple):
    """A region: its mask (H, W) bool, its expressions, its group, and what no measure counts, (H, W) bool."""

    mask: np.ndarray
    texts: tuple[str, ...]
    group: str = ""
    ignored: np.ndarray | None = None


def _coco(record: Record, size: tuple[int, int], where: str) -> Found:
    """Return a region with a COCO segmentation at the picture's ``size`` (H, W)."""
    segmentation = _field(record, "segmentation", (dict, list), where)
    if isinstance(segmentation, dict):
        mask = decode_rle(segmentation, where)
    else:
        height, width = record.get("size", size)
        mask = decode_segmentation(mend_polygons(segmentation, where), height, width, where)
    return Found(fit_mask(mask, size, where), record.get("texts", ()), record.get("group", ""))


def _labelme(file: Path, size: tuple[int, int]) -> Found:
    """Return the target of a picture of ``size`` (H, W), with the first text; the group is ``short`` or ``long``.

    As LISA draws them: corners are cut to whole pixels, outlines belong to the shapes, larger shapes lie below. Pillow
    and OpenCV differ in single pixels of a slanting outline.
    """
    where, tree = str(file), _read_labelme(file)
    texts = _field(tree, "text", (list, str), where)
    text = _field({"text": texts if isinstance(texts, str) else (texts or [None])[0]}, "text", (str,), where)
    group = "long" if _field(tree, "is_sentence", (bool, int), where) else "short"
    shapes, num_points = _field(tree, "shapes", (list,), where), 0
    drawn: list[tuple[int, list[tuple[float, ...]], bool]] = []
    for number, shape in enumerate(shapes):
        place = f"{where}: shape {number}"
        label = _field(shape, "label", (str,), place).lower()
        corners = _corners(_field(shape, "points", (list,), place), size, place)
        num_points += len(corners)
        if number >= MAX_SHAPES or num_points > MAX_POINTS:
            seen, expected = f"{len(shapes)} shapes", f"at most {MAX_SHAPES:,} with {MAX_POINTS:,} points"
            raise bad_sample("too_large", "a file has too many shapes", where, seen, expected)
        if label != "flag":
            layer = Image.new("1", size[::-1])
            _draw(layer, corners, 1)
            drawn.append((int(np.asarray(layer).sum()), corners, "ignore" in label))
    canvas = Image.new("L", size[::-1])
    for _, corners, is_ignored in sorted(drawn, key=lambda one: -one[0]):
        _draw(canvas, corners, 2 if is_ignored else 1)
    values = np.asarray(canvas)
    ignored = values == 2
    return Found(values == 1, (text.strip(),), group, ignored if ignored.any() else None)


def _draw(image: Image.Image, corners: list[tuple[float, ...]], value: int) -> None:
    draw = ImageDraw.Draw(image)
    draw.polygon(corners, fill=value)
    draw.line(corners, fill=value)


def _corners(points: list[Any], size: tuple[int, int], where: str) -> list[tuple[float, ...]]:
    """Return the corners (x, y) of a shape in whole pixels, the first one again as the last."""
    expected, reach = "[[x, y], ...] in pixels, near the image", 2 * max(size)
    try:
        corners = np.asarray(points, np.float64)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise bad_sample("bad_polygon", "'points' are not numbers", where, shorten(points), expected) from error
    if corners.ndim != 2 or corners.shape[1] != 2 or not (np.abs(corners) <= reach).all():
        raise bad_sample("bad_polygon", "'points' are no corners", where, shorten(points), expected)
    return [tuple(corner) for corner in np.trunc([*corners, corners[0]]).tolist()]


def _read_labelme(file: Path) -> Any:
    """Return what a JSON file holds; some of ReasonSeg's are in Windows' code page."""
    try:
        raw = read_file(file, SAMPLE_BYTES)
    except OSError as error:
        raise bad_sample(
            "missing_file", "an annotation cannot be read", str(file), error, "a JSON a picture"
        ) from error
    try:
        return _parse(raw.decode(), str(file))
    except UnicodeDecodeError:
        return _parse(raw.decode("cp1252", "replace"), str(file))

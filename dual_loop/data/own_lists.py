"""Files that list regions of images: COCO JSON, lines of JSON, labelme, YOLO segmentation. Each becomes a listing."""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from dual_loop.data.limits import SAMPLE_BYTES, open_file, parse_json, read_file, read_lines
from dual_loop.errors import ConfigError, SampleError, bad_sample, explain, listed, shorten

LINE_EXPECTED = '{"image": "images/a.jpg", "segmentation": {...} or [[...]], "caption": "..."}'
_COCO_EXPECTED = "images with id and file_name; annotations with id, image_id, segmentation"


class Region(TypedDict, total=False):
    """One object of an image: a mask file (and its label in it), or a COCO segmentation, of an image of ``size``.

    ``parts``: its polygons in parts of the image's width and height (YOLO). ``class_name``: of its category.
    """

    id: str
    image: str
    mask: str
    label: int
    segmentation: object
    parts: list[float]
    size: list[int]
    category_id: int | str
    class_name: str
    caption: str | list[str] | None
    captions: str | list[str] | None


@dataclass
class Listing:
    """What files list.

    Attributes:
        regions: of each image, by the name it is looked up by: a region as JSON, or the place of its line.
        left_out: what is no region, in words, and how many; firsts: the first of them, where it is shown.
        num_captioned, num_named: regions with a caption of their own, with the name of a class.
    """

    regions: dict[str, list[str]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    firsts: dict[str, str] = field(default_factory=dict)
    num_captioned: int = 0
    num_named: int = 0

    def add(self, image: str, region: Mapping[str, Any], text: str | None = None) -> None:
        """Add a region of ``image``; ``text`` is what the index holds in place of the whole region."""
        given = region.get("captions") or region.get("caption")
        self.num_captioned += bool(given)
        self.num_named += "class_name" in region
        self.regions.setdefault(image, []).append(json.dumps(region) if text is None else text)

    def leave_out(self, what: str, *examples: str) -> None:
        """Count ``examples`` of what is no region, the first of which is shown."""
        if examples:
            self.left_out[what] += len(examples)
            self.firsts.setdefault(what, examples[0])

    def counts(self) -> dict[str, int]:
        """Return what is left out, in words, and how many."""
        firsts = {what: f"{what} (the first: {first})" for what, first in self.firsts.items()}
        return {firsts.get(what, what): count for what, count in self.left_out.items() if count}


def read_coco(path: Path, crowds: bool) -> Listing:
    """Read a COCO file; without any annotation that belongs to an image it is refused (ConfigError)."""
    try:
        tree = parse_json(read_file(path))
        if not isinstance(tree["images"], list) or not isinstance(tree["annotations"], list):
            raise TypeError("images or annotations is no list")
        if any(isinstance(item, dict) and "segments_info" in item for item in tree["annotations"][:1]):
            fix = "convert it with panopticapi's panoptic2detection_coco_format.py"
            raise ConfigError(explain("COCO's panoptic format is not read", str(path), "segments_info", fix=fix))
        categories = tree.get("categories")
        names = {_id(one.get("id")): one.get("name") for one in categories or () if isinstance(one, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(explain("not a COCO file", str(path), error, _COCO_EXPECTED, "mend or replace it")) from error
    listing, images, doubled = Listing(), dict[object, Mapping[str, Any]](), set[object]()
    for image in tree["images"]:
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or _id(image.get("id")) is None:
            listing.left_out["listed images without id or file_name"] += 1
            continue
        known = images.setdefault(_id(image["id"]), image)
        if known["file_name"] != image["file_name"]:
            doubled.add(_id(image["id"]))
    without = set(images) - doubled
    for item in tree["annotations"]:
        image_id = _id(item.get("image_id")) if isinstance(item, dict) else None
        if image_id not in images:
            listing.left_out["annotations of images that are not listed"] += 1
        elif image_id in doubled:
            listing.left_out["annotations of an image id that two images have"] += 1
        elif item.get("iscrowd") in (1, True, "1") and not crowds:
            listing.left_out["crowds (iscrowd; data.masks_crowds takes them)"] += 1
        else:
            without.discard(image_id)
            image, category = images[image_id], _id(item.get("category_id"))
            region = {key: item[key] for key in ("category_id", "caption", "captions") if item.get(key) is not None}
            region |= {"segmentation": item.get("segmentation")}
            if _id(item.get("id")) is not None:
                region["id"] = str(_id(item["id"]))
            if isinstance(names.get(category), str):
                region["class_name"] = names[category]
            sides = [side for side in (image.get("height"), image.get("width")) if isinstance(side, (int, float))]
            if len(sides) == 2 and all(0 < side < 1 << 31 for side in sides):
                region["size"] = [int(side) for side in sides]
            listing.add(image["file_name"].replace("\\", "/"), region)
    listing.left_out["images without an annotation"] += len(without)
    listing.left_out["images with an id that two have"] += len(doubled)
    if not listing.regions:
        seen = listed([f"{count} {what}" for what, count in listing.counts().items()]) or "no annotation"
        raise ConfigError(explain("a COCO file has no region", str(path), seen, _COCO_EXPECTED, "mend or replace it"))
    return listing


def _id(value: object) -> int | str | None:
    """Return an id as tools mean it: 7, 7.0 (pandas) and "7" are the same."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        return int(value)
    return value if isinstance(value, (int, str)) else None


def read_jsonl(path: Path) -> Listing:
    """Read lines of JSON; a region is kept as the place of its line (offset, length). All broken is a ConfigError."""
    listing, offset = Listing(), 0
    try:
        with open_file(path) as stream:
            for number, raw in enumerate(read_lines(stream), start=1):
                try:
                    if raw.strip(b"\xef\xbb\xbf \t\r\n"):
                        record = parse_line(raw, f"{path}, line {number}")
                        listing.add(record["image"].replace("\\", "/"), record, f"[{offset}, {len(raw)}]")
                except SampleError as error:
                    listing.leave_out("broken lines", str(error))
                offset += len(raw)
    except OSError as error:
        raise ConfigError(explain("lines cannot be read", str(path), error, LINE_EXPECTED)) from error
    if listing.firsts and not listing.regions:
        raise ConfigError(listing.firsts["broken lines"])
    return listing


def parse_line(raw: bytes, where: str) -> Region:
    """Return the region of a line; one that is none is ``broken_json``."""
    try:
        record = parse_json(raw)
    except ValueError as error:
        raise bad_sample("broken_json", "a line is not JSON", where, str(error), LINE_EXPECTED) from error
    if not isinstance(record, dict) or not isinstance(record.get("image"), str) or "segmentation" not in record:
        seen = raw[:80].decode("utf-8", "replace")
        raise bad_sample("broken_json", "a line lacks its keys", where, seen, LINE_EXPECTED)
    known = ("id", "image", "segmentation", "category_id", "caption", "captions")
    region = {key: record[key] for key in known if record.get(key) is not None}
    size = record.get("size")
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        region["size"] = size
    return cast(Region, region)


def read_labelme(root: Path, files: Iterable[str], images: Mapping[str, str]) -> Listing:
    """Read labelme's JSON files, one a picture. ``images``: the image files below ``root`` by their stems."""
    listing = Listing()
    for name in files:
        try:
            tree = parse_json(read_file(root / name, SAMPLE_BYTES))
            shapes, given = tree["shapes"], str(tree.get("imagePath") or "").replace("\\", "/")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            listing.leave_out("JSON files that are not labelme's", f"{name}: {type(error).__name__}: {error}")
            continue
        stem = name.rsplit(".", 1)[0]
        below = posixpath.normpath(posixpath.join(posixpath.dirname(name), given)).rsplit(".", 1)[0]
        stems = [one for one in (below, stem, f"images/{posixpath.basename(stem)}") if one in images]
        if not stems:
            listing.left_out["labelme files whose image is not there"] += 1
            continue
        for number, shape in enumerate(shapes if isinstance(shapes, list) else ()):
            kind = shape.get("shape_type", "polygon") if isinstance(shape, dict) else shape
            if kind != "polygon":
                listing.left_out[f"shapes that are no polygon ({shorten(kind)})"] += 1
                continue
            label, region = shape.get("label"), {"id": str(number), "segmentation": [shape.get("points")]}
            named = {"category_id": label, "class_name": label} if isinstance(label, str) else {}
            listing.add(images[stems[0]], region | named)
    return listing


def read_yolo(root: Path, files: Iterable[str], images: Mapping[str, str]) -> Listing:
    """Read YOLO's segmentation: ``labels/x.txt`` beside ``images/x.jpg``, a class and x, y in parts a line."""
    listing, names = Listing(), _yolo_names(root)
    for name in files:
        image = images.get("images/" + name.removeprefix("labels/").rsplit(".", 1)[0])
        if image is None:
            listing.left_out["label files whose image is not there"] += 1
            continue
        try:
            lines = read_file(root / name, SAMPLE_BYTES).decode("utf-8-sig", "replace").splitlines()
        except OSError:
            listing.left_out["label files that cannot be read"] += 1
            continue
        for number, line in enumerate(lines):
            try:
                label, *numbers = (float(word) for word in line.split())
                number_of_class = int(label)
            except (ValueError, OverflowError):
                listing.left_out["label lines that are not numbers"] += bool(line.strip())
                continue
            if len(numbers) < 6 or len(numbers) % 2:
                listing.left_out["label lines without a polygon, such as boxes"] += 1
                continue
            named = {"class_name": names[number_of_class]} if number_of_class in names else {}
            listing.add(image, {"id": str(number), "parts": numbers, "category_id": number_of_class, **named})
    return listing


def _yolo_names(root: Path) -> dict[int, str]:
    import yaml  # type: ignore[import-untyped]  # mmengine needs it

    for name in ("data.yaml", "data.yml", "dataset.yaml", "classes.txt"):
        if (root / name).is_file():
            text = read_file(root / name, SAMPLE_BYTES).decode("utf-8-sig", "replace")
            try:
                found = text.split("\n") if name.endswith(".txt") else yaml.safe_load(text)["names"]
                pairs = found.items() if isinstance(found, dict) else enumerate(found)
                return {int(number): str(one).strip() for number, one in pairs if str(one).strip()}
            except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
                raise ConfigError(explain("names of classes cannot be read", str(root / name), error)) from error
    return {}

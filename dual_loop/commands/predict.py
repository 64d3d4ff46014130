"""``dual-loop caption``, ``segment`` and ``loop``: one image or a folder of them, JSON out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from dual_loop.commands.common import Command, add_model_arguments
from dual_loop.config import overrides_from
from dual_loop.errors import ConfigError, SampleError, explain
from dual_loop.iteration import in_chunks

if TYPE_CHECKING:
    import numpy as np

    from dual_loop.serve.predictor import Predictor

MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff")
"""Formats that lose nothing."""


def load_predictor(args: argparse.Namespace) -> Predictor:
    """Load what :func:`add_model_arguments` asked for, and say on stderr where that is the tiny model.

    Raises:
        DualLoopError: there is no such model.
    """
    from dual_loop.serve.loading import TINY_NOTE
    from dual_loop.serve.predictor import Predictor

    predictor = Predictor.load(
        args.checkpoint, weights=args.weights, device=args.device, config=args.config, overrides=overrides_from(args)
    )
    if predictor.loaded.is_tiny:
        print(f"note: {TINY_NOTE}", file=sys.stderr, flush=True)
    return predictor


def _add_arguments(command: str, parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("image", type=Path, help="an image, or a folder of images")
    if command == "segment":
        parser.add_argument(
            "--text", nargs="+", type=_text, required=True, help="what to segment; several texts, several masks"
        )
        text = "mask file (PNG), or a folder for several"
        parser.add_argument("--out", type=Path, required=True, metavar="PATH", help=text)
        parser.add_argument("--generated", action="store_true", help="let the model write the answer that holds [SEG]")
    else:
        help_mask = "mask files, or for a folder of images a folder of masks: NAME.png or NAME/*.png"
        parser.add_argument("--mask", nargs="+", type=Path, metavar="PATH", help=help_mask)
        parser.add_argument("--box", action="append", metavar="X1,Y1,X2,Y2", help="a box in pixels; may be repeated")
        parser.add_argument("--point", action="append", metavar="X,Y", help="a point: SAM 2 draws the object there")
        parser.add_argument("--refine", action="store_true", help="let SAM 2 draw the object in a box")
    if command == "loop":
        parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the masks that came back")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there instead of printing it")
    add_model_arguments(parser)


def _text(text: str) -> str:
    if not text.strip():
        raise ConfigError(
            explain("an empty text names nothing", "--text", text, fix='say what to segment: --text "the cat"')
        )
    return text


def _caption(args: argparse.Namespace) -> int:
    predictor, results = load_predictor(args), _Results(args.json)
    for chunk in in_chunks(_regions(args, predictor, results), predictor.images_at_once):
        captions = predictor.caption_many([(one.image, one.masks) for one in chunk])
        for one, texts in zip(chunk, captions, strict=True):
            regions = [{"region": n, "caption": text} for n, text in zip(one.names, texts, strict=True)]
            results.images.append({"image": str(one.path), "regions": regions})
    return results.close()


def _loop(args: argparse.Namespace) -> int:
    names = _names_of_results(_image_paths(args.image))
    predictor, results = load_predictor(args), _Results(args.json)
    for chunk in in_chunks(_regions(args, predictor, results), predictor.images_at_once):
        for one, result in zip(chunk, predictor.loop_many([(one.image, one.masks) for one in chunk]), strict=True):
            regions = []
            for number, name in enumerate(one.names):
                region: dict[str, object] = {
                    "region": name,
                    "caption": result.captions[number],
                    "rejected": result.rejected[number],
                    "iou": round(float(result.ious[number]), 4),
                    "iou_with_each": [round(float(value), 4) for value in result.matrix[number]],
                }
                if args.out is not None:
                    region["mask"] = _save(result.masks[number], args.out / names[one.path] / f"{name}.png")
                regions.append(region)
            results.images.append({"image": str(one.path), "regions": regions})
    return results.close()


def _segment(args: argparse.Namespace) -> int:
    paths = _image_paths(args.image)
    is_file = args.out.suffix != ""
    if is_file and (args.image.is_dir() or len(args.text) > 1):
        fix = "give a folder: there is a mask for every image and text"
        raise ConfigError(explain("several masks do not fit into one file", "--out", str(args.out), "a folder", fix))
    if is_file and args.out.suffix.lower() not in MASK_ENDINGS:
        raise ConfigError(explain("a mask has no such format", "--out", str(args.out), ", ".join(MASK_ENDINGS)))
    names = _names_of_results(paths)
    outs = {path: [args.out / f"{names[path]}_{k}.png" for k in range(len(args.text))] for path in paths}
    if is_file:
        outs = {paths[0]: [args.out]}
    _keep_images([file for own in outs.values() for file in own], paths)
    predictor, results = load_predictor(args), _Results(args.json)
    for chunk in in_chunks(_open_images(paths, results), predictor.images_at_once):
        found = predictor.segment_many([(image, args.text) for _, image in chunk], generated=args.generated)
        for (path, _), masks in zip(chunk, found, strict=True):
            texts = [
                {
                    "text": one.text,
                    "mask": _save(one.mask, outs[path][number]),
                    "pixels": int(one.mask.sum()),
                    "num_masks": one.num_masks,
                    "confidence": round(one.confidence, 4),
                }
                for number, one in enumerate(masks)
            ]
            results.images.append({"image": str(path), "texts": texts})
    return results.close()


caption = Command(
    "caption",
    "Describe the region of an image that a mask, a box or a point marks.",
    partial(_add_arguments, "caption"),
    _caption,
    example="dual-loop caption photo.jpg --mask cat.png --checkpoint outputs/run",
)
segment = Command(
    "segment",
    "Segment what a text describes.",
    partial(_add_arguments, "segment"),
    _segment,
    example='dual-loop segment photo.jpg --text "the grey cat" --out cat.png',
)
loop = Command(
    "loop",
    "Describe every masked region, segment the descriptions again, and compare.",
    partial(_add_arguments, "loop"),
    _loop,
    example="dual-loop loop photo.jpg --mask cat.png dog.png --out compared/",
)


@dataclass
class _Results:
    """What was found and what was skipped, printed or written as JSON at the end."""

    path: Path | None
    images: list[dict[str, object]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def skip(self, path: Path, error: SampleError) -> None:
        self.skipped.append({"image": str(path), "reason": error.reason, "message": str(error)})

    def close(self) -> int:
        """Write the result; return 0, or 2 where no image could be used."""
        text = json.dumps({"images": self.images, "skipped": self.skipped}, indent=2, ensure_ascii=False)
        if self.path is None:
            print(text)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(text + "\n", encoding="utf-8")
            print(f"{len(self.images)} images, {len(self.skipped)} skipped: {self.path}")
        for entry in self.skipped:
            print(f"{'skipped' if self.images else 'error'}: {entry['message']}", file=sys.stderr)
        return 0 if self.images else 2


@dataclass
class _Marked:
    """An image (H, W, 3) with its marked regions: N names, (N, H, W) bool."""

    path: Path
    image: np.ndarray
    names: list[str]
    masks: np.ndarray


def _regions(args: argparse.Namespace, predictor: Predictor, results: _Results) -> Iterator[_Marked]:
    """Yield every image that is usable, with the regions that the arguments mark on it."""
    import numpy as np

    from dual_loop.data.masks_dir import read_mask_file

    is_folder, boxes, points = args.image.is_dir(), args.box or [], args.point or []
    if not (args.mask or boxes or points):
        raise ConfigError(explain("no region is marked", fix="give --mask, --box or --point"))
    if is_folder and (not args.mask or len(args.mask) != 1 or not args.mask[0].is_dir()):
        expected = "one folder with a PNG, or a folder of PNGs, for each image"
        raise ConfigError(explain("a folder of images needs a folder of masks", "--mask", args.mask, expected))
    for path, image in _open_images(_image_paths(args.image), results):
        files = list(args.mask or [])
        if is_folder:
            own = files[0] / path.stem
            files = sorted(own.glob("*.png")) if own.is_dir() else [own.with_name(f"{own.name}.png")]
        try:
            regions = [region for file in files for region in read_mask_file(file)]
            for text in boxes:
                mask = predictor.region_from_box(image, _numbers(text, 4, "--box"), refine=args.refine)
                regions.append((f"box {text}", mask))
            for text in points:
                regions.append((f"point {text}", predictor.region_from_point(image, _numbers(text, 2, "--point"))))
            for name, mask in regions:
                if mask.shape != image.shape[:2]:
                    fix = "draw the mask on this very image"
                    message = explain("a mask and its image differ in size", name, mask.shape, image.shape[:2], fix)
                    raise SampleError("size_mismatch", message)
        except SampleError as error:
            results.skip(path, error)
        else:
            names = _distinct([name for name, _ in regions])
            yield _Marked(path, image, names, np.stack([mask for _, mask in regions]))


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names with a number behind those that were there before, also where case does not count."""
    taken: dict[str, str] = {}
    for name in names:
        candidates = chain([name], (f"{name} ({number})" for number in count(2)))
        free = next(candidate for candidate in candidates if candidate.casefold() not in taken)
        taken[free.casefold()] = free
    return list(taken.values())


def _names_of_results(paths: Sequence[Path]) -> dict[Path, str]:
    """Return what the results of each image are named after: its stem, or its whole name where images share a stem."""
    are_alike = len({path.stem.casefold() for path in paths}) < len(paths)
    return dict(zip(paths, _distinct([path.name if are_alike else path.stem for path in paths]), strict=True))


def _keep_images(outs: Sequence[Path], paths: Sequence[Path]) -> None:
    """Raise ``ConfigError`` where a result would be written over an image that is read."""
    images = {path.resolve() for path in paths}
    clash = next((file for file in outs if file.resolve() in images), None)
    if clash is not None:
        raise ConfigError(explain("a result would replace an image", "--out", str(clash), "another folder or name"))


def _image_paths(path: Path) -> list[Path]:
    from dual_loop.data.masks_dir import IMAGE_SUFFIXES

    if not path.exists():
        raise ConfigError(explain("no such image", str(path), "nothing there", fix="check the path"))
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise ConfigError(explain("the folder holds no image", str(path), expected=", ".join(IMAGE_SUFFIXES)))
    return found


def _open_images(paths: Sequence[Path], results: _Results) -> Iterator[tuple[Path, np.ndarray]]:
    from dual_loop.data.images import read_picture

    for path in paths:
        try:
            # As a viewer shows it, and as a mask drawn over it was drawn.
            yield path, read_picture(path, apply_exif=True).pixels
        except SampleError as error:
            results.skip(path, error)


def _save(mask: np.ndarray, path: Path) -> str:
    import numpy as np
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return str(path)


def _numbers(text: str, count: int, flag: str) -> list[float]:
    values: list[float] = []
    with suppress(ValueError):
        values = [float(part) for part in text.split(",")]
    if len(values) != count:
        raise ConfigError(explain("not the right numbers", flag, text, f"{count} numbers joined by commas, in pixels"))
    return values

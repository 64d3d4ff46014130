"""``dual-loop caption``, ``segment`` and ``loop``: one image or a folder of them, JSON out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dual_loop.commands.arguments import add_model_arguments
from dual_loop.errors import ConfigError, DualLoopError, SampleError, explain
from dual_loop.iteration import in_chunks

if TYPE_CHECKING:
    import numpy as np

    from dual_loop.serve.predictor import Predictor

DESCRIPTIONS = {
    "caption": "Describe the region of an image that a mask, a box or a point marks.",
    "segment": "Segment what a text describes.",
    "loop": "Describe every masked region, segment the descriptions again, and compare.",
}
EXAMPLES = {
    "caption": "dual-loop caption photo.jpg --mask cat.png --checkpoint outputs/run",
    "segment": 'dual-loop segment photo.jpg --text "the grey cat" --out cat.png',
    "loop": "dual-loop loop photo.jpg --mask cat.png dog.png --out compared/",
}


def main(command: str, argv: Sequence[str] | None = None) -> int:
    """Run ``command`` (caption, segment or loop); return 0, or 2 for a problem that the user can mend."""
    args = _parser(command).parse_args(argv)
    runner: Callable[[argparse.Namespace], int] = {"caption": _caption, "segment": _segment, "loop": _loop}[command]
    try:
        return runner(args)
    except DualLoopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def load_predictor(args: argparse.Namespace) -> Predictor:
    """Load what :func:`add_model_arguments` asked for.

    Raises:
        DualLoopError: there is no such model.
    """
    from dual_loop.serve.predictor import Predictor

    overrides = {"train.model_path": args.model_path} if args.model_path else {}
    return Predictor.load(
        args.checkpoint,
        weights=args.weights,
        device=args.device,
        config=args.config,
        overrides=overrides,
        max_new_tokens=args.max_new_tokens,
    )


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog=f"dual-loop {command}",
        description=DESCRIPTIONS[command],
        epilog=f"example: {EXAMPLES[command]}",
    )
    parser.add_argument("image", type=Path, help="an image, or a folder of images")
    if command == "segment":
        parser.add_argument("--text", nargs="+", required=True, help="what to segment; several texts, several masks")
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
    return parser


def _caption(args: argparse.Namespace) -> int:
    from dual_loop.serve.predictor import IMAGES_AT_ONCE

    predictor = load_predictor(args)
    report = _Report(args.json)
    for chunk in in_chunks(_regions(args, predictor, report), IMAGES_AT_ONCE):
        captions = predictor.caption_many([(image, masks) for _, image, _, masks in chunk])
        for (path, _, names, _), texts in zip(chunk, captions, strict=True):
            pairs = zip(names, texts, strict=True)
            report.add({"image": str(path), "regions": [{"region": name, "caption": text} for name, text in pairs]})
    return report.close()


def _loop(args: argparse.Namespace) -> int:
    from dual_loop.serve.predictor import IMAGES_AT_ONCE

    predictor = load_predictor(args)
    report = _Report(args.json)
    for chunk in in_chunks(_regions(args, predictor, report), IMAGES_AT_ONCE):
        results = predictor.loop_many([(image, masks) for _, image, _, masks in chunk])
        for (path, _, names, _), result in zip(chunk, results, strict=True):
            regions = []
            for number, name in enumerate(names):
                region: dict[str, Any] = {"region": name, "caption": result.captions[number]}
                region["rejected"] = result.rejected[number]
                region["iou"] = round(float(result.ious[number]), 4)
                region["iou_with_each"] = [round(float(value), 4) for value in result.matrix[number]]
                if args.out is not None:
                    region["mask"] = str(_save(result.masks[number], args.out / path.stem / f"{name}.png"))
                regions.append(region)
            report.add({"image": str(path), "regions": regions})
    return report.close()


def _segment(args: argparse.Namespace) -> int:
    from dual_loop.serve.predictor import IMAGES_AT_ONCE

    paths = _image_paths(args.image)
    is_single = not args.image.is_dir() and len(args.text) == 1
    if not is_single and args.out.suffix:
        fix = "give a folder: there is a mask for every image and text"
        raise ConfigError(explain("several masks do not fit into one file", "--out", str(args.out), "a folder", fix))
    predictor = load_predictor(args)
    report = _Report(args.json)
    for chunk in in_chunks(_open_images(paths, report), IMAGES_AT_ONCE):
        found = predictor.segment_many([(image, args.text) for _, image in chunk], generated=args.generated)
        for (path, _), masks in zip(chunk, found, strict=True):
            texts = []
            for number, one in enumerate(masks):
                out = args.out if is_single else args.out / f"{path.stem}_{number}.png"
                entry: dict[str, Any] = {"text": one.text, "mask": str(_save(one.mask, out))}
                entry.update(pixels=int(one.mask.sum()), num_masks=one.num_masks, confidence=round(one.confidence, 4))
                texts.append(entry)
            report.add({"image": str(path), "texts": texts})
    return report.close()


class _Report:
    """Collects results and what was skipped, and prints or writes them as JSON at the end."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.images: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []

    def add(self, image: dict[str, Any]) -> None:
        self.images.append(image)

    def skip(self, path: Path, error: SampleError) -> None:
        self.skipped.append({"image": str(path), "reason": error.reason, "message": str(error)})

    def close(self) -> int:
        """Write the result; return 0, or 2 where no image could be used."""
        result = {"images": self.images, "skipped": self.skipped}
        text = json.dumps(result, indent=2, ensure_ascii=False)
        if self.path is None:
            print(text)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(text + "\n", encoding="utf-8")
            print(f"{len(self.images)} images, {len(self.skipped)} skipped: {self.path}")
        for entry in self.skipped:
            print(f"{'skipped' if self.images else 'error'}: {entry['message']}", file=sys.stderr)
        return 0 if self.images else 2


def _regions(
    args: argparse.Namespace, predictor: Predictor, report: _Report
) -> Iterator[tuple[Path, np.ndarray, list[str], np.ndarray]]:
    """Yield (path, image, region names, masks (N, H, W)) for every image that is usable."""
    import numpy as np

    if not (args.mask or args.box or args.point):
        raise ConfigError(explain("no region is marked", fix="give --mask, --box or --point"))
    if args.image.is_dir() and (not args.mask or len(args.mask) != 1 or not args.mask[0].is_dir()):
        expected = "one folder with a PNG, or a folder of PNGs, for each image"
        raise ConfigError(explain("a folder of images needs a folder of masks", "--mask", args.mask, expected))
    for path, image in _open_images(_image_paths(args.image), report):
        try:
            regions = _marked(args, predictor, path, image)
            masks = np.stack([mask for _, mask in regions])
            yield path, image, [name for name, _ in regions], masks
        except SampleError as error:
            report.skip(path, error)


def _marked(
    args: argparse.Namespace, predictor: Predictor, path: Path, image: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    from dual_loop.data.masks_dir import read_mask_file

    files = list(args.mask or [])
    if args.image.is_dir():
        own = files[0] / path.stem
        files = sorted(own.glob("*.png")) if own.is_dir() else [own.with_name(f"{own.name}.png")]
    regions = [region for file in files for region in read_mask_file(file)]
    for text in args.box or []:
        box = _numbers(text, 4, "--box")
        regions.append((f"box {text}", predictor.region_from_box(image, box, refine=args.refine)))
    for text in args.point or []:
        regions.append((f"point {text}", predictor.region_from_point(image, _numbers(text, 2, "--point"))))
    for name, mask in regions:
        if mask.shape != image.shape[:2]:
            fix = "draw the mask on this very image"
            message = explain("a mask and its image differ in size", name, mask.shape, image.shape[:2], fix)
            raise SampleError("size_mismatch", message)
    return regions


def _numbers(text: str, count: int, flag: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != count:
        raise ConfigError(explain("not the right numbers", flag, text, f"{count} numbers joined by commas, in pixels"))
    return values


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


def _open_images(paths: Sequence[Path], report: _Report) -> Iterator[tuple[Path, np.ndarray]]:
    from dual_loop.data.images import read_image

    for path in paths:
        try:
            # As a viewer shows it, and as a mask drawn over it was drawn.
            yield path, read_image(path, apply_exif=True)
        except SampleError as error:
            report.skip(path, error)


def _save(mask: np.ndarray, path: Path) -> Path:
    import numpy as np
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return path

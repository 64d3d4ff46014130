"""Count which changed copies of held-out photographs are found by sight, and which strangers are taken for one.

    python scripts/bench_leakage.py --images DIR

Of every change, copies of all photographs (``*.jpg`` of the folder) are looked at twice: the photographs of even number
are held out, then those of odd number. So each is once to be found and once among strangers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dual_loop.data.leakage import HeldOutImage, Leak, leaked_by_sight
from dual_loop.data.reader import Reader

Change = Callable[[Image.Image], Image.Image]


class Files(Reader):
    """Image files alone."""

    name = "copies"

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._rows = np.arange(len(paths))

    def entry_id(self, index: int) -> str:
        return self.paths[index].stem

    def image_path(self, index: int) -> Path:
        return self.paths[index]


def cut(left: float, above: float, right: float, below: float) -> Change:
    """Return the change that cuts parts of the sides off."""

    def change(image: Image.Image) -> Image.Image:
        width, height = image.size
        box = (left * width, above * height, (1 - right) * width, (1 - below) * height)
        return image.crop(tuple(round(side) for side in box))  # type: ignore[arg-type]

    return change


def uneven_cut(most: float) -> Change:
    generator = np.random.default_rng(0)
    return lambda image: cut(*generator.uniform(0, most, 4).tolist())(image)


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


CHANGES: dict[str, tuple[Change, int]] = {
    "none": (lambda image: image, 90),
    "JPEG 30": (lambda image: image, 30),
    "half size": (half, 90),
    **{f"{part} % off every side": (cut(*[part / 100] * 4), 90) for part in (2, 5, 8, 10)},
    "10 % off the left side": (cut(0.1, 0, 0, 0), 90),
    "0 to 5 % off each side": (uneven_cut(0.05), 90),
    "0 to 10 % off each side": (uneven_cut(0.1), 90),
    "mirrored": (lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 90),
    "turned by 90 degrees": (lambda image: image.transpose(Image.Transpose.ROTATE_90), 90),
    "turned by 180 degrees": (lambda image: image.transpose(Image.Transpose.ROTATE_180), 90),
    "turned by 270 degrees": (lambda image: image.transpose(Image.Transpose.ROTATE_270), 90),
    "8 % off, mirrored, half size, JPEG 30": (
        lambda image: half(cut(*[0.08] * 4)(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        30,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs, all different")
    args = parser.parse_args()
    photographs = sorted(args.images.glob("*.jpg"))
    print("| change | found | strangers taken for one | ms an image |\n| --- | ---: | ---: | ---: |")
    for name, (change, quality) in CHANGES.items():
        with tempfile.TemporaryDirectory() as folder:
            copies = [Path(folder) / f"{number}.jpg" for number in range(len(photographs))]
            for path, copy in zip(photographs, copies, strict=True):
                change(Image.open(path).convert("RGB")).save(copy, quality=quality)
            started, leaks = time.perf_counter(), list[Leak]()
            for half_of in (0, 1):
                held_out = [
                    HeldOutImage(number, "val", path)
                    for number, path in enumerate(photographs)
                    if number % 2 == half_of
                ]
                leaks += leaked_by_sight(Files(copies), held_out)[0]
            milliseconds = 500 * (time.perf_counter() - started) / len(copies)
        right = sum(leak.held_out.coco_id == leak.entry for leak in leaks)
        found = f"{right} of {len(copies)}"
        print(f"| {name} | {found} | {len(leaks) - right} of {len(copies)} | {milliseconds:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

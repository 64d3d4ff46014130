"""SA-1B from archives against unpacked files, and the reader with its preparation against a plain PIL pipeline.

    python scripts/bench_loader.py --gib 5 --folder outputs/bench_loader --json loader.json
    python scripts/bench_loader.py --gib 0.3 --parts gzip scale

A generated set in SA-1B's form (JPEG of 1500 x 2250 pixels, about a hundred run-length masks an image) is written as
files and as tars. Variants take turns over the same random entries, and what is printed is the median of the ratios
of a turn. Parts:

``reads``: bytes of image and JSON, warm (all in the page cache) and cold (taken out of it before every turn by
``posix_fadvise``; how cold the disk under it then is, nobody can say), and whole ``load`` calls, warm.
``loads``: images a second of the reader with its preparation against the plain pipeline: it opens an image, decodes it
in full, decodes all its masks with pycocotools, chooses four, and resizes image and masks with PIL.
``decoder``: the same reader and preparation with simplejpeg against Pillow, at full scale.
``scale``: ``data.decode_scale needed`` against ``full``, with the mean difference of the prepared pixels.
``gzip``: distances between the points of a gzip-compressed archive: time of a read, bytes of the points (which are
held in memory while it is open).
"""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

SIZE = (1500, 2250)
MASKS = 100
REGIONS = 4
PER_TAR = 512
SCENES, VARIANTS = 12, 16
PARTS = ("reads", "loads", "decoder", "scale", "gzip")
SPACINGS = (2**23, 2**22, 2**21, 2**20, 2**19)


def write_set(folder: Path, gib: float, size: tuple[int, int] = SIZE) -> int:
    """Write files and tars below ``folder``; return the number of images. Few pictures, many names: bytes count."""
    pictures, record = make_pictures(size), make_record(size)
    count = max(16, int(gib * 2**30 / (np.mean([len(picture) for picture in pictures]) + len(record))))
    for name in ("files", "tars"):
        (folder / name).mkdir(parents=True)
    for start in range(0, count, PER_TAR):
        with tarfile.open(folder / "tars" / f"sa_{start // PER_TAR:06}.tar", "w") as tar:
            for number in range(start, min(count, start + PER_TAR)):
                for suffix, data in (("jpg", pictures[number % len(pictures)]), ("json", record)):
                    (folder / "files" / f"sa_{number:06}.{suffix}").write_bytes(data)
                    member = tarfile.TarInfo(f"./sa_{number:06}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    os.sync()
    return count


def make_pictures(size: tuple[int, int]) -> list[bytes]:
    """Return JPEG files: smooth scenes with grain, shifted and compressed in several ways (200 to 900 KB each)."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(SCENES):
        coarse = rng.integers(0, 256, (size[0] // 15, size[1] // 15, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
        grain = rng.integers(-9, 10, (*size, 3), dtype=np.int16)
        scene = np.clip(np.asarray(smooth).astype(np.int16) + grain, 0, 255).astype(np.uint8)
        for variant in range(VARIANTS):
            file = io.BytesIO()
            shifted = np.roll(scene, 97 * variant, axis=1)
            Image.fromarray(shifted).save(file, "jpeg", quality=72 + variant)
            pictures.append(file.getvalue())
    return pictures


def make_record(size: tuple[int, int]) -> bytes:
    """Return an SA-1B JSON file of :data:`MASKS` ellipses."""
    from pycocotools import mask as coco

    rng = np.random.default_rng(1)
    height, width = size
    rows, columns = np.ogrid[:height, :width]
    codes = []
    for number in range(MASKS):
        y, x, tall, wide = rng.uniform((0, 0, 40, 40), (height, width, 300, 300))
        mask = ((rows - y) / tall) ** 2 + ((columns - x) / wide) ** 2 <= 1
        code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": [height, width], "counts": code["counts"].decode()}
        codes.append({"id": number, "segmentation": segmentation, "area": int(mask.sum()), "predicted_iou": 0.95})
    return json.dumps({"image": {"height": height, "width": width}, "annotations": codes}).encode()


def forget(folder: Path) -> None:
    """Take the files below ``folder`` out of the page cache (they are on the disk since :func:`write_set`)."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def raw_reads(source: Any, order: Sequence[int]) -> float:
    """Read image and JSON of the entries ``order``; return entries a second."""
    start = time.perf_counter()
    for index in order:
        row = int(source._kept[index])
        for names, places in ((source._images, source._image_place), (source._records, source._record_place)):
            found = source._read(names[row], places[row])
            found.read_bytes() if isinstance(found, Path) else found.getvalue()
    return len(order) / (time.perf_counter() - start)


def whole_loads(source: Any, order: Sequence[int]) -> float:
    """Load entries; return entries a second."""
    start = time.perf_counter()
    for index in order:
        source.load(index, np.random.default_rng(index))
    return len(order) / (time.perf_counter() - start)


def prepare_image(source: Any, geometry: Any, index: int, is_reduced: bool) -> Any:
    from dual_loop.data.prepare import prepare_sample

    needed = geometry.needed_size if is_reduced else None
    sample = source.load_reduced(index, np.random.default_rng(index), needed)
    return prepare_sample(sample, geometry, np.random.default_rng(0), 0, index)


def our_images(source: Any, geometry: Any, order: Sequence[int], is_reduced: bool = False) -> float:
    """Load and prepare one image at a time; return images a second."""
    start = time.perf_counter()
    for index in order:
        prepare_image(source, geometry, index, is_reduced)
    return len(order) / (time.perf_counter() - start)


def plain_images(folder: Path, geometry: Any, order: Sequence[int]) -> float:
    """The plain pipeline; return images a second."""
    start = time.perf_counter()
    for index in order:
        plain_image(folder, geometry, index)
    return len(order) / (time.perf_counter() - start)


def plain_image(
    folder: Path, geometry: Any, index: int, grounding_filter: Image.Resampling = Image.Resampling.BILINEAR
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return what the model takes: the vision image and the grounding image (uint8), and four masks."""
    from pycocotools import mask as coco

    image = Image.open(folder / f"sa_{index:06}.jpg").convert("RGB")
    record = json.loads((folder / f"sa_{index:06}.json").read_text())
    masks = [coco.decode(annotation["segmentation"]) for annotation in record["annotations"]]
    chosen = random.Random(index).sample(masks, REGIONS)
    side, large, small = geometry.vision_image_size, geometry.grounding_size, geometry.mask_size
    seen = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    ground = np.asarray(image.resize((large, large), grounding_filter))
    resized = [np.asarray(Image.fromarray(mask).resize((small, small), Image.Resampling.NEAREST)) for mask in chosen]
    return seen, ground, resized


def pixel_difference(source: Any, geometry: Any, folder: Path, grounding_filter: Image.Resampling) -> float:
    """Return the mean difference (0..255) of the grounding image to the plain pipeline's with a filter."""
    ours = prepare_image(source, geometry, 0, False).g_pixel_values[0].permute(1, 2, 0).numpy().astype(np.int16)
    return float(np.abs(ours - plain_image(folder, geometry, 0, grounding_filter)[1].astype(np.int16)).mean())


Runs = dict[str, Callable[[Sequence[int]], float]]


def compare(runs: Runs, count: int, each: int, repeats: int, base: str, unit: str) -> dict[str, float]:
    """Return the median rate of every variant and the median of its ratios to ``base``; variants take turns."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        order = np.random.default_rng(number).choice(count, min(each, count), replace=False).tolist()
        names = list(runs) if number % 2 else list(runs)[::-1]
        for name in names:
            rate = runs[name](order)
            if number:  # the first round opens files and fills caches
                rates[name].append(rate)
    found = {f"{unit} a second, {name}": median(values) for name, values in rates.items()}
    for name in runs:
        if name != base:
            pairs = zip(rates[name], rates[base], strict=True)
            found[f"{unit}: {name} / {base}"] = median(rate / other for rate, other in pairs)
    return found


def measure_reads(args: argparse.Namespace, sources: dict[str, Any], count: int) -> dict[str, float]:
    def cold(name: str, order: Sequence[int]) -> float:
        forget(args.folder / name)
        return raw_reads(sources[name], order)

    warm: Runs = {name: functools.partial(raw_reads, sources[name]) for name in ("files", "tars")}
    whole: Runs = {name: functools.partial(whole_loads, sources[name]) for name in ("files", "tars")}
    for run in warm.values():
        run(range(count))
    return {
        **compare(warm, count, args.reads, args.repeats, "files", "warm reads"),
        **compare(whole, count, args.images, args.repeats, "files", "warm loads"),
        **compare(
            {name: functools.partial(cold, name) for name in warm},
            count,
            args.reads,
            min(3, args.repeats),
            "files",
            "cold reads",
        ),
    }


def measure_loads(args: argparse.Namespace, sources: dict[str, Any], count: int) -> dict[str, float]:
    geometry, files = geometry_of_config("sa2va_4b_full"), args.folder / "files"
    runs: Runs = {
        "plain PIL": functools.partial(plain_images, files, geometry),
        "ours, files": functools.partial(our_images, sources["files"], geometry),
        "ours, tars": functools.partial(our_images, sources["tars"], geometry),
    }
    found = compare(runs, count, args.images, args.repeats, "plain PIL", "prepared images")
    for kind in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
        name = f"grounding pixels, mean difference to PIL's {kind.name.lower()} (0..255)"
        found[name] = pixel_difference(sources["tars"], geometry, files, kind)
    return found


def measure_decoder(args: argparse.Namespace, sources: dict[str, Any], count: int) -> dict[str, float]:
    """Compare simplejpeg, where it is installed, with Pillow."""
    from dual_loop.data import images

    if images.simplejpeg is None:
        print("simplejpeg is not installed: pip install 'dual-loop[fast]'")
        return {}

    def prepared(decoder: Any, geometry: Any, order: Sequence[int]) -> float:
        with mock.patch.object(images, "simplejpeg", decoder):
            return our_images(sources["files"], geometry, order)

    found: dict[str, float] = {}
    for config in ("sa2va_4b_full", "tiny_demo"):
        decoders = {"Pillow": None, "simplejpeg": images.simplejpeg}
        geometry = geometry_of_config(config)
        runs: Runs = {kind: functools.partial(prepared, decoder, geometry) for kind, decoder in decoders.items()}
        found |= compare(runs, count, args.images, args.repeats, "Pillow", f"{config}: prepared images")
    return found


def measure_scale(args: argparse.Namespace, sources: dict[str, Any], count: int) -> dict[str, float]:
    """Compare ``needed`` with ``full``: the set at hand for the small models, photographs twice as large for 4B."""
    from dual_loop.data.sa1b import Sa1b

    large = args.folder / "large"
    write_set(large, 0.0, (2 * SIZE[0], 2 * SIZE[1]))
    camera = Sa1b(large / "files", regions_per_image=REGIONS, index_dir=args.folder / "index")
    found: dict[str, float] = {}
    for name, source, geometry in (
        ("tiny", sources["files"], geometry_of_config("tiny_demo")),
        ("mid", sources["files"], geometry_of_config("bench_mid")),
        ("4B, 3000 x 4500", camera, geometry_of_config("sa2va_4b_full")),
    ):
        runs: Runs = {
            "full": functools.partial(our_images, source, geometry),
            "needed": functools.partial(our_images, source, geometry, is_reduced=True),
        }
        found |= compare(runs, min(count, len(source)), args.images, args.repeats, "full", f"{name}: images")
        found |= {f"{name}: {key}": value for key, value in differences(source, geometry).items()}
    return found


def differences(source: Any, geometry: Any) -> dict[str, float]:
    """Return mean differences (0..255) of what is prepared with and without a smaller scale; masks must be equal."""
    import torch

    from dual_loop.data.prepare import IMAGENET_STD

    one, other = (prepare_image(source, geometry, 0, is_reduced) for is_reduced in (False, True))
    assert torch.equal(one.target_masks, other.target_masks)
    assert torch.equal(one.prompt_masks, other.prompt_masks)
    deviation = 255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return {
        "grounding pixels differ by": float((one.g_pixel_values.float() - other.g_pixel_values.float()).abs().mean()),
        "vision pixels differ by": float(((one.pixel_values - other.pixel_values) * deviation).abs().mean()),
    }


def geometry_of_config(name: str) -> Any:
    from dual_loop.config import load_config, resolve_config_path
    from dual_loop.model.build import geometry

    return geometry(load_config(resolve_config_path(name)))


def measure_gzip(args: argparse.Namespace, sources: dict[str, Any], count: int) -> dict[str, float]:
    """Read entries of one compressed archive with points at several distances, each in a process of its own."""
    found: dict[str, float] = {}
    folder = args.folder / "gzipped"
    folder.mkdir()
    with (
        open(args.folder / "tars" / "sa_000000.tar", "rb") as plain,
        gzip.open(folder / "sa_000000.tar", "wb", compresslevel=1) as compressed,
    ):
        shutil.copyfileobj(plain, compressed)
    gigabytes = (args.folder / "tars" / "sa_000000.tar").stat().st_size / 1e9
    for spacing in SPACINGS:
        command = [sys.executable, __file__, "--spacing", str(spacing), "--folder", str(args.folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        values = json.loads(done.stdout)
        name = f"points every {spacing / 2**20:g} MiB"
        found[f"{name}: seconds to list a GB"] = values["list"] / gigabytes
        found[f"{name}: ms to read an entry"] = 1000 * values["read"]
        found[f"{name}: MB of points a GB"] = values["points"] / 1e6 / gigabytes
        found[f"{name}: ms to open with points of a GB"] = 1000 * values["open"] / gigabytes
    return found


def measure_spacing(folder: Path, spacing: int) -> dict[str, float]:
    """Return seconds to list, to open again and to read an entry (median), and the bytes of the points."""
    from dual_loop.data import tar
    from dual_loop.data.sa1b import Sa1b

    tar.point_spacing = lambda num_bytes: spacing
    index_dir = folder / f"index_{spacing}"
    start = time.perf_counter()
    Sa1b(folder / "gzipped", regions_per_image=REGIONS, index_dir=index_dir)
    listed = time.perf_counter() - start
    source = Sa1b(folder / "gzipped", regions_per_image=REGIONS, index_dir=index_dir)
    start = time.perf_counter()
    source._shelf._file(0)
    opened = time.perf_counter() - start
    order = np.random.default_rng(0).choice(len(source), min(60, len(source)), replace=False).tolist()
    seconds = [1 / raw_reads(source, [index]) for index in order]
    points = sum(path.stat().st_size for path in (index_dir / "gzip_points").iterdir())
    return {"list": listed, "open": opened, "read": median(seconds), "points": points}


MEASUREMENTS = {
    "reads": measure_reads,
    "loads": measure_loads,
    "decoder": measure_decoder,
    "scale": measure_scale,
    "gzip": measure_gzip,
}


def main(argv: Sequence[str] | None = None) -> int:
    args, parser = parse_arguments(argv)
    import real_size_step
    import torch

    from dual_loop.data.sa1b import Sa1b

    if args.spacing:
        print(json.dumps(measure_spacing(args.folder, args.spacing)))
        return 0
    torch.set_num_threads(1)
    if args.folder.exists():
        parser.error(f"{args.folder} exists already; it would be removed")
    results: dict[str, float] = {}
    try:
        start = time.perf_counter()
        count = write_set(args.folder, args.gib)
        size = sum(path.stat().st_size for path in (args.folder / "files").iterdir()) / 2**30
        print(f"wrote {count} images, {size:.2f} GiB, in {time.perf_counter() - start:.0f} s", flush=True)
        print(f"commit {real_size_step.commit()}\nmachine {real_size_step.machine()}; one thread")
        sources = {
            name: Sa1b(args.folder / name, regions_per_image=REGIONS, index_dir=args.folder / "index")
            for name in ("files", "tars")
        }
        for part in args.parts:
            found = MEASUREMENTS[part](args, sources, count)
            results |= found
            for name, value in found.items():
                print(f"{name:<76}{value:>12.3f}", flush=True)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps({"images": count, "gib": size, **results}, indent=1) + "\n")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=0.2, help="size of the set (%(default)s), twice that is written")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "outputs" / "bench_loader", help="made, and removed again"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured (all)")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (%(default)s)")
    parser.add_argument("--images", type=int, default=12, help="images of a round that are prepared (%(default)s)")
    parser.add_argument("--reads", type=int, default=400, help="entries of a round that are read (%(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--spacing", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv), parser


if __name__ == "__main__":
    sys.exit(main())

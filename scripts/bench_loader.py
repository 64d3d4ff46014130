"""SA-1B from archives against unpacked files, and the reader with its preparation against a plain PIL pipeline.

    python scripts/bench_loader.py --gib 5 --folder outputs/bench_loader --json loader.json

A generated set in SA-1B's form (JPEG of 1500 x 2250 pixels, about a hundred run-length masks an image) is written as
files, as tars and as one gzipped tar. All variants take turns; printed are medians and ratios. The files were written a
moment before, so as many of them as fit are in the page cache: what is compared is the work of reading, not the disk.

The plain pipeline opens an image, decodes it in full, decodes all its masks with pycocotools, chooses four, and resizes
image and masks with PIL to the sizes that the model takes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

SIZE = (1500, 2250)
MASKS = 100
REGIONS = 4
PER_TAR = 64


def write_set(folder: Path, gib: float) -> int:
    """Write files, tars and a gzipped tar below ``folder``; return the number of images."""
    from pycocotools import mask as coco

    rng = np.random.default_rng(0)
    files = folder / "files"
    files.mkdir(parents=True)
    height, width = SIZE
    pictures, codes = [], []
    for _ in range(8):  # few pictures, many names: what is read is what counts
        coarse = rng.integers(0, 256, (100, 150, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        path = folder / "picture.jpg"
        Image.fromarray(noisy).save(path, quality=90)
        pictures.append(path.read_bytes())
        path.unlink()
    rows, columns = np.mgrid[:height, :width]
    for number in range(MASKS):
        y, x, tall, wide = rng.uniform((0, 0, 40, 40), (height, width, 300, 300))
        mask = ((rows - y) / tall) ** 2 + ((columns - x) / wide) ** 2 <= 1
        code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": [height, width], "counts": code["counts"].decode()}
        codes.append({"id": number, "segmentation": segmentation, "area": int(mask.sum()), "predicted_iou": 0.95})
    record = json.dumps({"image": {"height": height, "width": width}, "annotations": codes}).encode()
    count = max(16, int(gib * 2**30 / (np.mean([len(picture) for picture in pictures]) + len(record))))
    for number in range(count):
        (files / f"sa_{number:06}.jpg").write_bytes(pictures[number % len(pictures)])
        (files / f"sa_{number:06}.json").write_bytes(record)
    pack(folder, count)
    return count


def pack(folder: Path, count: int) -> None:
    (folder / "tars").mkdir()
    (folder / "gzipped").mkdir()
    for number, start in enumerate(range(0, count, PER_TAR)):
        with tarfile.open(folder / "tars" / f"sa_{number:06}.tar", "w") as tar:
            for index in range(start, min(count, start + PER_TAR)):
                for suffix in ("jpg", "json"):
                    tar.add(folder / "files" / f"sa_{index:06}.{suffix}", f"./sa_{index:06}.{suffix}")
    with (
        open(folder / "tars" / "sa_000000.tar", "rb") as plain,
        gzip.open(folder / "gzipped" / "sa_000000.tar", "wb", compresslevel=1) as compressed,
    ):
        shutil.copyfileobj(plain, compressed)


def raw_reads(source: Any, order: Sequence[int]) -> float:
    """Read image and JSON of the entries ``order``; return entries a second."""
    start = time.perf_counter()
    for index in order:
        row = int(source._kept[index])
        for names, places in ((source._images, source._image_place), (source._records, source._record_place)):
            found = source._read(names[row], places[row])
            found.read_bytes() if isinstance(found, Path) else found.getvalue()
    return len(order) / (time.perf_counter() - start)


def our_images(source: Any, geometry: Any, order: Sequence[int]) -> float:
    """Load and prepare one image at a time; return images a second."""
    from dual_loop.data.prepare import batch_from_samples

    start = time.perf_counter()
    for index in order:
        batch_from_samples([source.load(index, np.random.default_rng(index))], geometry, seed=0)
    return len(order) / (time.perf_counter() - start)


def plain_images(folder: Path, geometry: Any, order: Sequence[int]) -> float:
    """The plain pipeline; return images a second."""
    start = time.perf_counter()
    for index in order:
        plain_image(folder, geometry, index)
    return len(order) / (time.perf_counter() - start)


def plain_image(folder: Path, geometry: Any, index: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return what the model takes: the vision image and the grounding image (uint8), and four masks."""
    from pycocotools import mask as coco

    image = Image.open(folder / f"sa_{index:06}.jpg").convert("RGB")
    record = json.loads((folder / f"sa_{index:06}.json").read_text())
    masks = [coco.decode(annotation["segmentation"]) for annotation in record["annotations"]]
    chosen = random.Random(index).sample(masks, REGIONS)
    side, large, small = geometry.vision_image_size, geometry.grounding_size, geometry.mask_size
    seen = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    ground = np.asarray(image.resize((large, large), Image.Resampling.BILINEAR))
    resized = [np.asarray(Image.fromarray(mask).resize((small, small), Image.Resampling.NEAREST)) for mask in chosen]
    return seen, ground, resized


def pixel_difference(source: Any, geometry: Any, folder: Path, index: int) -> tuple[float, float]:
    """Return mean and largest difference (0..255) of the grounding image between the two pipelines."""
    from dual_loop.data.prepare import batch_from_samples

    batch = batch_from_samples([source.load(index, np.random.default_rng(0))], geometry, seed=0)
    ours = batch.g_pixel_values[0].permute(1, 2, 0).numpy().astype(np.int16)
    difference = np.abs(ours - plain_image(folder, geometry, index)[1].astype(np.int16))
    return float(difference.mean()), float(difference.max())


def compare(runs: dict[str, Callable[[Sequence[int]], float]], count: int, each: int, repeats: int) -> dict[str, float]:
    """Return the median rate of every variant; they take turns, each over the same random entries."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        order = np.random.default_rng(number).choice(count, min(each, count), replace=False).tolist()
        for name, run in runs.items():
            rate = run(order)
            if number:  # the first round opens files and fills caches
                rates[name].append(rate)
    return {name: median(values) for name, values in rates.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=0.2, help="size of the set (%(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "outputs" / "bench_loader", help="made, and removed again"
    )
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (%(default)s)")
    parser.add_argument("--images", type=int, default=12, help="images of a round that are prepared (%(default)s)")
    parser.add_argument("--reads", type=int, default=400, help="entries of a round that are read (%(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    import real_size_step
    import torch

    from dual_loop.config import load_config, resolve_config_path
    from dual_loop.data.sa1b import Sa1b
    from dual_loop.model.build import geometry as geometry_of

    torch.set_num_threads(1)
    if args.folder.exists():
        parser.error(f"{args.folder} exists already; it would be removed")
    geometry = geometry_of(load_config(resolve_config_path("sa2va_4b_full")))
    try:
        start = time.perf_counter()
        count = write_set(args.folder, args.gib)
        size = sum(path.stat().st_size for path in (args.folder / "files").iterdir()) / 2**30
        print(f"wrote {count} images, {size:.2f} GiB, in {time.perf_counter() - start:.0f} s", flush=True)
        results = measure(args, count, geometry, Sa1b)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    print(f"commit {real_size_step.commit()}\nmachine {real_size_step.machine()}; one thread")
    for name, value in results.items():
        print(f"{name:<44}{value:>12.3f}")
    if args.json:
        args.json.write_text(json.dumps({"images": count, "gib": size, **results}, indent=1) + "\n")
    return 0


def measure(args: argparse.Namespace, count: int, geometry: Any, reader: Any) -> dict[str, float]:
    folder = args.folder
    sources = {
        name: reader(folder / name, regions_per_image=REGIONS, index_dir=folder / "index")
        for name in ("files", "tars", "gzipped")
    }
    same = {name: source for name, source in sources.items() if name != "gzipped"}
    reads = compare({n: lambda o, s=s: raw_reads(s, o) for n, s in same.items()}, count, args.reads, args.repeats)
    packed = {n: lambda o, s=s: raw_reads(s, o) for n, s in sources.items()}
    few = compare(packed, min(count, PER_TAR), 16, args.repeats)
    loads = compare(
        {
            "ours, files": lambda o: our_images(sources["files"], geometry, o),
            "ours, tars": lambda o: our_images(sources["tars"], geometry, o),
            "plain PIL": lambda o: plain_images(folder / "files", geometry, o),
        },
        count,
        args.images,
        args.repeats,
    )
    mean, largest = pixel_difference(sources["tars"], geometry, folder / "files", 0)
    return {
        **{f"entries read a second, {name}": rate for name, rate in reads.items()},
        "tars / files": reads["tars"] / reads["files"],
        "entries read a second, gzipped tar": few["gzipped"],
        "gzipped / files": few["gzipped"] / few["files"],
        **{f"images a second and core, {name}": rate for name, rate in loads.items()},
        "ours from tars / plain PIL": loads["ours, tars"] / loads["plain PIL"],
        "pixel difference, mean (0..255)": mean,
        "pixel difference, largest (0..255)": largest,
    }


if __name__ == "__main__":
    sys.exit(main())

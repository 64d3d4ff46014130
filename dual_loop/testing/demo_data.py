"""Writes generated scenes in the on-disk formats of SA-V pairs, SA-1B, Open Images and RefCOCO.

The readers cannot tell the result from the real data sets but by its size, so every path of the package runs without
a download::

    OUT/sav/npz/part_000/masklet_data_0.npz          frame1, frame2, mask1, mask2
    OUT/sa1b/sa_1.jpg, sa_1.json                     compressed COCO run-length codes
    OUT/openimages/train-annotations-object-segmentation.csv, oidv7-class-descriptions.csv, images/train, masks/train
    OUT/ref_seg/refcoco/instances.json, refs(unc).p, coco2014/train2014
    OUT/demo.json                                    seed, counts and what scenes are made of; written last

Masks are stored as drawn, never derived from a JPEG. The same arguments give the same bytes. Scene seeds come from
named pools (:func:`~dual_loop.testing.scenes.pool_seed`), so no two sources or splits share a scene.
"""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dual_loop.data.coco_masks import encode_rle
from dual_loop.errors import ConfigError, explain
from dual_loop.testing.scenes import (
    GENERATOR_VERSION,
    GLYPHS,
    SCENE_OPTIONS,
    Scene,
    generate_pair,
    generate_scene,
    movable_objects,
    pool_seed,
)
from dual_loop.types import SOURCES

__all__ = ["demo_directories", "pool_seed", "write_demo_data"]

JPEG_QUALITY = 95
POOLS = ("sav", "sa1b", "openimages", *(f"refcoco/{split}" for split in ("train", "val", "testA", "testB")))
OPEN_IMAGES_HEADER = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
OPEN_IMAGES_MASK_SCALE = 1.25
FILES_PER_FOLDER = 1000


def write_demo_data(
    out: Path,
    num_images: int,
    seed: int = 0,
    *,
    sources: Sequence[str] = SOURCES,
    num_refcoco: int | None = None,
    num_val: int | None = None,
    sizes: Mapping[str, int] | None = None,
    captioned_pools: Sequence[str] = (),
    vague_share: float = 0.0,
) -> dict[str, int]:
    """Write the data set below ``out`` and return the number of images (SA-V: of pairs) in each pool.

    Args:
        out: a new or empty folder. Where it already holds this very data set, nothing is written.
        num_images: images of each source, and of the train split of RefCOCO.
        seed: decides every byte.
        sources: the sources to write, from :data:`~dual_loop.types.SOURCES`.
        num_refcoco: images of the train split of RefCOCO; None takes ``num_images``.
        num_val: images of the val split of RefCOCO; None takes a fifth of ``num_images``, at least one.
        sizes: images of other pools, or of these, such as ``{"sav": 2, "refcoco/testA": 20}``.
        captioned_pools: ``sa1b``, ``openimages`` or both: their scenes come a second time, with captions, behind the
            train split of RefCOCO. What a loop could at best learn from masks alone is measured on these.
        vague_share: share of the captions of the train split that name the shape alone (``the star``): true, but no
            help where another star is near. Captions that people write are often so.

    Returns:
        Counts by pool: ``sav``, ``sa1b``, ``openimages``, ``refcoco/train``, ``refcoco/val``, ...

    Raises:
        ConfigError: an unknown source or pool, a negative count, or ``out`` holds something else.
    """
    counts = {name: num_images for name in SOURCES if name in sources and name != "refcoco"}
    if "refcoco" in sources:
        counts["refcoco/train"] = num_images if num_refcoco is None else num_refcoco
        counts["refcoco/val"] = max(1, num_images // 5) if num_val is None else num_val
    counts.update(sizes or {})
    _check_request(sources, counts, captioned_pools)
    record = {"generator_version": GENERATOR_VERSION, "seed": seed, "counts": counts, "options": SCENE_OPTIONS}
    if captioned_pools:
        record["captioned_pools"] = list(captioned_pools)
    if vague_share:
        record["vague_share"] = vague_share
    text, out = json.dumps(record, indent=2) + "\n", Path(out)
    if _is_written(out, text):
        return counts

    def scene(pool: str, index: int) -> Scene:
        return generate_scene(pool_seed(seed, pool, index))

    if counts.get("sav"):
        _write_sav(out / "sav" / "npz", seed, counts["sav"])
    if counts.get("sa1b"):
        _write_sa1b(out / "sa1b", counts["sa1b"], scene)
    if counts.get("openimages"):
        _write_open_images(out / "openimages", counts["openimages"], seed, scene)
    pools = [pool for pool, count in counts.items() if pool.startswith("refcoco/") and count]
    parts = [(pool.removeprefix("refcoco/"), pool, counts[pool]) for pool in pools]
    parts += [("train", pool, counts[pool]) for pool in captioned_pools]
    if parts:
        _write_refcoco(out / "ref_seg" / "refcoco", parts, scene, vague_share)
    (out / "demo.json").write_text(text, encoding="utf-8")
    return counts


def demo_directories(out: Path) -> dict[str, str]:
    """Return the settings of ``DataConfig`` (and flags of ``train``) that point at a data set written to ``out``."""
    folders = {"sav_dir": "sav", "sa1b_dir": "sa1b", "openimage_dir": "openimages", "refcoco_dir": "ref_seg"}
    return {key: str(Path(out) / folder) for key, folder in folders.items()}


def _check_request(sources: Sequence[str], counts: Mapping[str, int], captioned_pools: Sequence[str]) -> None:
    problems = [f"unknown source {name!r} (known: {', '.join(SOURCES)})" for name in sources if name not in SOURCES]
    problems += [f"unknown pool {pool!r} (known: {', '.join(POOLS)})" for pool in counts if pool not in POOLS]
    problems += [f"{count} images of {pool}, expected 0 or more" for pool, count in counts.items() if count < 0]
    copyable = [name for name in ("sa1b", "openimages") if name in counts and "refcoco" in sources]
    wrong = [name for name in captioned_pools if name not in copyable]
    problems += [f"no pool {name!r} to caption (written here: {', '.join(copyable) or 'none'})" for name in wrong]
    if not problems and sum(counts.values()) == 0:
        problems.append("no images were asked for, expected at least one")
    if problems:
        raise ConfigError(explain("the demo data cannot be written", "demo-data", "; ".join(problems)))


def _is_written(out: Path, record: str) -> bool:
    """Tell whether ``out`` holds exactly this data set; raise ConfigError where it holds anything else."""
    if out.exists() and not out.is_dir():
        raise ConfigError(explain("the output is not a folder", str(out), fix="give another path"))
    if not out.is_dir() or not any(out.iterdir()):
        return False
    marker = out / "demo.json"
    if marker.is_file() and marker.read_text(encoding="utf-8") == record:
        return True
    state = "demo data of other arguments" if marker.is_file() else "files but no demo.json"
    fix = "give a new folder, or delete this one"
    raise ConfigError(explain("the output folder is not empty", str(out), state, "a new or empty folder", fix))


def _write_sav(root: Path, seed: int, count: int) -> None:
    """Write frame pairs of one region each; masks of odd files hold 0 and 255, those of even files 0 and 1."""
    for index in range(count):
        folder = root / f"part_{index // FILES_PER_FOLDER:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        scene_seed = pool_seed(seed, "sav", index)
        first, second = generate_pair(scene_seed)
        choices = movable_objects(first)
        chosen = choices[scene_seed % len(choices)]
        foreground = 255 if index % 2 else 1
        mask1, mask2 = (s.objects[chosen].mask.astype(np.uint8) * foreground for s in (first, second))
        path = folder / f"masklet_data_{index}.npz"
        np.savez_compressed(path, frame1=first.image, frame2=second.image, mask1=mask1, mask2=mask2)


def _write_sa1b(root: Path, count: int, scene: Callable[[str, int], Scene]) -> None:
    """Write ``sa_<id>.jpg`` and ``sa_<id>.json``, every field of the original's annotation file."""
    root.mkdir(parents=True)
    for index in range(count):
        drawn = scene("sa1b", index)
        height, width = drawn.image.shape[:2]
        stem = f"sa_{index + 1}"
        annotations = [
            {
                "id": (index + 1) * 10 + number,
                "segmentation": encode_rle(item.mask),
                "bbox": _bounding_box(item.mask),
                "area": int(item.mask.sum()),
                "predicted_iou": round(0.88 + 0.12 * item.visible_fraction, 4),
                "stability_score": round(0.92 + 0.08 * item.visible_fraction, 4),
                "crop_box": [0.0, 0.0, float(width), float(height)],
                "point_coords": [_inner_point(item.mask)],
            }
            for number, item in enumerate(drawn.objects)
        ]
        image = {"image_id": index + 1, "width": width, "height": height, "file_name": f"{stem}.jpg"}
        _write_jpeg(drawn.image, root / f"{stem}.jpg")
        (root / f"{stem}.json").write_text(json.dumps({"image": image, "annotations": annotations}), encoding="utf-8")


def _write_open_images(root: Path, count: int, seed: int, scene: Callable[[str, int], Scene]) -> None:
    """Write images, 1-bit masks and the two CSV files; masks of odd images are 1.25 times as large as the image."""
    images, masks = root / "images" / "train", root / "masks" / "train"
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    rows: list[list[str]] = []
    for index in range(count):
        drawn = scene("openimages", index)
        image_id = hashlib.sha256(f"{seed}/openimages/{index}".encode()).hexdigest()[:16]
        _write_jpeg(drawn.image, images / f"{image_id}.jpg")
        for number, item in enumerate(drawn.objects):
            label, box_id = f"/m/{item.shape}", hashlib.sha256(f"{image_id}/{number}".encode()).hexdigest()[:8]
            name = f"{image_id}_m{item.shape}_{box_id}.png"
            height, width = item.mask.shape
            left, top, box_width, box_height = _bounding_box(item.mask)
            box = (left / width, (left + box_width) / width, top / height, (top + box_height) / height)
            x, y = _inner_point(item.mask)
            click = f"{x / width:.5f} {y / height:.5f} 1"
            score = f"{0.8 + 0.2 * item.visible_fraction:.5f}"
            rows.append([name, image_id, label, box_id, *(f"{value:.6f}" for value in box), score, click])
            scale = OPEN_IMAGES_MASK_SCALE if index % 2 else 1.0
            size = (round(width * scale), round(height * scale))
            mask = Image.fromarray(item.mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
            mask.convert("1").save(masks / name, format="PNG")
    _write_csv([OPEN_IMAGES_HEADER.split(","), *rows], root / "train-annotations-object-segmentation.csv")
    names = [(f"/m/{shape}", shape.capitalize()) for shape in GLYPHS]
    _write_csv([("LabelName", "DisplayName"), *names], root / "oidv7-class-descriptions.csv")


def _write_refcoco(
    root: Path,
    parts: Sequence[tuple[str, str, int]],
    scene: Callable[[str, int], Scene],
    vague_share: float = 0.0,
) -> None:
    """Write ``instances.json``, ``refs(unc).p`` and the images; one expression an object.

    ``parts`` are (split, pool of scenes, number of images). Segmentations are run-length codes with ``iscrowd`` 0,
    which keeps them exact; every third one is uncompressed.
    """
    folder = root / "coco2014" / "train2014"
    folder.mkdir(parents=True)
    categories = {shape: number for number, shape in enumerate(GLYPHS, start=1)}
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    refs: list[dict[str, object]] = []
    for split, pool, count in parts:
        for index in range(count):
            drawn = scene(pool, index)
            image_id = len(images) + 1
            file_name = f"COCO_train2014_{image_id:012d}.jpg"
            height, width = drawn.image.shape[:2]
            images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
            _write_jpeg(drawn.image, folder / file_name)
            for item in drawn.objects:
                number = len(annotations) + 1
                rle = _uncompressed_rle(item.mask) if number % 3 == 0 else encode_rle(item.mask)
                ids = {"image_id": image_id, "category_id": categories[item.shape]}
                area, box = int(item.mask.sum()), _bounding_box(item.mask)
                annotations.append({"id": number, **ids, "segmentation": rle, "area": area, "bbox": box, "iscrowd": 0})
                # A number in 0..1 that looks random and is always the same for this one.
                is_vague = split == "train" and (number * 2654435761 % 2**32) / 2**32 < vague_share
                caption = f"the {item.shape}" if is_vague else item.caption
                sentence = {"sent_id": number, "raw": caption, "sent": caption, "tokens": caption.split()}
                ref_name = f"COCO_train2014_{image_id:012d}_{number}.jpg"
                ref = {"ref_id": number, "ann_id": number, **ids, "file_name": ref_name, "split": split}
                refs.append({**ref, "sent_ids": [number], "sentences": [sentence]})
    instances = {
        "info": {"description": "generated scenes in the COCO layout"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": n, "name": shape, "supercategory": "symbol"} for shape, n in categories.items()],
    }
    (root / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
    # Protocol 2 with plain dicts, lists, strings and integers, as in the original: it holds no global to refuse.
    (root / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


def _uncompressed_rle(mask: np.ndarray) -> dict[str, object]:
    """Return COCO's uncompressed code of (H, W) bool: run lengths in column-major order, background first."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    return {"size": [int(side) for side in mask.shape], "counts": [0, *runs] if flat[0] else runs}


def _bounding_box(mask: np.ndarray) -> list[float]:
    """Return [x, y, width, height] in pixels of a non-empty (H, W) bool mask, as COCO counts it."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = columns[0], rows[0]
    return [float(value) for value in (left, top, columns[-1] - left + 1, rows[-1] - top + 1)]


def _inner_point(mask: np.ndarray) -> list[float]:
    """Return [x, y] of the foreground pixel nearest to the mask's centre of mass."""
    rows, columns = np.nonzero(mask)
    nearest = int(np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2))
    return [float(columns[nearest]), float(rows[nearest])]


def _write_jpeg(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, format="JPEG", quality=JPEG_QUALITY)


def _write_csv(rows: Sequence[Sequence[str]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)

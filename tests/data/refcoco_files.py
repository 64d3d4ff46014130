"""A small RefCOCO on disk: what tests of its reader and of its index write."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.refcoco import RefCoco

HEIGHT, WIDTH = 30, 40
SPLITS = ("train", "train", "val", "testA")


def square(x: int, y: int, side: int = 8) -> list[int]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def crowd_mask() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[3:7, 20:35] = True
    return mask


def make_instances() -> dict[str, Any]:
    flat = crowd_mask().T.flatten().astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flat))))
    counts = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    images, annotations = [], []
    for image_id in range(1, 5):
        name = f"COCO_train2014_{image_id:012d}.jpg"
        images.append({"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH})
        shapes = ([square(2, 2), square(6, 6)], {"size": [HEIGHT, WIDTH], "counts": counts}, encode_rle(crowd_mask()))
        for k, shape in enumerate(shapes):
            annotations.append({"id": image_id * 10 + k, "image_id": image_id, "segmentation": shape, "iscrowd": k > 0})
    return {"images": images, "annotations": annotations}


def make_refs() -> list[dict[str, Any]]:
    refs = []
    for image_id, split in enumerate(SPLITS, start=1):
        for k in range(3):
            ref_id = image_id * 100 + k
            sentences = [
                {"sent": f"thing {ref_id} {n}", "raw": "RAW", "sent_id": n, "tokens": []} for n in range(k + 1)
            ]
            refs.append(
                {
                    "ref_id": ref_id,
                    "ann_id": image_id * 10 + k,
                    "image_id": image_id,
                    "category_id": 1,
                    "file_name": f"COCO_train2014_{image_id:012d}_{k}.jpg",
                    "split": split,
                    "sent_ids": list(range(k + 1)),
                    "sentences": sentences,
                }
            )
    return refs[::-1]


def write_dataset(folder: Path, refs: Any = None, instances: Any = None, split_by: str = "unc") -> None:
    images = folder / "coco2014/train2014"
    images.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for image_id in range(1, 5):
        Image.fromarray(pixels).save(images / f"COCO_train2014_{image_id:012d}.jpg")
    (folder / "instances.json").write_text(json.dumps(make_instances() if instances is None else instances))
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(make_refs() if refs is None else refs, protocol=2))


def make_grefs() -> list[dict[str, Any]]:
    """Image 1: two targets, one, none; image 2: none alone; image 3, of val: a mask of another image, one target."""
    rows = [
        (1, [10, 11], "both"),
        (1, [11], "the bar"),
        (1, [-1], "a zebra"),
        (2, [-1], "a pink cow"),
        (2, [-1], "a bus"),
    ]
    rows += [(3, [10], "elsewhere"), (3, [31], "the bar")]
    return [
        {
            "ref_id": number,
            "ann_id": targets,
            "image_id": image_id,
            "split": SPLITS[image_id - 1],
            "no_target": targets == [-1],
            "sentences": [{"sent": text, "raw": text, "sent_id": number, "tokens": []}],
        }
        for number, (image_id, targets, text) in enumerate(rows)
    ]


def write_grefs(root: Path) -> None:
    """Write gRefCOCO beside a RefCOCO in ``root``, whose instances.json and images it shares."""
    (root / "grefcoco").mkdir()
    (root / "grefcoco/grefs(unc).json").write_text(json.dumps(make_grefs()))


def source_of(root: Path, datasets: tuple[str, ...] = ("refcoco",), **options: Any) -> RefCoco:
    return RefCoco(root, datasets, index_dir=root.parent / "cache", **options)

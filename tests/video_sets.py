"""Small copies of MeViS and Ref-DAVIS17: generated scenes that move to the right, frame by frame."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dual_loop.data.coco_masks import encode_rle
from dual_loop.testing.scenes import generate_scene

FRAMES, SIZE = 7, (160, 128)
"""Frames of a video, and (W, H) of each."""


def scene(seed: int, number: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return frame ``number`` of a video: image (H, W, 3), masks (2, H, W), and what two objects are called."""
    found = generate_scene(seed)
    step = 3 * number
    masks = np.stack([item.mask for item in found.objects[:2]])
    return np.roll(found.image, step, axis=1), np.roll(masks, step, axis=2), list(found.captions[:2])


def write_mevis(root: Path, videos: int = 2, split: str = "valid_u", has_masks: bool = True) -> Path:
    """Write a split; the last expression of each video means two objects, whose masks are gone on the last frame."""
    folder, meta, codes = root / split, {}, {}
    for seed in range(videos):
        frames = [f"{number:05d}" for number in range(FRAMES)]
        for number, name in enumerate(frames):
            image, masks, texts = scene(seed, number)
            path = folder / "JPEGImages" / f"video{seed}" / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, quality=95)
            for place, mask in enumerate(masks):
                is_gone = number == FRAMES - 1
                codes.setdefault(str(10 * seed + place), []).append(None if is_gone else encode_rle(mask))
        said = {str(k): {"exp": text, "obj_id": [k], "anno_id": [10 * seed + k]} for k, text in enumerate(texts)}
        both = [10 * seed, 10 * seed + 1]
        said[str(len(texts))] = {"exp": "two things that move right", "obj_id": [0, 1], "anno_id": both}
        if not has_masks:
            said = {key: {"exp": one["exp"]} for key, one in said.items()}
        meta[f"video{seed}"] = {"expressions": said, "vid_id": seed, "frames": frames}
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": meta}))
    if has_masks:
        (folder / "mask_dict.json").write_text(json.dumps(codes))
    return root


def write_refdavis(root: Path, videos: int = 1) -> Path:
    """Write the split ``valid``: four expressions of each object, the rightmost column void."""
    meta = {}
    for seed in range(videos):
        frames = [f"{number:05d}" for number in range(FRAMES)]
        for number, name in enumerate(frames):
            image, masks, texts = scene(seed, number)
            labels = np.zeros(image.shape[:2], np.uint8)
            for place, mask in enumerate(masks):
                labels[mask] = place + 1
            labels[:, -1] = 255
            for part, ending, values in (("JPEGImages", "jpg", image), ("Annotations", "png", labels)):
                path = root / "valid" / part / f"video{seed}" / f"{name}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(values)
                if ending == "png":
                    picture.putpalette(list(range(256)) * 3)
                picture.save(path)
        said = [(text, place) for place, text in enumerate(texts) for _ in range(4)]
        records = {str(k): {"exp": text, "obj_id": str(place + 1)} for k, (text, place) in enumerate(said)}
        meta[f"video{seed}"] = {"expressions": records, "frames": frames}
    listing = root / "meta_expressions" / "valid" / "meta_expressions.json"
    listing.parent.mkdir(parents=True)
    listing.write_text(json.dumps({"videos": meta}))
    return root

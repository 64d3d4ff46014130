"""What could a perfect student reach? Targets are compared with the masks that they were made from.

    python scripts/experiments/ceiling.py OUT.json [--coco FOLDER] [--objects 400]

No model: logits (Q, Q) are what a student would have learnt that follows its targets exactly, and are measured as
evaluation measures, resized to the image and cut at 0. ``follows`` is the target less a half. ``fitted`` are logits
that were fitted to the mask losses of training themselves, at points drawn as there, so that they show what the losses
ask for where a target is a fraction. The rows are those of ``data.target_pooling`` and ``loss.points_from``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dual_loop.config import LossConfig  # noqa: E402
from dual_loop.data.masks_dir import MasksDir  # noqa: E402
from dual_loop.data.prepare import resize_targets, sample_rng  # noqa: E402
from dual_loop.evaluation.measure import resize_logits, undo_target_shift  # noqa: E402
from dual_loop.losses import dice_loss, mask_cross_entropy  # noqa: E402
from dual_loop.metrics import iou, mask_overlap  # noqa: E402
from dual_loop.points import mask_sample, point_sample, sample_points  # noqa: E402
from dual_loop.testing.scenes import generate_scene, pool_seed  # noqa: E402

LOSS = LossConfig()
SIZES = {"up to 32": (0.0, 32.0), "32 to 96": (32.0, 96.0), "over 96": (96.0, float("inf"))}
"""Square roots of an object's area, in pixels of its image (COCO's small, medium, large)."""


def scene_masks(count: int) -> Iterator[np.ndarray]:
    """Yield (H, W) bool of objects of generated scenes."""
    yielded = 0
    for index in range(count):
        for item in generate_scene(pool_seed(0, "ceiling", index)).objects:
            if yielded == count:
                return
            yielded += 1
            yield item.mask


def photograph_masks(folder: Path, count: int) -> Iterator[np.ndarray]:
    """Yield (H, W) bool of annotated objects of photographs, crowds and all."""
    source, rng = (
        MasksDir(folder / "instances.json", regions_per_image=1000, images=folder / "images"),
        sample_rng(0, 0),
    )
    masks = [mask for index in range(len(source)) for mask in source.load(index, rng).masks]
    chosen = np.random.default_rng(0).permutation(len(masks))[:count]
    yield from (masks[index] for index in sorted(chosen))


def fit(mask: Tensor, target: Tensor, points_from: str, steps: int) -> Tensor:
    """Fit logits (1, Q, Q) to the mask losses with Adam, at 12,544 points drawn anew at every step."""
    logits = torch.zeros_like(target, dtype=torch.float32).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for step in range(steps):
        seeds = torch.tensor([step])
        points = sample_points(
            logits.detach(), seeds, LOSS.num_points, LOSS.oversample_ratio, LOSS.importance_sample_ratio
        )
        wanted = mask_sample([mask], points) if points_from == "full" else point_sample(target, points)
        read = point_sample(logits, points)
        loss = LOSS.mask_weight * mask_cross_entropy(read, wanted) + LOSS.dice_weight * dice_loss(read, wanted)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return logits.detach()


def ceilings(mask: np.ndarray, side: int, steps: int) -> dict[str, float]:
    """Return the IoU of every way with one (H, W) bool mask; ``side`` is Q, a quarter of SAM 2's input."""
    whole = torch.from_numpy(mask[None])
    nearest, area = (resize_targets(mask[None], side, pooling) for pooling in ("nearest", "area"))
    ways = {"nearest, follows": nearest.float() - 0.5, "area, follows": area - 0.5}
    ways["nearest, follows, shift undone"] = undo_target_shift(nearest.float() - 0.5, mask.shape)
    if steps:
        ways["nearest, fitted"] = fit(whole, nearest, "grid", steps)
        ways["area, fitted"] = fit(whole, area, "grid", steps)
        ways["full mask, fitted"] = fit(whole, area, "full", steps)
    found = {}
    for name, logits in ways.items():
        cut = (resize_logits(logits, mask.shape, 4 * side) > 0).numpy()
        found[name] = float(iou(*mask_overlap(cut, mask[None]))[0])
    return found


def summarise(
    data: str, side: int, masks: Sequence[np.ndarray], found: Sequence[dict[str, float]]
) -> dict[str, object]:
    """Return means of one data set, over all objects and by size."""
    sizes = np.array([float(mask.sum()) ** 0.5 for mask in masks])
    groups = {"all": np.ones(len(masks), bool)}
    groups |= {name: (sizes > low) & (sizes <= high) for name, (low, high) in SIZES.items()}
    means = {
        way: {name: round(float(np.mean([one[way] for one, own in zip(found, inside, strict=True) if own])), 4)
              for name, inside in groups.items() if inside.any()}
        for way in found[0]
    }  # fmt: skip
    return {"data": data, "Q": side, "objects": {name: int(own.sum()) for name, own in groups.items()}, "gIoU": means}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file of the means")
    parser.add_argument("--coco", type=Path, help="folder with instances.json and images/")
    parser.add_argument("--objects", type=int, default=400, help="objects of each data set")
    parser.add_argument("--steps", type=int, default=200, help="of fitting; 0 leaves it out")
    args = parser.parse_args()
    parts = [("generated scenes", 48, scene_masks(args.objects))]
    if args.coco is not None:
        parts += [("photographs", side, photograph_masks(args.coco, args.objects)) for side in (256, 64)]
    results = []
    for data, side, source in parts:
        masks = list(source)
        found = [ceilings(mask, side, args.steps) for mask in masks]
        results.append(summarise(data, side, masks, found))
        print(json.dumps(results[-1], indent=1), flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

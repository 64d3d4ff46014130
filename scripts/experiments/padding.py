"""Count the padded tokens of steps 1 and 2 on generated scenes with 1 to 8 regions an image; nothing is computed.

Captions are those of the scenes, with their tokens in the tokenizer of the tiny model, which cuts words finer than the
released one does.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import numpy as np
import torch

from dual_loop.accelerate.qwen2 import row_groups
from dual_loop.config import load_config, resolve_config_path
from dual_loop.iteration import in_chunks
from dual_loop.model.build import build_tokenizer
from dual_loop.model.prompts import Prompter
from dual_loop.testing.scenes import generate_scene

IMAGES, MOST_REGIONS, ROLLOUT = 640, 8, 32
Region = tuple[str, int]
"""Caption, and cells of the mask on the token grid."""


def padded_share(rows: Sequence[int], size: int) -> float:
    """Return the share of padded tokens where every ``size`` rows in turn are padded to the longest of them."""
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    total = sum(len(group) * max(group) for group in groups)
    return 1 - sum(rows) / total if total else 0.0


def split_share(rows: Sequence[int], size: int) -> float:
    """Return the share where every ``size`` rows in turn run in groups of like length."""
    total = 0
    for start in range(0, len(rows), size):
        own = rows[start : start + size]
        total += sum(len(group) * own[group[0]] for group in row_groups(own))
    return 1 - sum(rows) / total if total else 0.0


def region_pool(side: int) -> list[Region]:
    """Return the regions of 100 scenes."""
    pool = []
    for seed in range(100):
        scene = generate_scene(10_000 + seed)
        masks = torch.tensor(np.asarray(scene.masks), dtype=torch.float32)[:, None]
        grids = torch.nn.functional.adaptive_avg_pool2d(masks, side)[:, 0]
        cells = (grids >= 0.5).flatten(1).sum(1).clamp_min(1).tolist()
        pool += list(zip(scene.captions, cells, strict=True))
    return pool


def measure(side: int, captioned: float, batch: int, accumulation: int) -> dict[str, float]:
    """Return shares of padded tokens: step 2 in one batch, in groups, sorted inside a window; step 1's questions.

    Args:
        side: of the token grid.
        captioned: share of images whose regions have captions of their own, which step 2 trains on as well.
    """
    config = load_config(resolve_config_path("tiny_cpu"))
    prompter, draw = Prompter(build_tokenizer(config.model), config.model.template, side**2), random.Random(0)
    pool, prefix = region_pool(side), len(prompter.image_prefix(1))
    lengths, questions = [], []
    for _ in range(IMAGES):
        length, has_captions, own = prefix, draw.random() < captioned, []
        for caption, cells in draw.sample(pool, draw.randint(1, MOST_REGIONS)):
            length += len(prompter.segment_turn(caption, "segment", "sure", 0, True).input_ids)
            if has_captions:
                length += len(prompter.caption_turn(cells, caption, "short", 0).input_ids)
            else:
                own.append(len(prompter.caption_question(cells, "short", 0)))
        lengths.append(length)
        questions.append(own)
    windows = [range(part[0], part[-1] + 1) for part in in_chunks(range(IMAGES), batch * accumulation)]
    ordered = [length for window in windows for length in sorted(lengths[k] for k in window)]
    asked = [sorted(length for k in window for length in questions[k]) for window in windows]
    spent = sum(len(part) * max(part) for rows in asked for part in in_chunks(rows, ROLLOUT))
    return {
        "step 2, one padded batch": padded_share(lengths, batch),
        "step 2 in groups": split_share(lengths, batch),
        "step 2, window sorted by length": padded_share(ordered, batch),
        "step 1": 1 - sum(map(sum, asked)) / spent if spent else 0.0,
    }


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=16, help="of the token grid (the released model: %(default)s)")
    side = parser.parse_args().side
    for captioned in (0.0, 0.25):
        for batch, accumulation in ((2, 4), (4, 2), (8, 4)):
            shares = measure(side, captioned, batch, accumulation)
            text = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            print(f"captioned {captioned:.0%}, batch {batch} x {accumulation}: {text}")


if __name__ == "__main__":
    main()

"""30 steps, and the same from a checkpoint in the middle: the losses are equal."""

from __future__ import annotations

import shutil
from pathlib import Path

from dual_loop.train_dual_loop import main as train

from acceptance.found import Asked, Found
from acceptance.runs import arguments, difference, losses
from acceptance.worker import release

STEPS = 30


def run(asked: Asked, found: Found) -> None:
    options = ["--batch_size", "4", "--mixed_precision", "bf16" if asked.device == "cuda" else "no"]
    options += ["--save_interval", str(STEPS // 2), "--cfg-options", "train.deterministic=True"]
    straight, resumed = (Path(asked.folder) / name for name in ("straight", "resumed"))
    status = train(arguments(asked, "straight", STEPS, *options))
    release()
    found.check(f"{STEPS} steps", status == 0, f"status {status}")
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step_{STEPS:08d}")
    status = train(arguments(asked, "resumed", STEPS, "--resume", "auto", *options))
    found.check("resumed in the middle", status == 0, f"status {status}")
    whole, second = losses(asked, "straight"), losses(asked, "resumed")
    for step in (STEPS // 2 + 1, STEPS):
        found.row("resume", step=step, straight=whole[step]["loss"], resumed=second[step]["loss"])
    worst = max(difference(second[step], whole[step]) for step in range(STEPS // 2 + 1, STEPS + 1))
    found.check("losses after resume are equal", worst == 0, f"largest relative difference {worst:.1e}")

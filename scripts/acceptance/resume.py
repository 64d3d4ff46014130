"""30 steps (6 in a rehearsal), and the same from a checkpoint in the middle: the losses are equal."""

from __future__ import annotations

import shutil
from pathlib import Path

from dual_loop.train_dual_loop import main as train

from acceptance.found import Asked, Found
from acceptance.runs import arguments, difference, losses
from acceptance.worker import release

STEPS, FEW = 30, 6


def run(asked: Asked, found: Found) -> None:
    steps = FEW if asked.is_tiny else STEPS
    options = ["--batch_size", "4", "--mixed_precision", "bf16" if asked.device == "cuda" else "no"]
    options += ["--save_interval", str(steps // 2), "--cfg-options", "train.deterministic=True"]
    straight, resumed = (Path(asked.folder) / name for name in ("straight", "resumed"))
    status = train(arguments(asked, "straight", steps, *options))
    release()
    found.check(f"{steps} steps", status == 0, f"status {status}")
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step_{steps:08d}")
    status = train(arguments(asked, "resumed", steps, "--resume", "auto", *options))
    found.check("resumed in the middle", status == 0, f"status {status}")
    whole, second = losses(asked, "straight"), losses(asked, "resumed")
    for step in (steps // 2 + 1, steps):
        found.row("resume", step=step, straight=whole[step]["loss"], resumed=second[step]["loss"])
    worst = max(difference(second[step], whole[step]) for step in range(steps // 2 + 1, steps + 1))
    found.check("losses after resume are equal", worst == 0, f"largest relative difference {worst:.1e}")

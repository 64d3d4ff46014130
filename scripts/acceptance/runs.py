"""Short training runs on generated data through the training entry, and what they logged."""

from __future__ import annotations

import json
from pathlib import Path

from dual_loop.testing.demo_data import write_demo_data

from acceptance.found import Asked


def arguments(asked: Asked, run: str, steps: int, *more: str) -> list[str]:
    """Return the flags of a run of the tiny model in the section's folder; its data is written once."""
    data = Path(asked.folder) / "data"
    if not data.is_dir():
        write_demo_data(data, 16, num_val=1)
    sources = [
        f"--{name}_dir={data / folder}" for name, folder in (("sa1b", "sa1b"), ("refcoco", "ref_seg"), ("sav", "sav"))
    ]
    return [
        *("--config", "tiny_demo", "--output_dir", str(Path(asked.folder) / run), *sources, "--device", asked.device),
        *("--max_steps", str(steps), "--log_interval", "1", "--num_workers", "0", *more),
    ]


def losses(asked: Asked, run: str) -> dict[int, dict[str, float]]:
    """Return what a run logged of each step: losses and gradient norm."""
    lines = (Path(asked.folder) / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    names = ("loss", "mask_loss", "dice_loss", "llm_loss", "grad_norm")
    return {record["step"]: {name: record[name] for name in names} for record in map(json.loads, lines)}


def difference(first: dict[str, float], second: dict[str, float]) -> float:
    """Return the largest difference of a step's numbers, relative to the second's."""
    return max(abs(first[name] - value) / max(abs(value), 1e-8) for name, value in second.items())

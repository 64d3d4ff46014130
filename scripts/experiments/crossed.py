"""Tables of the results of ``evidence.py``, with intervals over data seeds and held-out images at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = {"iou": "gIoU", "picks": "right object", "cycle": "cycle", "independent": "independent", "exact": "exact"}
BASELINES = {
    "core": "captioned",
    "rewards": "plain",
    "composition": "start",
    "scaling": "150x20_450",
    "codes": "gates_150",
    "tuning": "loop_0.0004",
}
RESAMPLES = 4000


def sums_by_image(result: Mapping[str, Any], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and number of a column's values in every held-out image: 2 x (images,), in per cent."""
    regions = result["regions"]
    images, values = np.array(regions["image"]), np.array(regions[column], dtype=float)
    scale = 100.0 if column in ("picks", "exact") else 0.1
    return np.bincount(images, values * scale), np.bincount(images).astype(float)


def crossed_interval(numerators: np.ndarray, counts: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean and its 95 % interval: seeds and images are drawn anew, each by itself (Owen 2007).

    Args:
        numerators: (seeds, images), sums of the regions' values. counts: the same shape, how many these are.
    """
    rng = np.random.default_rng(seed)
    num_seeds, num_images = numerators.shape
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), RESAMPLES).astype(float)
    images = rng.multinomial(num_images, np.full(num_images, 1 / num_images), RESAMPLES).astype(float)
    drawn = ((seeds @ numerators) * images).sum(1) / ((seeds @ counts) * images).sum(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(numerators.sum() / counts.sum()), float(low), float(high)


def read_arms(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the results of a table by arm and seed; a result with groups of regions counts as an arm for each."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        groups = result.get("groups", {})
        for name, columns in groups.items() if groups else [("", result["regions"])]:
            arm = f"{result['arm']}, {name}" if name else result["arm"]
            arms.setdefault(arm, {})[int(path.stem.rsplit("_s", 1)[1])] = {**result, "regions": columns}
    return arms


def markdown(results: Path, tables: Sequence[str]) -> str:
    """Return the tables: means in per cent with crossed intervals; differences from the baseline on shared seeds."""
    parts = []
    for table in tables:
        arms = read_arms(results / table)
        if not arms:
            continue
        first = next(iter(next(iter(arms.values())).values()))
        columns = [name for name in COLUMNS if name in first["regions"]]
        titles = " | ".join(COLUMNS[name] for name in columns)
        lines = [f"| arm | seeds | {titles} | gIoU minus `{BASELINES.get(table, '')}` |"]
        lines.append("| --- | --- |" + " --- |" * (len(columns) + 1))
        for arm, own in arms.items():
            base = BASELINES.get(table, "") + (f", {arm.split(', ')[1]}" if ", " in arm else "")
            cells = [_cell(list(own.values()), name) for name in columns if name in next(iter(own.values()))["regions"]]
            shared = sorted(set(own) & set(arms.get(base, {})))
            cells.append(_difference([own[s] for s in shared], [arms[base][s] for s in shared]) if shared else "-")
            lines.append(f"| {arm} | {len(own)} | {' | '.join(cells)} |")
        commits = sorted({str(run["commit"])[:7] for own in arms.values() for run in own.values()})
        parts.append(f"## {table}\n\ncommits {', '.join(commits)}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _cell(results: Sequence[Mapping[str, Any]], column: str) -> str:
    pairs = [sums_by_image(result, column) for result in results]
    mean, low, high = crossed_interval(np.stack([own for own, _ in pairs]), np.stack([count for _, count in pairs]))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _difference(own: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> str:
    pairs = [(sums_by_image(a, "iou"), sums_by_image(b, "iou")) for a, b in zip(own, base, strict=True)]
    differences = np.stack([a - b for (a, _), (b, _) in pairs])
    mean, low, high = crossed_interval(differences, np.stack([count for (_, count), _ in pairs]))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"

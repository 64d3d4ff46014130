"""Tables of the results of ``evidence.py``, with intervals over data seeds and held-out images at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments.plans import TABLES

COLUMNS = {"iou": "gIoU", "picks": "right object", "cycle": "cycle", "independent": "independent", "exact": "exact"}
START = "starting weights"
DIFFERENCES = {
    "core": (
        ("captioned", START), ("loop", START), ("loop", "captioned"), ("loop", "constant"), ("loop", "start"),
        ("true", "loop"), ("true_1050", "true"), ("loop_1050", "loop"), ("loop_1050", "captioned_1050"),
        ("loop_everything", "loop"), ("loop_everything_1050", "captioned_1050"), ("true_1050", "loop_1050"),
        ("loop", "loop_nearest"), ("true", "true_nearest"),
        ("true_1050", "true_1050_nearest"),
    ),
    "rewards": (
        ("unsupervised", START), ("unsupervised", "plain"), ("kl", "plain"), ("grpo_own", "plain"),
        ("grpo_own", "unsupervised"), ("grpo_independent", "unsupervised"), ("grpo_independent", "grpo_own"),
    ),
    "composition": tuple(
        (f"{arm}, {group}", f"{other}, {group}")
        for group in ("named pairs", "unnamed pairs", "shape", "negation", "relation")
        for arm, other in (("captioned", "start"), ("loop", "start"), ("loop", "captioned"), ("loop_no_target", "loop"))
    ),
    "scaling": (
        ("450x60_450", "150x60_450"), ("1800x60_450", "450x60_450"), ("1800x300_450", "1800x20_450"),
        ("150x300_450", "150x20_450"), ("150x20_1050", "150x20_450"), ("1800x300_1050", "1800x300_450"),
    ),
    "codes": (
        ("gates_900", "gates_150"), ("no_gates_900", "no_gates_150"), ("no_gates_900", "gates_900"),
    ),
}  # fmt: skip
"""Of each table, whose figures are subtracted from whose, on the seeds that both have."""
RESAMPLES = 4000


def sums_by_image(result: Mapping[str, Any], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and number of a column's values in every held-out image: 2 x (images,), in per cent."""
    regions = result["regions"]
    images, values = np.array(regions["image"]), np.array(regions[column], dtype=float)
    scale = 100.0 if column in ("picks", "exact") else 0.1
    return np.bincount(images, values * scale), np.bincount(images).astype(float)


@cache
def _draws(num_seeds: int, num_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how often each seed (draws, seeds) and each image (draws, images) is drawn."""
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), RESAMPLES).astype(float)
    return seeds, rng.multinomial(num_images, np.full(num_images, 1 / num_images), RESAMPLES).astype(float)


def crossed_interval(numerators: np.ndarray, counts: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean and its 95 % interval: seeds and images are drawn anew, each by itself (Owen 2007).

    Args:
        numerators: (seeds, images), sums of the regions' values. counts: the same shape, how many these are.
    """
    seeds, images = _draws(*numerators.shape, seed)
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
    """Return the tables: means in per cent with crossed intervals, and differences on shared seeds."""
    start = json.loads((results / "start.json").read_text(encoding="utf-8"))
    parts = []
    for table, planned in ((name, {run.arm: None for run in TABLES[name]()}) for name in tables):
        arms = read_arms(results / table)
        if not arms:
            continue
        seeds = sorted({seed for own in arms.values() for seed in own})
        places = {name: place for place, name in enumerate(planned)}
        names = sorted(arms, key=lambda name: (places[name.split(", ")[0]], name))
        rows = {f"| {name} | {len(arms[name])}": [[run] for run in arms[name].values()] for name in names}
        if table not in ("tuning", "composition"):  # measured on other scenes, from another start
            rows = {f"| {START} | -": [[start]], **rows}
            arms[START] = dict.fromkeys(seeds, start)
        commits = sorted({str(run["commit"])[:7] for own in arms.values() for run in own.values() if "commit" in run})
        parts += [f"## {table}", f"commits {', '.join(commits)}", _rows("arm | seeds", rows)]
        pairs = [(a, b, sorted(set(arms.get(a, ())) & set(arms.get(b, ())))) for a, b in DIFFERENCES.get(table, ())]
        rows = {f"| {a} - {b} | {len(both)}": [[arms[a][s], arms[b][s]] for s in both] for a, b, both in pairs if both}
        if rows:
            parts.append(_rows("difference | seeds", rows))
    return "\n\n".join(parts)


def _rows(title: str, rows: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> str:
    """Return a table. A row is one result a seed, or two, whose difference is meant."""
    columns = [c for c in COLUMNS if any(c in result["regions"] for own in rows.values() for result in own[0])]
    lines = [f"| {title} | {' | '.join(COLUMNS[name] for name in columns)} |", "| --- " * (2 + len(columns)) + "|"]
    lines += [" | ".join([head, *(_cell(own, name) for name in columns)]) + " |" for head, own in rows.items()]
    return "\n".join(lines)


def _cell(results: Sequence[Sequence[Mapping[str, Any]]], column: str) -> str:
    if not all(column in result["regions"] for own in results for result in own):
        return "-"
    found = [[sums_by_image(result, column) for result in own] for own in results]
    counts = np.stack([own[0][1] for own in found])
    sums = np.stack([own[0][0] - sum(other for other, _ in own[1:]) for own in found])
    mean, low, high = crossed_interval(sums, counts)
    sign = "+" if len(results[0]) > 1 else ""
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"

"""The table of the label-scarce experiment, from the summaries of its runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.arms import ARMS

FIGURES = ("gIoU", "cIoU", "cycle_gIoU", "cycle_gIoU_frozen", "caption_exact", "uniqueness", "caption_words")
HEADS = ("gIoU", "cIoU", "cycle own", "cycle frozen", "exact", "unique", "words")

# Two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Run:
    """One run of an arm: ``summary`` is None where it failed or was not run to its end."""

    arm: str
    seed: int
    summary: Mapping[str, Any] | None


def read_runs(out: Path, arms: Sequence[str], seeds: Mapping[str, Sequence[int]]) -> list[Run]:
    """Read the runs of ``arms`` below ``out``."""
    runs = []
    for arm in arms:
        for seed in seeds[arm]:
            path = out / f"{arm}_s{seed}" / "summary.json"
            summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            runs.append(Run(arm, seed, summary if summary and "after" in summary else None))
    return runs


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half of its 95 % interval by Student's t; None for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, T_QUANTILES[len(values) - 2] * math.sqrt(variance / len(values))


def rows_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return one row an arm: means, half intervals, flags, seconds, and the share of the gap from A to Z."""
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    rows = [_row(arm, members) for arm, members in by_arm.items()]
    ends = {row["arm"]: row["gIoU"][0] for row in rows if row["arm"] in "AZ" and row["gIoU"] is not None}
    for row in rows:
        has_gap = len(ends) == 2 and row["gIoU"] is not None and ends["Z"] != ends["A"]
        row["gap"] = (row["gIoU"][0] - ends["A"]) / (ends["Z"] - ends["A"]) if has_gap else None
    return rows


def _row(arm: str, members: Sequence[Run]) -> dict[str, Any]:
    done = [run.summary for run in members if run.summary is not None]
    row: dict[str, Any] = {
        "arm": arm,
        "seeds": [run.seed for run in members if run.summary is not None],
        "failed": [run.seed for run in members if run.summary is None],
        "steps": sorted({summary["steps"] for summary in done}),
        "seconds": mean_and_interval([summary["seconds"] for summary in done])[0] if done else None,
        "flags": sorted({flag.split(":")[0] for summary in done for flag in summary.get("flags", ())}),
    }
    for name in FIGURES:
        values = [summary["after"][name] for summary in done if summary["after"][name] is not None]
        row[name] = mean_and_interval(values) if values else None
    return row


def markdown(rows: Sequence[Mapping[str, Any]], start: Mapping[str, float] | None) -> str:
    """Return the table: figures in per cent (but words), mean and 95 % interval over seeds where there are several."""
    head = ["arm", "what", "seeds", *HEADS, "gap closed", "seconds", "flags"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    if start is not None:
        cells = [_cell((start[name], None), name) for name in FIGURES]
        lines.append("| - | start | - | " + " | ".join(cells) + " | - | 0 | - |")
    for row in rows:
        cells = [row["arm"], ARMS[row["arm"]].description, str(len(row["seeds"]))]
        cells += [_cell(row[name], name) for name in FIGURES]
        cells.append("-" if row["gap"] is None else f"{row['gap']:.0%}")
        cells.append("-" if row["seconds"] is None else f"{row['seconds']:.0f}")
        failed = [f"FAILED: seed {seed}" for seed in row["failed"]]
        cells.append(", ".join([*failed, *row["flags"]]) or "none")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: tuple[float, float | None] | None, name: str) -> str:
    if value is None or value[0] is None:
        return "-"
    scale = 1.0 if name == "caption_words" else 100.0
    mean, half = value
    return f"{scale * mean:.1f}" + ("" if half is None else f" ± {scale * half:.1f}")

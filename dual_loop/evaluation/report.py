"""One page that tells what a run was and what came of it, made from the run folder alone.

Reads ``config.json``, ``versions.json``, ``metrics.jsonl``, ``summary.json``, ``panels/`` and what ``dual-loop
evaluate`` left; whatever is missing is left out and said so. With several runs, curves and figures stand side by side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dual_loop.drawing import data_uri
from dual_loop.errors import CheckpointError, explain
from dual_loop.html import Figure, Page, line_chart

LOSSES = ("loss", "mask_loss", "dice_loss", "llm_loss")
CHARTS: Mapping[str, tuple[str, ...]] = {
    "Losses": LOSSES,
    "IoU in training": ("cycle_iou", "reference_iou", "uniqueness"),
    "Who understands the captions": ("own_cycle_iou", "frozen_cycle_iou"),
    "Divergence from the start (KL, nats a token)": ("kl",),
    "Language": ("distinct_1", "distinct_2"),
    "[SEG] when it is not forced": ("seg_probability", "seg_emitted"),
    "Words of a caption": ("caption_words",),
    "Groups with equal rewards": ("zero_variance",),
    "Gradient norm before clipping": ("grad_norm",),
    "Learning rate": ("lr",),
    "Seconds a step": ("seconds/total", "seconds/rollout", "seconds/forward", "seconds/backward", "seconds/data"),
}
MAX_POINTS = 400
MAX_PANELS = 12
FIGURE_NAMES = {
    "gIoU": "gIoU, true captions",
    "cIoU": "cIoU, true captions",
    "cycle_gIoU": "cycle gIoU, own listener",
    "cycle_gIoU_frozen": "cycle gIoU, frozen listener",
    "caption_exact": "captions exactly right",
    "uniqueness": "uniqueness",
    "caption_words": "words of a caption",
    "vocabulary": "words in use",
}


@dataclass
class RunRecord:
    """What a run folder holds; empty where a file is missing.

    Attributes:
        path: the folder.
        config, versions, summary, evaluation: the JSON files.
        metrics: the records of ``metrics.jsonl``.
        missing: names of files that are not there.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name


def read_run(path: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        CheckpointError: it is none, or a file of it is damaged.
    """
    if not (path / "config.json").is_file():
        fix = "give the folder that --output_dir named"
        raise CheckpointError(explain("not a run folder", str(path), "no config.json", fix=fix))
    run = RunRecord(path)
    for attribute, name in (
        *(("config", "config.json"), ("versions", "versions.json"), ("summary", "summary.json")),
        ("evaluation", "evaluation/evaluation.json"),
    ):
        file = path / name
        if file.is_file():
            setattr(run, attribute, _read_json(file))
        elif attribute != "evaluation":
            run.missing.append(name)
    lines = path / "metrics.jsonl"
    if lines.is_file():
        run.metrics = _read_lines(lines)
    else:
        run.missing.append("metrics.jsonl")
    return run


def report_page(runs: Sequence[RunRecord]) -> str:
    """Return the page of one run, or of several compared; the first one is the subject."""
    first = runs[0]
    title = f"Run {first.name}" if len(runs) == 1 else f"Run {first.name} against {', '.join(r.name for r in runs[1:])}"
    page = Page(title, _lead(first))
    _headline(page, first)
    for flag in first.summary.get("flags", []):
        page.text(f"Flag: {flag}", "bad")
    if first.missing:
        page.text(f"Not there: {', '.join(first.missing)}; the run may still be going on.", "bad")
    _figures(page, runs)
    _curves(page, runs)
    _panels(page, first)
    _evaluation(page, first)
    _counters(page, runs)
    _what_was_run(page, runs)
    return page.html()


def _lead(run: RunRecord) -> str:
    commit = run.versions.get("git_commit") or "unknown commit"
    device = f"{run.versions.get('device', '?')} x {run.versions.get('world_size', '?')}"
    return f"{run.path}, commit {str(commit)[:12]}, {device}, Python {run.versions.get('python', '?')}"


def _headline(page: Page, run: RunRecord) -> None:
    summary = run.summary
    if not summary:
        return
    tiles = {"optimiser steps": f"{summary.get('steps', 0):,}", "seconds": f"{summary.get('seconds', 0):,.0f}"}
    gain = summary.get("gain", {}).get("gIoU")
    if gain:
        numbers = [100 * gain[key] for key in ("mean", "ci95_low", "ci95_high")]
        tiles["gain in gIoU (95 % interval)"] = f"{numbers[0]:+.1f} ({numbers[1]:.1f} to {numbers[2]:.1f})"
    tiles["peak memory"] = f"{summary.get('peak_memory_mb', 0) / 1024:.1f} GiB"
    tiles["bad samples"] = f"{summary.get('counters', {}).get('data/bad_samples', 0):,}"
    page.tiles(tiles)


def _figures(page: Page, runs: Sequence[RunRecord]) -> None:
    measured = [run for run in runs if "after" in run.summary or "before" in run.summary]
    if not measured:
        return
    page.heading("Held-out figures", "before and after training; per cent, but for words")
    head = ["figure"] + [f"{run.name}, {when}" for run in measured for when in ("before", "after")]
    rows = []
    for key, text in FIGURE_NAMES.items():
        cells = [_cell(key, run.summary.get(when, {}).get(key)) for run in measured for when in ("before", "after")]
        if any(cell != "-" for cell in cells):
            rows.append([text, *cells])
    page.table(head, rows)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if key in ("caption_words", "vocabulary") else f"{100 * value:.1f}"


def _curves(page: Page, runs: Sequence[RunRecord]) -> None:
    charts = []
    for title, keys in CHARTS.items():
        if len(runs) == 1:
            charts.append(line_chart(title, {key: _series(runs[0].metrics, key) for key in keys}))
        else:  # a chart a key, a line a run
            charts += [line_chart(key, {run.name: _series(run.metrics, key) for run in runs}) for key in keys]
    charts = [chart for chart in charts if chart]
    if charts:
        page.heading("Curves", "over optimiser steps; the last value is in the legend")
        page.charts(charts)


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    points = []
    for record in metrics:
        value: Any = record
        for part in key.split("/"):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            points.append((float(record["step"]), float(value)))
    stride = max(1, len(points) // MAX_POINTS)
    return [*points[:-1:stride], *points[-1:]]


def _panels(page: Page, run: RunRecord) -> None:
    folder = run.path / "panels"
    before = {path.name.removeprefix("before_"): path for path in sorted(folder.glob("before_*.png"))}
    pairs = [(path, folder / f"after_{name}") for name, path in before.items()]
    pairs = [(first, second) for first, second in pairs if second.is_file()][:MAX_PANELS]
    if pairs:
        page.heading(
            "Held-out regions, before and after", "given mask, caption, mask that came back; before, then after"
        )
        for first, second in pairs:
            page.gallery([Figure([_uri(first)], ["before"]), Figure([_uri(second)], ["after"])])
    steps = sorted({path.name.split("_")[1] for path in folder.glob("step_*.png")})
    ends = [steps[0], steps[-1]] if len(steps) > 1 else steps
    for step in ends:
        found = sorted(folder.glob(f"step_{step}_*.png"))[:MAX_PANELS]
        page.heading(f"Training samples at step {int(step)}")
        page.gallery([Figure([_uri(path)], [path.name]) for path in found], is_wide=True)


def _uri(path: Path) -> str:
    with Image.open(path) as picture:
        return data_uri(picture.convert("RGB"))


def _evaluation(page: Page, run: RunRecord) -> None:
    for data, tasks in run.evaluation.get("figures", {}).items():
        page.heading(f"Evaluation of {data}", f"{tasks['regions']} regions, {tasks['images']} images")
        rows = []
        for figures in (value for value in tasks.values() if isinstance(value, Mapping)):
            for name, figure in figures.items():
                if isinstance(figure, Mapping) and "value" in figure:
                    low, high = figure["ci95_low"], figure["ci95_high"]
                    rows.append((name, f"{figure['value']:.3f}", "-" if low is None else f"{low:.3f} to {high:.3f}"))
        page.table(("figure (fractions of 1)", "value", "95 % interval"), rows)
    protocol = run.evaluation.get("protocol")
    if protocol:
        page.text("Protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))


def _counters(page: Page, runs: Sequence[RunRecord]) -> None:
    names = sorted({name for run in runs for name in run.summary.get("counters", {})})
    if names:
        page.heading("Counters", "skipped samples, rejected captions, gates; over all ranks")
        rows = [[name, *(run.summary.get("counters", {}).get(name, "-") for run in runs)] for name in names]
        page.table(["counter", *(run.name for run in runs)], rows)
    sources = sorted({name for run in runs for name in run.summary.get("sources", {})})
    if sources:
        page.subheading("Samples by source")
        rows = [[name, *(run.summary.get("sources", {}).get(name, "-") for run in runs)] for name in sources]
        page.table(["source", *(run.name for run in runs)], rows)


def _what_was_run(page: Page, runs: Sequence[RunRecord]) -> None:
    page.heading("What was run")
    page.table(("run", "command"), [(run.name, " ".join(run.versions.get("command", []))) for run in runs])
    packages = runs[0].versions.get("packages", {})
    if packages:
        page.text(", ".join(f"{name} {version}" for name, version in packages.items()))
    flat = [_flat(run.config) for run in runs]
    keys = sorted({key for one in flat for key in one})
    if len(runs) > 1:
        keys = [key for key in keys if len({str(one.get(key)) for one in flat}) > 1]
        page.subheading("Settings that differ")
    else:
        page.subheading("Settings")
    page.table(["setting", *(run.name for run in runs)], [[key, *(str(one.get(key)) for one in flat)] for key in keys])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(explain("a file of the run cannot be read", str(path), str(error))) from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            records.append(dict(json.loads(line)))
        except ValueError as error:
            if number < len(lines) - 1:  # the last line of a run that goes on may be half written
                where = f"{path}, line {number + 1}"
                raise CheckpointError(explain("a record cannot be read", where, line[:60], "JSON")) from error
    return records

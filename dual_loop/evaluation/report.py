"""One page that tells what a run was and what came of it, made from the run folder alone.

Reads ``config.json``, ``versions.json``, ``metrics.jsonl``, ``summary.json``, ``panels/`` and what ``dual-loop
evaluate`` left; whatever is missing is left out and said so. With several runs, curves and figures stand side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dual_loop.config import Config
from dual_loop.errors import CheckpointError, explain
from dual_loop.evaluation.figures import figure_rows
from dual_loop.html import Figure, Page, line_chart

CHARTS: Mapping[str, tuple[str, ...]] = {
    "Losses": ("loss", "mask_loss", "dice_loss", "llm_loss"),
    "IoU in training": ("cycle_iou", "reference_iou", "uniqueness"),
    "Held-out set": ("evaluation/gIoU", "evaluation/cycle_gIoU"),
    "Who understands the captions": ("own_cycle_iou", "frozen_cycle_iou", "independent_cycle_iou"),
    "Divergence from the start (KL, nats a token)": ("kl",),
    "Language": ("distinct_1", "distinct_2"),
    "[SEG] when it is not forced": ("seg_probability", "seg_emitted"),
    "Words of a caption": ("caption_words",),
    "Groups with equal rewards": ("zero_variance",),
    "Gradient norm before clipping": ("grad_norm",),
    "Learning rate": ("lr",),
    "Seconds a step": ("seconds/total", "seconds/rollout", "seconds/forward", "seconds/backward", "seconds/data"),
}
FILES = ("config.json", "versions.json", "summary.json", "metrics.jsonl", "evaluation/evaluation.json")
MAX_POINTS = 400
MAX_PANELS = 12
FIGURE_NAMES = {
    "gIoU": "gIoU, true captions",
    "cIoU": "cIoU, true captions",
    "cycle_gIoU": "cycle gIoU, own listener",
    "cycle_gIoU_frozen": "cycle gIoU, frozen listener",
    "cycle_gIoU_independent": "cycle gIoU, independent listener",
    "caption_exact": "captions exactly right",
    "uniqueness": "uniqueness",
    "caption_words": "words of a caption",
    "vocabulary": "words in use",
}

Document = Mapping[str, Any]
"""A JSON file of a run."""


@dataclass
class RunRecord:
    """What a run folder holds: its JSON files, empty where they are missing, and the names of those that are."""

    path: Path
    config: Document = field(default_factory=dict)
    versions: Document = field(default_factory=dict)
    summary: Document = field(default_factory=dict)
    evaluation: Document = field(default_factory=dict)
    metrics: list[Document] = field(default_factory=list)
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
    texts = {name: (path / name).read_text(encoding="utf-8") for name in FILES if (path / name).is_file()}
    run = RunRecord(path, missing=[name for name in FILES[:-1] if name not in texts])
    lines = texts.pop("metrics.jsonl", "").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            run.metrics.append(dict(json.loads(line)))
        except ValueError as error:
            if number < len(lines):  # the last line of a run that goes on may be half written
                where = f"{path / 'metrics.jsonl'}, line {number}"
                raise CheckpointError(explain("a record cannot be read", where, line[:60], "JSON")) from error
    for name, text in texts.items():
        try:
            setattr(run, Path(name).stem, dict(json.loads(text)))
        except ValueError as error:
            raise CheckpointError(explain("a file of the run cannot be read", str(path / name), str(error))) from error
    return run


def report_page(runs: Sequence[RunRecord]) -> str:
    """Return the page of one run, or of several compared; the first one is the subject."""
    first = runs[0]
    title = f"Run {first.name}" if len(runs) == 1 else f"Run {first.name} against {', '.join(r.name for r in runs[1:])}"
    commit = str(first.versions.get("git_commit") or "unknown")[:12]
    device = f"{first.versions.get('device', '?')} x {first.versions.get('world_size', '?')}"
    page = Page(title, f"{first.path}, commit {commit}, {device}, Python {first.versions.get('python', '?')}")
    if first.summary:
        _headline(page, first.summary)
    for flag in first.summary.get("flags", []):
        page.text(f"Flag: {flag}", "bad")
    if first.missing:
        page.text(f"Not there: {', '.join(first.missing)}; the run may still be going on.", "bad")
    _figures(page, [run for run in runs if "after" in run.summary or "before" in run.summary])
    _curves(page, runs)
    _panels(page, first.path / "panels")
    _evaluation(page, first.evaluation)
    _counters(page, runs)
    _what_was_run(page, runs)
    return page.html()


def _headline(page: Page, summary: Document) -> None:
    tiles = {"optimiser steps": f"{summary.get('steps', 0):,}", "seconds": f"{summary.get('seconds', 0):,.0f}"}
    if gain := summary.get("gain", {}).get("gIoU"):
        tiles["gain in gIoU (95 % interval)"] = interval(gain)
    tiles["peak memory"] = f"{summary.get('peak_memory_mb', 0) / 1024:.1f} GiB"
    tiles["bad samples"] = f"{summary.get('counters', {}).get('data/bad_samples', 0):,}"
    page.tiles(tiles)


def interval(gain: Mapping[str, float]) -> str:
    """Return a gain and its 95 % interval, in points."""
    mean, low, high = (100 * gain[key] for key in ("mean", "ci95_low", "ci95_high"))
    return f"{mean:+.1f} ({low:.1f} to {high:.1f})"


def held_out_rows(runs: Sequence[RunRecord]) -> Iterator[list[str]]:
    """Yield each figure that was measured: its key, and its value before and after every run."""
    for key in FIGURE_NAMES:
        scale = 1 if key in ("caption_words", "vocabulary") else 100
        values = [run.summary.get(when, {}).get(key) for run in runs for when in ("before", "after")]
        if any(value is not None for value in values):
            yield [key, *("-" if value is None else f"{scale * value:.1f}" for value in values)]


def changed_settings(config: Document) -> list[tuple[str, object, object]]:
    """Return key, value and default of a run's settings that are not the package's default; no sizes of the model."""
    usual = _flat(json.loads(json.dumps(Config().to_dict())))
    own = sorted(_flat(config).items())
    return [(key, value, usual.get(key)) for key, value in own if key.count(".") == 1 and value != usual.get(key)]


def _figures(page: Page, measured: Sequence[RunRecord]) -> None:
    if not measured:
        return
    page.heading("Held-out figures", "before and after training; per cent, but for words")
    rows = [[FIGURE_NAMES[key], *values] for key, *values in held_out_rows(measured)]
    head = ["figure", *(f"{run.name}, {when}" for run in measured for when in ("before", "after"))]
    if len(measured) > 2:  # a line a run
        head, *rows = [list(column) for column in zip(head, *rows, strict=True)]
    page.table(head, rows)


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


def _series(metrics: Sequence[Document], key: str) -> list[tuple[float, float]]:
    points = []
    for record in metrics:
        value: object = record
        for part in key.split("/"):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            points.append((float(record["step"]), float(value)))
    stride = max(1, len(points) // MAX_POINTS)
    return [*points[:-1:stride], *points[-1:]]


def _panels(page: Page, folder: Path) -> None:
    pairs = [(path, path.with_name(path.name.replace("before_", "after_"))) for path in folder.glob("before_*.png")]
    pairs = sorted(pair for pair in pairs if pair[1].is_file())[:MAX_PANELS]
    if pairs:
        page.heading(
            "Held-out regions, before and after", "given mask, mask that came back, and the caption between them"
        )
        for first, second in pairs:
            page.gallery(
                [Figure([Image.open(first)], ["before"]), Figure([Image.open(second)], ["after"])], is_wide=True
            )
    steps = sorted({path.name.split("_")[1] for path in folder.glob("step_*.png")})
    for step in dict.fromkeys((*steps[:1], *steps[-1:])):
        page.heading(f"Training samples at step {int(step)}")
        paths = sorted(folder.glob(f"step_{step}_*.png"))[:MAX_PANELS]
        page.gallery([Figure([Image.open(path)], [path.name]) for path in paths], is_wide=True)


def _evaluation(page: Page, evaluation: Document) -> None:
    for data, tasks in evaluation.get("figures", {}).items():
        page.heading(f"Evaluation of {data}", f"{tasks['regions']} regions, {tasks['images']} images")
        page.table(("figure", "value", "95 % interval"), list(figure_rows(tasks)))
    if "protocol" in evaluation:
        page.text("Protocol: " + ", ".join(f"{key} {value}" for key, value in evaluation["protocol"].items()))


def _counters(page: Page, runs: Sequence[RunRecord]) -> None:
    for part, title, note in (
        ("counters", "Counters", "skipped samples, rejected captions, gates; over all ranks"),
        ("sources", "Samples by source", ""),
    ):
        names = sorted({name for run in runs for name in run.summary.get(part, {})})
        if names:
            page.heading(title, note)
            rows = [[name, *(run.summary.get(part, {}).get(name, "-") for run in runs)] for name in names]
            page.table(["", *(run.name for run in runs)], rows)


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
        page.heading("Settings that differ")
        page.table(["setting", *(run.name for run in runs)], [[k, *(str(one.get(k)) for one in flat)] for k in keys])
        return
    page.heading("Settings", "that are not the package's default; sizes of the model are among the others")
    page.table(("setting", "this run", "default"), changed_settings(runs[0].config))
    page.table(("setting", "this run"), [(key, flat[0][key]) for key in keys], folded=f"all {len(keys)} settings")


def _flat(tree: Document, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in tree.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return found

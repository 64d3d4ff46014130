"""The run folder: everything a run leaves behind, readable without the run.

::

    OUTPUT_DIR/config.json      the resolved configuration
               versions.json    packages, Python, git commit, command line, device
               import_report.json  which weights the run started from: files, layouts, hashes, what was dropped
               metrics.jsonl    one record a logged step
               tensorboard/     the same as curves
               panels/          step_000123_0.png: image, mask, caption, mask'
               checkpoints/     see dual_loop.checkpoint.store
               summary.json     totals and the evaluation before and after
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dual_loop.errors import CheckpointError, ConfigError, EnvironmentProblem, explain

PACKAGES = ("dual-loop", "torch", "transformers", "peft", "accelerate", "mmengine", "numpy", "pillow", "safetensors")
RUN_MARKS = ("metrics.jsonl", "checkpoints")
METRICS_NAME = "metrics.jsonl"


class RunFolder:
    """Writes the run folder; only rank 0 holds one that writes.

    Args:
        path: ``train.output_dir``.
        writes: False on all ranks but 0: every method then does nothing.
    """

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self._tensorboard: Any = None

    def create(self, config: Mapping[str, Any], extra: Mapping[str, Any], resuming: bool) -> None:
        """Make the folder and write ``config.json`` and ``versions.json``.

        Raises:
            ConfigError: the folder holds another run and ``resuming`` is false.
            EnvironmentProblem: it cannot be written.
        """
        if not self.writes:
            return
        check_free(self.path, resuming)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "config.json", config)
            write_json(self.path / "versions.json", {**versions(), **extra})
        except OSError as error:
            fix = "choose another --output_dir"
            raise EnvironmentProblem(
                explain("the run folder cannot be written", str(self.path), str(error), fix=fix)
            ) from error

    def open_logs(self, step: int) -> None:
        """Open the logs after ``step`` steps; records of later steps, which will be done again, are removed."""
        if not self.writes:
            return
        truncate_metrics(self.path / METRICS_NAME, step)
        from torch.utils.tensorboard.writer import SummaryWriter

        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append ``record`` to ``metrics.jsonl`` and write its numbers as curves."""
        if not self.writes:
            return
        with (self.path / METRICS_NAME).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        for name, value in flatten(record).items():
            if name != "step":
                self._tensorboard.add_scalar(name, value, record["step"])

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        if self.writes:
            write_json(self.path / "summary.json", summary)

    def write_import(self, report: Mapping[str, Any]) -> None:
        """Write what the weights were and where they came from, as ``import_report.json``."""
        if self.writes:
            write_json(self.path / "import_report.json", report)

    def write_evaluation(self, name: str, result: Mapping[str, Any]) -> None:
        """Write the measured ``result`` of one evaluation as ``evaluation_<name>.json``."""
        if self.writes:
            write_json(self.path / f"evaluation_{name}.json", result)

    def read_evaluation(self, name: str) -> dict[str, Any] | None:
        """Return what :meth:`write_evaluation` wrote, None where there is nothing."""
        path = self.path / f"evaluation_{name}.json"
        return read_json(path) if path.is_file() else None

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


def check_free(path: Path, resuming: bool) -> None:
    """Raise ConfigError when ``path`` holds a run that would be mixed with a new one."""
    marks = [mark for mark in RUN_MARKS if (path / mark).exists()]
    if marks and not resuming:
        raise ConfigError(
            explain(
                "the run folder already holds a run",
                where=str(path),
                seen=" and ".join(marks),
                fix="go on with it by --resume auto, or choose another --output_dir",
            )
        )


def truncate_metrics(path: Path, step: int) -> None:
    """Keep only the records of ``path`` up to ``step``; the file is replaced in one move.

    A last line that a killed process left unfinished is dropped as well.

    Raises:
        CheckpointError: a line in the middle is no record.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for number, line in enumerate(lines):
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines) - 1:
                raise CheckpointError(
                    explain("a record cannot be read", f"{path}, line {number + 1}", line[:80], "a JSON record")
                ) from error
    _replace(path, "".join(kept))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a nested mapping under names joined by ``/``; None and text are left out."""
    result: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result.update(flatten(value, f"{prefix}{name}/"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            result[prefix + name] = float(value)
    return result


def versions() -> dict[str, Any]:
    """Return package versions, Python, platform, git commit (None outside of a clone) and the command line."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {
        "packages": found,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "git_commit": _git_commit(),
        "command": sys.argv,
    }


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON in one move, so that a reader never sees half a file."""
    _replace(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(explain("a file of the run cannot be read", str(path), str(error))) from error


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

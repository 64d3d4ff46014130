"""The run folder: everything a run leaves behind, readable without the run.

::

    OUTPUT_DIR/config.json      the resolved configuration
               versions.json    packages, Python, git commit, command line, device
               import_report.json  which weights the run started from: files, layouts, hashes, what was dropped
               metrics.jsonl    one record a logged step
               tensorboard/     the same as curves; trackers.json: what other trackers call the run
               panels/          step_000123_0.png: image, mask, caption, mask'
               checkpoints/     see dual_loop.checkpoint.store
               summary.json     totals and the evaluation before and after
               run.lock         who writes here, while it does; see training.run_lock
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

import torch

from dual_loop.checkpoint.manifest import MANIFEST_NAME, read_manifest, write_text
from dual_loop.checkpoint.store import CHECKPOINT_DIR, newest_whole
from dual_loop.data.index_file import replacing
from dual_loop.errors import CheckpointError, ConfigError, explain, shorten, writing
from dual_loop.model.shards import place_like
from dual_loop.training.run_lock import LOCK_NAME

PACKAGES = ("dual-loop", "torch", "transformers", "peft", "accelerate", "mmengine", "numpy", "pillow", "safetensors")
RUN_MARKS = ("metrics.jsonl", "checkpoints")
logger = logging.getLogger(__name__)
LOG_SUFFIXES = (".log", ".out", ".err")
"""What launchers write into the folder before a run does."""


class Versions(TypedDict):
    packages: dict[str, str]
    python: str
    platform: str
    git_commit: str | None
    command: list[str]
    started_in: str


class RunFolder:
    """Writes the run folder; ``writes`` is False on all ranks but 0: every method then does nothing."""

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes

    def create(self, config: Mapping[str, object], extra: Mapping[str, object], resuming: bool) -> None:
        """Make the folder and write ``config.json`` and ``versions.json``.

        Raises:
            ConfigError: the folder holds another run and ``resuming`` is false.
            EnvironmentProblem: it cannot be written.
        """
        if not self.writes:
            return
        check_free(self.path, resuming)
        with writing("the run folder", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.write("config", config)
        self.write("versions", {**versions(), **extra})

    def write(self, name: str, document: Mapping[str, object]) -> None:
        """Write ``<name>.json``: the summary, an evaluation, the import report."""
        if self.writes:
            write_json(self.path / f"{name}.json", document)

    def read(self, name: str) -> dict[str, Any] | None:
        """Return what :meth:`write` wrote, None where there is nothing.

        Raises:
            CheckpointError: it is not JSON.
        """
        path = self.path / f"{name}.json"
        if not path.is_file():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise CheckpointError(explain("a file of the run cannot be read", str(path), str(error))) from error


def foreign_files(path: Path) -> list[str]:
    """Return the names in ``path`` that are no run's, where no run is there; logs and hidden files are left out.

    So is the lock: another rank of the same start may have it.
    """
    if not path.is_dir() or _is_own_config(path / "config.json"):
        return []
    names = sorted(item.name for item in path.iterdir())
    return [name for name in names if not (name == LOCK_NAME or name.startswith(".") or name.endswith(LOG_SUFFIXES))]


def check_free(path: Path, resuming: bool) -> None:
    """Raise ConfigError when ``path`` holds a run that would be mixed with a new one."""
    marks = [mark for mark in RUN_MARKS if (path / mark).exists()]
    if marks and not resuming:
        seen, fix = " and ".join(marks), "go on with it by --resume auto, or choose another --output_dir"
        raise ConfigError(explain("the run folder already holds a run", str(path), seen, fix=fix))


def _is_own_config(path: Path) -> bool:
    """Tell whether a file is the ``config.json`` of a run: groups of settings, and not that of a model."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"data", "loop", "train"} <= content.keys()


def find_checkpoint(resume: str | None, output_dir: str | Path) -> Path | None:
    """Return the checkpoint that ``--resume`` means, verified by its hashes; None for a fresh start.

    Args:
        resume: None, ``"auto"`` (the newest whole one in ``output_dir``, None if no run left anything there), or a path
            of a checkpoint or of a run folder. Newer ones that are passed over are warned about.

    Raises:
        CheckpointError: a path was given, or ``output_dir`` holds records or checkpoints, and none is whole.
    """
    if resume is None:
        return None
    path = Path(output_dir if resume == "auto" else resume)
    if (path / MANIFEST_NAME).is_file():
        read_manifest(path).verify(path)
        return path
    found, passed_over = newest_whole(path)
    if found is None and resume == "auto" and not passed_over and not (path / "metrics.jsonl").exists():
        return None
    reasons = "".join(f"\n  {reason}" for reason in passed_over)
    if found is None:
        what, seen = "no whole checkpoint to resume from", reasons or "no checkpoint"
        expected = "a folder step_* with a manifest, or a run folder that has one"
        fix = "check the path, or start afresh with another --output_dir"
        raise CheckpointError(explain(what, str(path), seen, expected, fix))
    if passed_over:
        logger.warning("%s: taking %s, newer checkpoints are not whole:%s", path, found.name, reasons)
    return found


def is_run(path: Path) -> bool:
    """Tell whether ``path`` is a run folder, or a checkpoint folder inside one.

    Released weights have a config.json of another kind, and no checkpoints beside it.
    """
    around = (path, *path.absolute().parents[:2])
    return any((folder / "config.json").is_file() and (folder / CHECKPOINT_DIR).is_dir() for folder in around)


def find_run(path: Path) -> tuple[Path, Path]:
    """Return (run folder, checkpoint folder) for a run folder or one of its checkpoints.

    Raises:
        CheckpointError: there is no run or no whole checkpoint.
    """
    folder = next((parent for parent in (path, *path.parents[:2]) if (parent / "config.json").is_file()), None)
    if folder is None:
        expected = "a folder that training wrote"
        raise CheckpointError(explain("not a run folder", str(path), "no config.json", expected, "check the path"))
    return folder, cast(Path, find_checkpoint(str(path), folder))


@torch.no_grad()
def fill_parameters(parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy saved tensors into the trainable parameters, or into their averages; names, shapes, dtypes must be the same.

    Raises:
        CheckpointError: they differ; nothing was copied.
    """
    missing, unexpected = sorted(parameters.keys() - tensors), sorted(tensors.keys() - parameters)
    own = {n: (p.shape, p.dtype) for n, p in parameters.items() if n in tensors}
    wrong = [name for name, form in own.items() if (tensors[name].shape, tensors[name].dtype) != form]
    if missing or unexpected or wrong:
        seen = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} of another shape or dtype"
        what, where = "the checkpoint does not fit the trainable parameters", [*missing, *unexpected, *wrong][:5]
        fix = "resume with the model settings of the saved run (model.trainable, --lora_r, --train_embeddings)"
        raise CheckpointError(explain(what, ", ".join(where), seen, f"{len(parameters)} tensors", fix))
    for name, parameter in parameters.items():
        parameter.copy_(place_like(tensors[name], parameter))


def truncate_metrics(path: Path, step: int) -> None:
    """Keep only the records of ``path`` up to ``step``; the file is replaced in one move.

    A last line that a killed process left unfinished, also within a character, is dropped as well.

    Raises:
        CheckpointError: a line in the middle is no record.
    """
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines()
    kept = []
    for number, line in enumerate(lines):
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line.decode() + "\n")
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines) - 1:
                raise CheckpointError(
                    explain("a record cannot be read", f"{path}, line {number + 1}", shorten(line), "a JSON record")
                ) from error
    replace_text(path, "".join(kept))


def versions() -> Versions:
    """Return what runs here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        head = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        commit = head.stdout.strip() if head.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "packages": found,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "git_commit": commit,
        "command": sys.argv,
        "started_in": os.getcwd(),
    }


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON in one move."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one move, so that a reader never sees half of it."""
    with writing(path.name, path, len(text)), replacing(path) as temporary:
        write_text(temporary, text)

"""``dual-loop train``: its flags, and its exit status."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from dual_loop import train_dual_loop
from dual_loop.cli import main as cli
from dual_loop.commands.train import main
from dual_loop.config import Config
from dual_loop.errors import ConfigError, EnvironmentProblem


def test_a_bug_has_status_one_and_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: Any) -> None:
        raise KeyError("inside")

    monkeypatch.setattr(train_dual_loop, "train", fail)
    assert main([]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_users_error_has_status_two_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(config: Any) -> None:
        raise ConfigError("not so")

    monkeypatch.setattr(train_dual_loop, "train", refuse)
    assert main([]) == 2
    assert capsys.readouterr().err.endswith("\nerror: not so\n")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("error", "is_shown"), [(OSError(errno.ENOSPC, "No space left"), False), (KeyError(1), True)])
def test_what_a_thread_could_not_write_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, is_shown: bool
) -> None:
    """TensorBoard's writer is such a thread; the next record that the main thread gives it fails."""

    def write() -> None:
        raise error

    def fail(config: Any) -> None:
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        raise EnvironmentProblem("the curves cannot be written")

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr(train_dual_loop, "train", fail)
    assert main([]) == 2
    text = capsys.readouterr().err
    assert text.count("error: the curves cannot be written") == 1
    assert ("Traceback" in text) == is_shown


def test_flags_reach_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(train_dual_loop, "train", lambda config: seen.append(config))
    monkeypatch.setattr(train_dual_loop, "exit_status", lambda result: 75)
    assert cli(["train", "--config", "tiny_demo", "--max_steps", "3", "--cfg-options", "train.seed=5"]) == 75
    assert (seen[0].train.max_steps, seen[0].train.seed) == (3, 5)


def test_help_shows_the_values_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for name in ("tiny_cpu", "sa2va_4b_24gb"):
        with pytest.raises(SystemExit):
            cli(["train", "--config", name, "--help"])
        texts.append(capsys.readouterr().out)
        assert "usage: dual-loop train [flags]" in texts[-1]
    assert texts[0] != texts[1]


@pytest.mark.slow
def test_training_on_class_names_of_real_coco_files(shared_coco: Path, tmp_path: Path) -> None:
    flags = ["--masks_dir", str(shared_coco / "instances.json"), "--class_captions", "fallback", "--max_steps", "20"]
    flags += ["--batch_size", "2", "--gradient_accumulation_steps", "1", "--num_workers", "0", "--device", "cpu"]
    flags += ["--output_dir", str(tmp_path / "run"), "--cfg-options", f"data.index_dir={tmp_path / 'index'}"]
    assert cli(["train", "--config", "tiny_cpu", *flags]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["steps"], summary["sources"]) == (20, {"masks": 40})
    assert summary["counters"]["data/bad_samples"] == 0
    assert summary["counters"]["data/bad_regions/masks/target_vanished"] > 0

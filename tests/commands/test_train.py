"""``dual-loop train``: its flags, and its exit status."""

from __future__ import annotations

from typing import Any

import pytest

from dual_loop import train_dual_loop
from dual_loop.cli import main as cli
from dual_loop.commands.train import main
from dual_loop.config import Config
from dual_loop.errors import ConfigError


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
    assert capsys.readouterr().err == "error: not so\n"


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

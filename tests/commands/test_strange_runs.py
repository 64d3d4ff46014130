"""A run folder from somebody else: its files are read, never run, and nothing is filled into them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import write_small_run

from dual_loop.cli import main as cli
from dual_loop.config import Config, load_config

COMMANDS = {
    "caption": ["caption", "image.png", "--box", "1,1,9,9", "--checkpoint"],
    "evaluate": ["evaluate"],
    "export": ["export"],
    "serve": ["serve", "--port", "0", "--checkpoint"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_configuration_runs_nothing_and_is_filled_from_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    run = tmp_path / "run"
    write_small_run(run)
    (run / "notes.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setenv("SECRET", "only-mine")
    content = {**Config().to_dict(), "_base_": ["notes.py"]}
    content["train"] = {
        **content["train"],
        "pretrained_pth": "{{$SECRET:x}}/{{ _base_.y }}",
        "learning_rate": "{{$SECRET}}",
    }
    (run / "config.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    arguments = [*COMMANDS[command], str(run), *(["out", "--format", "adapter"] if command == "export" else [])]
    assert cli(arguments) == 2
    shown = capsys.readouterr().err
    assert "only-mine" not in shown
    assert "unknown key '_base_'" in shown
    assert "train.learning_rate: seen '{{$SECRET}}'" in shown
    assert not (tmp_path / "ran").exists()


def test_text_in_braces_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "only-mine")
    (tmp_path / "config.json").write_text(json.dumps({"train": {"pretrained_pth": "{{$SECRET}}"}}))
    assert load_config(tmp_path / "config.json").train.pretrained_pth == "{{$SECRET}}"


@pytest.mark.parametrize("command", ["train", "caption", "evaluate"])
def test_help_says_that_a_python_config_is_run(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        cli([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "RUN: give none that you do not trust" in shown
    assert "--trust_deepspeed_pickles" in shown

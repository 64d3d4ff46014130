"""``dual-loop demo-data``: what it writes and prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from dual_loop.commands.demo_data import main
from dual_loop.testing.demo_data import demo_directories


def test_the_command_writes_and_names_the_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "d"
    assert main([str(out), "--images", "2", "--seed", "4", "--val", "1"]) == 0
    printed = capsys.readouterr().out
    assert "refcoco/val" in printed
    for setting, folder in demo_directories(out).items():
        assert f"--{setting} {folder}" in printed
        assert Path(folder).is_dir()

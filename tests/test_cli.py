"""The command line: light to start, every command reachable, errors with status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dual_loop.cli import COMMANDS, main
from dual_loop.testing.demo_data import demo_directories

LIGHT = """
import sys
from dual_loop.cli import main
try:
    main({arguments!r})
except SystemExit as error:
    assert error.code in (0, None), error.code
heavy = {{"torch", "transformers", "accelerate", "peft", "matplotlib", "gradio"}} & set(sys.modules)
assert not heavy, heavy
"""


HELPS = [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)]
HELPS += [["data", what, "--help"] for what in ("check", "stats", "preview")]


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = LIGHT.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_training_entry_answers_help_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "dual_loop.train_dual_loop", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported  # the list is read the right way
    assert not {"torch", "transformers", "accelerate"} & imported
    assert "--sa1b_dir" in done.stdout


def test_importing_the_package_is_light() -> None:
    code = "import sys, dual_loop; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert command in text


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2
    assert "demo-data" in capsys.readouterr().err


def test_demo_data_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo-data", str(tmp_path / "demo"), "--images", "2", "--sources", "sa1b"]) == 0
    assert len(list((tmp_path / "demo").rglob("*.jpg"))) == 2
    assert "--sa1b_dir" in capsys.readouterr().out
    assert main(["demo-data", str(tmp_path / "all"), "--images", "2", "--seed", "4", "--val", "1"]) == 0
    printed = capsys.readouterr().out
    assert "refcoco/val" in printed
    for setting, folder in demo_directories(tmp_path / "all").items():
        assert f"--{setting} {folder}" in printed
        assert Path(folder).is_dir()


def test_a_users_error_has_status_two_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["demo-data", str(tmp_path), "--images", "2"]) == 2
    assert "\nerror: " in capsys.readouterr().err


def test_a_shell_completes_commands_and_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("shtab", reason="shtab is in the extra completion")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "complete.bash").write_text(script, encoding="utf-8")
    typed = "COMP_WORDS=(dual-loop train --masks_); COMP_CWORD=2"
    ask = f"source complete.bash; {typed}; _shtab_dual_loop; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert {"--masks_dir", "--masks_images"} <= set(done.stdout.split())


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "zsh"]) == 2
    assert "pip install 'dual-loop[completion]'" in capsys.readouterr().err

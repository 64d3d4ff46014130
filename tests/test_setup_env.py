"""``scripts/setup_env.sh`` without a network: pip is a stub that writes down what it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
STUB = """#!/usr/bin/env bash
if [ "$1 $2" = "-m pip" ]; then
  [ "$3" = --version ] && exit 0
  echo "$@" >>"{log}"
  echo "what pip has to say"
  previous=""
  for word in "$@"; do [ "$previous" = --constraint ] && cp "$word" "{log}.constraints"; previous=$word; done
  sleep {seconds}
  exit {status}
fi
exec "{python}" "$@"
"""


@dataclass
class Sandbox:
    """A copy of what the script reads, an active environment with the stub, and a fake torch of a chosen version."""

    root: Path
    torch: str | None = "2.13.0+cpu"
    status: int = 0
    seconds: float = 0
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def env(self) -> Path:
        return self.root / "env"

    @property
    def pip_calls(self) -> list[str]:
        log = self.root / "pip.log"
        return log.read_text(encoding="utf-8").splitlines() if log.is_file() else []

    @property
    def constraints(self) -> str:
        return (self.root / "pip.log.constraints").read_text(encoding="utf-8")

    def prepare(self) -> None:
        """Lay out the sandbox; files that are there already are written anew."""
        checkout = self.root / "checkout"
        (checkout / "scripts").mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / "pyproject.toml", checkout)
        for name in ("setup_env.sh", "constraints.txt"):
            shutil.copy(REPOSITORY / "scripts" / name, checkout / "scripts")
        (self.env / "bin").mkdir(parents=True, exist_ok=True)
        stub = self.env / "bin" / "python"
        text = STUB.format(log=self.root / "pip.log", python=sys.executable, status=self.status, seconds=self.seconds)
        stub.write_text(text, encoding="utf-8")
        stub.chmod(0o755)
        (self.root / "fake" / "torch").mkdir(parents=True, exist_ok=True)
        body = f"__version__ = {self.torch!r}" if self.torch else "raise ImportError('no torch here')"
        (self.root / "fake" / "torch" / "__init__.py").write_text(f"{body}\n", encoding="utf-8")

    def command(self, line: str) -> tuple[list[str], dict[str, str]]:
        inherited = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
        fake = {"VIRTUAL_ENV": str(self.env), "PYTHONPATH": str(self.root / "fake"), "PYTHONDONTWRITEBYTECODE": "1"}
        return ["bash", "-c", line], inherited | fake | self.variables

    def run(self, line: str = 'bash "checkout/scripts/setup_env.sh"') -> subprocess.CompletedProcess[str]:
        words, environment = self.command(line)
        return subprocess.run(words, cwd=self.root, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path)
    made.prepare()
    return made


def test_first_run_installs_and_second_prints_one_line(sandbox: Sandbox) -> None:
    first = sandbox.run()
    assert first.returncode == 0, first.stderr
    assert "keeping torch 2.13.0+cpu" in first.stdout
    (call,) = sandbox.pip_calls
    assert f"--constraint {sandbox.root}/checkout/scripts/constraints.txt" in call
    assert call.endswith(f"--editable {sandbox.root}/checkout")

    second = sandbox.run()
    assert "what pip has to say" not in first.stdout + first.stderr
    assert second.stdout == f"setup_env: ready: {sandbox.env}/bin/python\n"
    assert second.stderr == ""
    assert len(sandbox.pip_calls) == 1


def test_sourcing_exports_python_and_leaves_strict_options_alone(sandbox: Sandbox) -> None:
    (sandbox.root / "elsewhere").mkdir()
    line = (
        "set -euo pipefail; cd elsewhere; before=$(set +o); source ../checkout/scripts/setup_env.sh >/dev/null; "
        'test "$before" = "$(set +o)"; env | grep ^PYTHON=; basename "$PWD"'
    )
    done = sandbox.run(line)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"PYTHON={sandbox.env}/bin/python", "elsewhere"]


def test_extras_add_up_and_do_not_install_twice(sandbox: Sandbox) -> None:
    sandbox.run()
    sandbox.variables["DUAL_LOOP_EXTRAS"] = "dev"
    sandbox.run()
    sandbox.variables["DUAL_LOOP_EXTRAS"] = "parquet"
    sandbox.run()
    assert [call.split("checkout")[-1] for call in sandbox.pip_calls] == ["", "[dev]", "[dev,parquet]"]
    for extras in ("", "dev", "dev, parquet"):
        sandbox.variables["DUAL_LOOP_EXTRAS"] = extras
        sandbox.run()
    assert len(sandbox.pip_calls) == 3


@pytest.mark.parametrize("file", ["pyproject.toml", "scripts/constraints.txt"])
def test_a_changed_requirement_installs_again(sandbox: Sandbox, file: str) -> None:
    sandbox.run()
    with (sandbox.root / "checkout" / file).open("a", encoding="utf-8") as handle:
        handle.write("# changed\n")
    sandbox.run()
    assert len(sandbox.pip_calls) == 2


@pytest.mark.parametrize("torch", [None, "2.5.1"])
def test_torch_that_is_missing_or_too_old_is_installed_first(tmp_path: Path, torch: str | None) -> None:
    sandbox = Sandbox(tmp_path, torch=torch)
    sandbox.prepare()
    done = sandbox.run()
    assert done.returncode == 0, done.stderr
    first, second = sandbox.pip_calls
    assert first.endswith("torch==2.13.0")
    assert "--editable" in second


def test_the_index_is_asked_for_torch_alone(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path, torch=None, variables={"TORCH_INDEX_URL": "file:///wheels"})
    sandbox.prepare()
    sandbox.run()
    first, second = sandbox.pip_calls
    assert "--index-url file:///wheels" in first
    assert "--index-url" not in second


def test_another_torch_in_range_is_kept(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path, torch="2.7.1+cu126")
    sandbox.prepare()
    assert "keeping torch 2.7.1+cu126" in sandbox.run().stdout
    assert len(sandbox.pip_calls) == 1
    lines = sandbox.constraints.splitlines()
    assert [line for line in lines if line.startswith(("torch==", "sympy=="))] == ["torch==2.7.1+cu126"]
    assert any(line.startswith("transformers==") for line in lines)


def test_constraints_can_be_turned_off(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path, torch=None, variables={"DUAL_LOOP_CONSTRAINTS": "none"})
    sandbox.prepare()
    assert sandbox.run().returncode == 0
    assert not any("--constraint" in call for call in sandbox.pip_calls)
    assert sandbox.pip_calls[0].endswith("torch>=2.6")


def test_a_failed_install_is_an_error_and_leaves_no_stamp(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path, status=1)
    sandbox.prepare()
    done = sandbox.run("set -euo pipefail; source checkout/scripts/setup_env.sh; echo went on")
    assert done.returncode == 1
    assert "what pip has to say\n" in done.stderr
    assert "pip could not install the package" in done.stderr
    assert "went on" not in done.stdout
    assert not (sandbox.env / ".dual_loop_stamp").exists()
    sandbox.status = 0
    sandbox.prepare()
    assert sandbox.run().returncode == 0


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not installed, and the script then takes no lock")
def test_two_set_ups_at_once_install_once(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path, seconds=1)
    sandbox.prepare()
    done = sandbox.run("for i in 1 2 3; do bash checkout/scripts/setup_env.sh & done; wait")
    assert done.stdout.count("setup_env: ready") == 3
    assert len(sandbox.pip_calls) == 1


def test_an_old_python_is_named(sandbox: Sandbox) -> None:
    stub = sandbox.env / "bin" / "python"
    stub.write_text(
        '#!/usr/bin/env bash\n[ "$1" = --version ] && echo Python 3.8.10 && exit 0\nexit 1\n', encoding="utf-8"
    )
    done = sandbox.run()
    assert done.returncode == 1
    assert "Python 3.8.10; expected: Python 3.10 or newer" in done.stderr


def test_an_environment_that_is_gone_is_named(sandbox: Sandbox) -> None:
    shutil.rmtree(sandbox.env)
    done = sandbox.run()
    assert done.returncode == 1
    assert "deactivate it" in done.stderr


def test_a_constraints_file_that_is_absent_is_named(sandbox: Sandbox) -> None:
    sandbox.variables["DUAL_LOOP_CONSTRAINTS"] = "nowhere.txt"
    done = sandbox.run()
    assert done.returncode == 1
    assert "no such file: nowhere.txt" in done.stderr
    assert sandbox.pip_calls == []


def test_conda_base_is_not_taken(sandbox: Sandbox) -> None:
    """Everybody's base environment is no place for pins; .venv is made instead (here its Python is the stub)."""
    shutil.copytree(sandbox.env, sandbox.root / "checkout" / ".venv")
    sandbox.variables |= {"VIRTUAL_ENV": "", "CONDA_PREFIX": str(sandbox.env), "CONDA_DEFAULT_ENV": "base"}
    assert f"ready: {sandbox.root}/checkout/.venv/bin/python" in sandbox.run().stdout
    sandbox.variables["CONDA_DEFAULT_ENV"] = "mine"
    assert f"ready: {sandbox.env}/bin/python" in sandbox.run().stdout

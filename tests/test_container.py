"""The Python part of the Dockerfile, without docker: what it copies and runs, in a folder of its own."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()
COPIED = [name for line in LINES if line.startswith("COPY ") for name in line.split()[1:-1]]


def test_what_is_copied_is_sent_to_the_builder() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignore[0] == "*"
    assert [
        name for name in COPIED if not any(fnmatch.fnmatch(name, kept[1:]) for kept in ignore if kept[0] == "!")
    ] == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools builds the package")
def test_the_environment_of_the_image_has_the_command(tmp_path: Path) -> None:
    """Everything is there beforehand but the package, so that no network is needed."""
    image, venv = tmp_path / "image", tmp_path / "venv"
    image.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, image / name)
    [build] = [line.removeprefix("RUN ") for line in LINES if "setup_env.sh" in line]
    [settings] = [line for line in LINES if line.startswith("ENV ")]
    extras = dict(word.split("=", 1) for word in settings.split()[1:])["DUAL_LOOP_EXTRAS"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=120)
    [site] = venv.glob("lib/python*/site-packages")
    # Last on the path, and without the editable package of the environment that runs the tests.
    (site / "tested.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"VIRTUAL_ENV": str(venv), "DUAL_LOOP_EXTRAS": extras, "PATH": f"{venv}/bin:{os.environ['PATH']}"}
    variables |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    build = build.replace("python3 -m venv /venv && ", "")
    done = subprocess.run(
        ["bash", "-c", build], cwd=image, env=variables, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    where = "import dual_loop; print(dual_loop.__file__)"
    for command, seen in (
        ([str(venv / "bin/dual-loop"), "--help"], "serve"),
        ([str(venv / "bin/python"), "-c", where], str(image)),
    ):
        done = subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60, check=True
        )
        assert seen in done.stdout

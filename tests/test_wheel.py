"""The package as a wheel, installed apart from the checkout and used from an empty folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = """
from pathlib import Path
from dual_loop.cli import main

def run(*arguments):
    print("=====", flush=True)
    assert main([*arguments]) == 0

data = ["--sa1b_dir", "demo/sa1b", "--refcoco_dir", "demo/ref_seg", "--device", "cpu"]
steps = ["--max_steps", "2", "--batch_size", "1", "--gradient_accumulation_steps", "1", "--num_workers", "0"]
run("train", "--dry_run", "--config", "sa2va_4b_24gb")
run("demo-data", "demo", "--images", "4")
run("train", *data, *steps, "--output_dir", "run")
image = next(Path("demo/sa1b").rglob("*.jpg"))
run("caption", str(image), "--box", "5,5,60,60", "--checkpoint", "run", "--device", "cpu")
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools builds the wheel"),
]


def started(arguments: list[str], cwd: Path, variables: dict[str, str]) -> str:
    done = subprocess.run(arguments, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_an_installed_package_runs(tmp_path: Path) -> None:
    source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    source.mkdir()
    for name in ("dual_loop", "configs"):  # a copy: building leaves files behind
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    started([*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)], source, plain)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    presets = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py")}
    assert {
        "dual_loop/py.typed",
        "dual_loop/assets/page.html",
        "dual_loop/schemas/summary.json",
        *(f"dual_loop/{name}" for name in presets),
    } <= names
    started([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], empty, plain)

    variables = {**plain, "PYTHONPATH": str(site), "DUAL_LOOP_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    where = started([sys.executable, "-c", "import dual_loop; print(dual_loop.__file__)"], empty, variables)
    assert Path(where.strip()).is_relative_to(site)
    _, dry, _, _, caption = started([sys.executable, "-c", RUN], empty, variables).split("=====\n")
    assert "lora" in dry.lower()
    assert (empty / "run/summary.json").is_file()
    assert '"caption"' in caption
    doctor = ["doctor", "--quick", "--sa1b_dir", "demo/sa1b", "--refcoco_dir", "demo/ref_seg", "--device", "cpu"]
    assert "this run can start" in started([sys.executable, "-m", "dual_loop.cli", *doctor], empty, variables)

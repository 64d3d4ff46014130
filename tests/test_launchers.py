"""The launch scripts, with a stand-in for the environment that writes down what would be started."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = ("PRETRAINED_PTH", "MODEL_PATH", "SAV_DIR", "SA1B_DIR", "OPENIMAGE_DIR", "REFCOCO_DIR")
SETUP = 'echo set-up >> "$CALLS"\nPYTHON=$PWD/python\nexport PYTHON\n'
PYTHON = (
    '#!/usr/bin/env bash\necho "WORLD_SIZE=${WORLD_SIZE:-} $*" >> "$CALLS"\n'
    'if [ "$3" = demo-data ]; then mkdir -p "$4"; touch "$4/demo.json"; fi\n'
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    for name in ("test_dual_loop.sh", "run_dual_loop_full.sh", "scripts/slurm.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "scripts/setup_env.sh").write_text(SETUP)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def _run(
    tree: Path, script: str, *arguments: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    dropped = {*PATHS, "OUTPUT_DIR", "NPROC", "NNODES", "DRY_RUN", "WORLD_SIZE"}
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment.update(variables, CALLS=str(tree / "calls"))
    command = ["bash", str(tree / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False, cwd="/")
    calls = (tree / "calls").read_text().splitlines() if (tree / "calls").exists() else []
    return done, calls


def _existing(tree: Path) -> dict[str, str]:
    for name in PATHS:
        (tree / name).mkdir(exist_ok=True)
    return {name: str(tree / name) for name in PATHS}


def test_full_run_without_paths_lists_them_all_and_starts_nothing(tree: Path) -> None:
    start = time.monotonic()
    done, calls = _run(tree, "run_dual_loop_full.sh", SAV_DIR="/no/such/folder")
    assert time.monotonic() - start < 5
    assert done.returncode == 2
    assert calls == []
    for name in PATHS:
        assert f"  {name}" in done.stderr
    assert "SAV_DIR: no such path: /no/such/folder" in done.stderr


def test_full_run_starts_eight_processes_on_all_data(tree: Path) -> None:
    done, calls = _run(tree, "run_dual_loop_full.sh", "--seed", "7", **_existing(tree))
    assert done.returncode == 0, done.stderr
    assert calls[0] == "set-up"
    assert "--standalone --nproc_per_node 8 -m dual_loop.train_dual_loop --config configs/sa2va_4b_full.py" in calls[1]
    for flag in ("--sav_dir", "--sa1b_dir", "--openimage_dir", "--refcoco_dir", "--pretrained_pth", "--model_path"):
        assert f"{flag} {tree}" in calls[1]
    assert calls[1].endswith("--resume auto --seed 7")


def test_full_run_on_several_machines_meets_at_the_first(tree: Path) -> None:
    paths = _existing(tree)
    _, calls = _run(tree, "run_dual_loop_full.sh", **paths, NNODES="2", NODE_RANK="1", MASTER_ADDR="first")
    assert "--nnodes 2 --node_rank 1 --master_addr first --master_port 29500" in calls[1]
    done, _ = _run(tree, "run_dual_loop_full.sh", **paths, NNODES="2")
    assert done.returncode != 0
    assert "NODE_RANK" in done.stderr


def test_dry_run_tells_the_world_size_and_needs_no_torchrun(tree: Path) -> None:
    done, calls = _run(tree, "run_dual_loop_full.sh", **_existing(tree), DRY_RUN="1")
    assert done.returncode == 0
    assert calls[1] == "WORLD_SIZE=8 -m dual_loop.train_dual_loop --config configs/sa2va_4b_full.py --dry_run"
    assert "Note" not in done.stdout


def test_smoke_run_without_data_says_so_and_uses_the_demo_data(tree: Path) -> None:
    done, calls = _run(tree, "test_dual_loop.sh", NPROC="2")
    assert done.returncode == 0, done.stderr
    assert "No data path is set" in done.stdout.splitlines()[0]
    assert "dual_loop.cli demo-data outputs/demo_data" in calls[1]
    assert "--nproc_per_node 2 -m dual_loop.train_dual_loop --config configs/tiny_demo.py" in calls[2]
    for flag in ("--sav_dir", "--sa1b_dir", "--openimage_dir", "--refcoco_dir", "--eval_dir"):
        assert f"{flag} outputs/demo_data" in calls[2]


def test_a_second_embedded_run_replaces_the_first_and_keeps_the_data(tree: Path) -> None:
    _run(tree, "test_dual_loop.sh")
    (tree / "outputs/test_dual_loop/metrics.jsonl").write_text("{}")
    (tree / "calls").unlink()
    _, calls = _run(tree, "test_dual_loop.sh")
    assert not any("demo-data" in call for call in calls)
    assert not (tree / "outputs/test_dual_loop/metrics.jsonl").exists()


def test_a_folder_of_another_run_is_never_removed(tree: Path) -> None:
    mine = tree / "outputs/test_dual_loop/metrics.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    for _ in range(2):
        _run(tree, "test_dual_loop.sh")
        assert mine.exists()


def test_smoke_run_on_real_data_takes_the_sets_that_are_given(tree: Path) -> None:
    paths = {
        name: path for name, path in _existing(tree).items() if name in ("PRETRAINED_PTH", "MODEL_PATH", "SA1B_DIR")
    }
    done, calls = _run(tree, "test_dual_loop.sh", **paths)
    assert done.returncode == 0, done.stderr
    assert "--nproc_per_node 4" in calls[1]
    assert "--sa1b_max_samples 500 --batch_size 1" in calls[1]
    assert "--sav_dir" not in calls[1]


def test_smoke_run_on_real_data_needs_the_real_model(tree: Path) -> None:
    done, calls = _run(tree, "test_dual_loop.sh", SA1B_DIR="/no/such/folder")
    assert done.returncode == 2
    assert calls == []
    for word in ("PRETRAINED_PTH is not set", "MODEL_PATH is not set", "SA1B_DIR: no such path"):
        assert word in done.stderr


@pytest.mark.parametrize("name", ["test_dual_loop.sh", "run_dual_loop_full.sh", "scripts/slurm.sh"])
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)

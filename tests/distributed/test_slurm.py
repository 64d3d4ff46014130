"""scripts/slurm.sh with the real launcher and trainer: two ranks meet, save when told, and go on when requeued."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dual_loop.model.build import TINY_WEIGHTS
from dual_loop.testing.demo_data import write_demo_data

from end_to_end import BASE, ROOT, environment, records, summary
from slurm_stand_in import job, put_stand_ins
from warm_python import warm_python

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS = 14


def _job_id() -> int:
    """Return a job id whose port (scripts/slurm.sh: 20000 and its last digits) is free, below those that others get."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", port)) != 0:
                return port - 20000


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The launch scripts in a folder of their own, with this environment in place of the one they would make."""
    folder = tmp_path / "tree"
    (folder / "scripts").mkdir(parents=True)
    for name in ("run_dual_loop_full.sh", "scripts/slurm.sh", "scripts/slurm_machine.sh"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "scripts/setup_env.sh").write_text(f"export PYTHON={sys.executable}\n")
    return folder


@pytest.fixture
def variables(tree: Path, tmp_path: Path) -> dict[str, str]:
    demo = tmp_path / "demo"
    write_demo_data(demo, 6, seed=3)
    return {
        **environment(tmp_path),
        **job(tree, _job_id(), "127.0.0.1 127.0.0.1"),
        **{"PATH": put_stand_ins(tmp_path / "bin"), "CALLS": str(tmp_path / "calls"), "PYTHONPATH": str(ROOT)},
        **{"PRETRAINED_PTH": str(TINY_WEIGHTS), "MODEL_PATH": str(TINY_WEIGHTS.parent), "NPROC": "1"},
        **{"SAV_DIR": str(demo / "sav"), "SA1B_DIR": str(demo / "sa1b"), "OPENIMAGE_DIR": str(demo / "openimages")},
        **{"REFCOCO_DIR": str(demo / "ref_seg"), "OUTPUT_DIR": str(tmp_path / "run"), "EFFECTIVE_BATCH": "4"},
        "PYTHON_EXEC": warm_python(),  # of the ranks; the script looks for them among the children of a real launcher
    }


def _start(tree: Path, variables: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    # What is given twice counts as given last, so the tiny model takes the place of the large one.
    further = [*BASE, "--batch_size", "1", "--max_steps", str(STEPS), "--save_interval", "1000"]
    with log.open("wb") as stream:
        return subprocess.Popen(
            ["bash", str(tree / "scripts/slurm.sh"), *further],
            env={**os.environ, **variables},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a job that a failed test left: the tasks have sessions of their own, so srun passes the signal on."""
    if process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        process.wait(timeout=120)


def test_a_job_meets_saves_in_time_is_requeued_and_finishes(
    tree: Path, variables: dict[str, str], tmp_path: Path
) -> None:
    run, calls = tmp_path / "run", tmp_path / "calls"
    first = _start(tree, variables, tmp_path / "first.log")
    try:
        end = time.monotonic() + 240
        while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < 3:
            assert first.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
            assert time.monotonic() < end, (tmp_path / "first.log").read_text()[-3000:]
            time.sleep(0.1)
        first.send_signal(signal.SIGUSR1)
        assert first.wait(timeout=120) == 0, (tmp_path / "first.log").read_text()[-3000:]
    finally:
        _end(first)
    stopped_at = len(records(run))
    assert 3 <= stopped_at < STEPS
    assert f"Stopped by SIGUSR1 after step {stopped_at}" in (tmp_path / "first.log").read_text()
    requeue = f"scontrol requeue {variables['SLURM_JOB_ID']}"
    assert calls.read_text().splitlines().count(requeue) == 1

    second = _start(tree, variables, tmp_path / "second.log")
    assert second.wait(timeout=240) == 0, (tmp_path / "second.log").read_text()[-3000:]
    assert f"step_{stopped_at:08d} at step {stopped_at}" in (tmp_path / "second.log").read_text()
    assert calls.read_text().splitlines().count(requeue) == 1
    assert [(record["step"], record["ranks"]) for record in records(run)] == [(n + 1, 2) for n in range(STEPS)]
    assert (summary(run)["world_size"], summary(run)["effective_batch"]) == (2, 4)
    assert sum(summary(run)["sources"].values()) == 4 * STEPS

"""The launch scripts, with a stand-in for the environment that writes down what would be started."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dual_loop.config import load_config
from dual_loop.data.shares import SourceShare, compute_quotas

from slurm_stand_in import job, put_stand_ins

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("test_dual_loop.sh", "run_dual_loop_full.sh", "scripts/slurm.sh", "scripts/slurm_machine.sh")
PATHS = ("PRETRAINED_PTH", "MODEL_PATH", "SAV_DIR", "SA1B_DIR", "OPENIMAGE_DIR", "REFCOCO_DIR")
SETUP = 'echo set-up >> "$CALLS"\nPYTHON=$PWD/python\nexport PYTHON\n'
PYTHON = (
    '#!/usr/bin/env bash\necho "WORLD_SIZE=${WORLD_SIZE:-} $*" >> "$CALLS"\n'
    'echo "own store: ${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-0}"\n'
    'if [ "$3" = demo-data ]; then mkdir -p "$4"; touch "$4/demo.json"; fi\n'
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "scripts/setup_env.sh").write_text(SETUP)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def _run(
    tree: Path, script: str, *arguments: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    dropped = {*PATHS, "OUTPUT_DIR", "NPROC", "NNODES", "DRY_RUN", "WORLD_SIZE", "EFFECTIVE_BATCH", "BATCH_SIZE"}
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


def test_the_embedded_run_is_one_epoch_of_450_steps() -> None:
    config = load_config(ROOT / "configs/tiny_demo.py")
    sizes = {"sav": 600, "sa1b": 600, "openimage": 600, "refcoco": 100}
    about = {n: (getattr(config.data, f"{n}_repeats"), getattr(config.data, f"{n}_weight")) for n in sizes}
    images = sum(compute_quotas([SourceShare(name, size, *about[name]) for name, size in sizes.items()]))
    per_epoch = -(-images // config.train.batch_size)
    steps = config.train.max_steps or per_epoch * config.train.num_epochs
    assert (steps, -(-steps // per_epoch)) == (450, 1)


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


ELASTIC = {"NNODES": "1:2", "MASTER_ADDR": "first"}


def test_machines_that_come_and_go_meet_at_the_one_that_stays(tree: Path) -> None:
    paths = _existing(tree)
    done, calls = _run(tree, "run_dual_loop_full.sh", "--seed", "7", **paths, **ELASTIC)
    assert done.returncode == 0, done.stderr
    assert "--nnodes 1:2 --rdzv_backend c10d --rdzv_id dual_loop --rdzv_endpoint first:29500" in calls[1]
    assert "--max_restarts 100" in calls[1]
    assert "own store: 1" in done.stdout
    assert "--node_rank" not in calls[1]
    assert calls[1].endswith("--resume auto --batch_size 2 --effective_batch 64 --seed 7")
    done, calls = _run(tree, "run_dual_loop_full.sh", **paths, NNODES="1:2")
    assert done.returncode != 0
    assert "MASTER_ADDR" in done.stderr
    _, calls = _run(tree, "run_dual_loop_full.sh", **paths, NNODES="1:2", DRY_RUN="1")
    assert calls[-1].startswith("WORLD_SIZE=16 ")
    assert calls[-1].endswith("--dry_run --batch_size 2 --effective_batch 64")


def test_every_number_of_machines_must_fit_the_effective_batch(tree: Path) -> None:
    paths, more = _existing(tree), {**ELASTIC, "NNODES": "1:4"}
    done, calls = _run(tree, "run_dual_loop_full.sh", **paths, **more)
    assert done.returncode == 2
    assert calls == []
    assert "EFFECTIVE_BATCH=64 images cannot be shared out evenly on 3 machines" in done.stderr
    assert "3 x NPROC=8 x BATCH_SIZE=2 = 48 at once" in done.stderr
    for fits in ({"EFFECTIVE_BATCH": "192"}, {"EFFECTIVE_BATCH": "96", "BATCH_SIZE": "1"}):
        done, calls = _run(tree, "run_dual_loop_full.sh", **paths, **more, **fits)
        assert done.returncode == 0, done.stderr
        assert f"--effective_batch {fits['EFFECTIVE_BATCH']}" in calls[-1]


@pytest.fixture
def cluster(tree: Path) -> dict[str, str]:
    """Variables of a job of two machines, with stand-ins for SLURM's commands."""
    return {**_existing(tree), **job(tree, 4321), "SLURM_GPUS_ON_NODE": "4", "PATH": put_stand_ins(tree / "bin")}


def test_a_job_starts_one_launcher_a_machine_and_is_not_requeued(tree: Path, cluster: dict[str, str]) -> None:
    done, calls = _run(tree, "scripts/slurm.sh", "--seed", "7", **cluster)
    assert done.returncode == 0, done.stderr
    started = sorted(call for call in calls if "torch.distributed.run" in call)
    for node, call in enumerate(started):
        assert f"--nnodes 2 --node_rank {node} --master_addr one --master_port 24321 --nproc_per_node 4" in call
        assert call.endswith("--effective_batch 64 --seed 7")
    assert len(started) == 2
    assert not any("requeue" in call for call in calls)


def test_a_failed_job_is_not_requeued(tree: Path, cluster: dict[str, str]) -> None:
    (tree / "python").write_text(PYTHON + "exit 2\n")
    done, calls = _run(tree, "scripts/slurm.sh", **cluster)
    assert done.returncode != 0
    assert not any("requeue" in call for call in calls)


# Dies of SIGUSR1 unless it was told to ignore it, as torchrun does; ends as its trainer ends.
LAUNCHER = f"""#!{sys.executable}
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "trainer.py"]).returncode)
"""
TRAINER = """
import os, signal, sys

def say(word):
    with open(os.environ["CALLS"], "a") as calls:
        print(word, file=calls)

def save(number, frame):
    say("saved")
    os._exit(int(os.environ["TRAINER_STATUS"]))

signal.signal(signal.SIGUSR1, save)
say("trains")
while True:
    signal.pause()
"""


@pytest.mark.parametrize(("reach", "trainer_status"), [("tasks", 0), ("all", 0), ("tasks", 1)])
def test_a_job_whose_time_is_up_saves_and_goes_back_into_the_queue(
    tree: Path, cluster: dict[str, str], reach: str, trainer_status: int
) -> None:
    (tree / "python").write_text(LAUNCHER)
    (tree / "trainer.py").write_text(TRAINER)
    calls = tree / "calls"
    more = {"CALLS": str(calls), "REACH": reach, "TRAINER_STATUS": str(trainer_status)}
    command = ["bash", str(tree / "scripts/slurm.sh")]
    with subprocess.Popen(command, env={**os.environ, **cluster, **more}, start_new_session=True) as process:
        try:
            end = time.monotonic() + 60
            while not calls.exists() or calls.read_text().count("trains") < 2:
                assert time.monotonic() < end
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGUSR1)
            assert (process.wait(timeout=60) != 0) == (trainer_status != 0)
        finally:
            process.kill()
    lines = calls.read_text().splitlines()
    assert lines.count("saved") >= 1 if trainer_status else lines.count("saved") == 2
    # What failed would fail again.
    assert lines.count("scontrol requeue 4321") == (trainer_status == 0)


def test_a_launcher_in_a_job_ignores_what_its_workers_heed(tmp_path: Path) -> None:
    """The shell's ``trap '' USR1`` reaches every program it starts; the trainer's own handler replaces it."""
    worker = (
        "import os, signal\nfrom dual_loop.training.stop import StopRequest\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "with StopRequest() as stop:\n    os.kill(os.getpid(), signal.SIGUSR1)\n    print(stop.signal_name)\n"
    )
    command = ["bash", "-c", 'trap \'\' USR1; exec "$0" -c "$1"', sys.executable, worker]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.stdout.strip() == "SIGUSR1", done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)

"""Ranks that differ, hang, fail or are told to stop: all end soon, and say why. Pairs of gloo processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dual_loop.model.build import TINY_WEIGHTS

from end_to_end import BASE, ROOT, environment
from warm_python import warm_python

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

HERE = Path(__file__).parent
TRAIN = ["-m", "dual_loop.train_dual_loop"]
# The process that is started stands for the one that trains, which has a number of its own to stop it by.
TELLING = [
    "-c",
    "import os, sys\n"
    "from dual_loop.train_dual_loop import main\n"
    "print('process', os.getpid(), flush=True)\n"
    "sys.exit(main(sys.argv[1:]))\n",
]
COMMON = [*BASE, "--sa1b_dir", "sa1b", "--batch_size", "1", "--gradient_accumulation_steps", "1"]
DIFFERENT = {
    "train.learning_rate": (["--learning_rate", "5e-4"], "0.001", "0.0005"),
    "train.seed": (["--seed", "7"], "42", "7"),
    "data.sa1b_dir": (["--sa1b_dir", "other"], "sa1b", "other"),
    "train.batch_size": (["--batch_size", "2"], "1", "2"),
    "train.gradient_accumulation_steps": (["--gradient_accumulation_steps", "2"], "1", "2"),
    "loss.mask_weight": (["--cfg-options", "loss.mask_weight=3.0"], "2.0", "3.0"),
    "train.max_steps": (["--max_steps", "3"], "2", "3"),
    "loss.distill_weight": (["--distill_weight", "0.5"], "0.0", "0.5"),
}
"""What rank 1 is given, what differs then, and the values of both."""


@contextmanager
def pair(commands: list[list[str]], folders: list[Path], tmp_path: Path, **more: str) -> Iterator[list[Any]]:
    """Start two ranks as a launcher does, which holds the store; end them with the block."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    launcher = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    own = {**environment(tmp_path), **together, **launcher, "PYTHONPATH": f"{ROOT}:{HERE.parent}", **more}
    processes = []
    for rank, (command, folder) in enumerate(zip(commands, folders, strict=True)):
        with (tmp_path / f"rank_{rank}.log").open("w") as log:
            variables = {**own, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = [warm_python(), *command]
            processes.append(subprocess.Popen(arguments, cwd=folder, env=variables, stdout=log, stderr=log))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def log_of(tmp_path: Path, rank: int) -> str:
    return (tmp_path / f"rank_{rank}.log").read_text()


def number_of(tmp_path: Path, rank: int) -> int:
    """Return the process id of a rank that tells it."""
    found = re.search(r"^process (\d+)$", log_of(tmp_path, rank), re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.fixture(scope="module")
def machines(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders with the same names in them, as two machines have: data, other data, weights."""
    folders = [tmp_path_factory.mktemp("machine") for _ in range(2)]
    for folder in folders:
        for name in ("sa1b", "other"):
            shutil.copytree(demo / "sa1b", folder / name)
        shutil.copy(TINY_WEIGHTS, folder / "weights.safetensors")
    return folders


@pytest.fixture(scope="module")
def answers(machines: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    tmp_path, folders = tmp_path_factory.mktemp("cases"), [str(folder) for folder in machines]
    own = [tmp_path_factory.mktemp("changed") for _ in range(2)]
    for folder, changed in zip(machines, own, strict=True):
        shutil.copytree(folder, changed, dirs_exist_ok=True)
    gone = next(iter((own[1] / "sa1b").rglob("*.json")))
    for path in gone.parent.glob(f"{gone.stem}.*"):
        path.unlink()
    tensors = load_file(own[1] / "weights.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, own[1] / "weights.safetensors")
    cases: dict[str, Any] = {}
    for name, (flags, _, _) in DIFFERENT.items():
        first = [*COMMON, "--max_steps", "2", "--output_dir", str(tmp_path / name)]
        cases[name] = {"arguments": [first, [*first, *flags]], "folders": folders}
    plain = [*COMMON, "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    cases["numpy"] = {"arguments": [plain, plain], "folders": folders, "version": "numpy"}
    weighted = [*plain, "--pretrained_pth", "weights.safetensors"]
    cases["weights"] = {"arguments": [weighted, weighted], "folders": [str(folder) for folder in own]}
    cases["index"] = {"arguments": [plain, plain], "folders": [str(folder) for folder in own]}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [str(HERE / "rank_cases.py"), str(tmp_path / "cases.json")]
    commands = [[*command, str(tmp_path / f"{rank}.json")] for rank in range(2)]
    with pair(commands, machines, tmp_path) as processes:
        status = [process.wait(timeout=150) for process in processes]
    assert status == [0, 0], log_of(tmp_path, 0) + log_of(tmp_path, 1)
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_setting_that_differs_is_named_with_both_values(answers: list[dict[str, Any]], name: str) -> None:
    _, first, second = DIFFERENT[name]
    for answer in answers:
        status, seconds, text = answer[name]
        assert status == 2, text
        assert seconds < 30
        assert re.search(rf"{name}: {re.escape(first)} \(rank 0\) and {re.escape(second)} \(rank 1\)", text), text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("numpy", r"numpy: \S+ \(rank 0\) and 0\.0\.1 \(rank 1\)"),
        ("weights", r"weights in weights\.safetensors: .*hash \w+ \(rank 0\) and .*hash \w+ \(rank 1\)"),
        ("index", r"data sa1b: .*length=6.*\(rank 0\) and .*length=5.*\(rank 1\)"),
    ],
)
def test_what_no_flag_says_differs_too(answers: list[dict[str, Any]], name: str, message: str) -> None:
    for answer in answers:
        status, seconds, text = answer[name]
        assert status == 2, text
        assert seconds < 30
        assert re.search(message, text), text


def test_two_command_lines_that_differ_end_within_half_a_minute(machines: list[Path], tmp_path: Path) -> None:
    arguments = [*TRAIN, *COMMON, "--max_steps", "50", "--output_dir", str(tmp_path / "run")]
    start = time.monotonic()
    with pair([arguments, [*arguments, "--batch_size", "3"]], machines, tmp_path) as processes:
        assert [process.wait(timeout=60) for process in processes] == [2, 2]
    print(f"both ended after {time.monotonic() - start:.1f} s")
    assert time.monotonic() - start < 30
    for rank in range(2):
        assert "train.batch_size: 1 (rank 0) and 3 (rank 1)" in log_of(tmp_path, rank)
    assert not (tmp_path / "run").exists()


@contextmanager
def running(machines: list[Path], tmp_path: Path, timeout: float) -> Iterator[list[Any]]:
    """Two ranks that have taken a few steps."""
    endless = ["--max_steps", "100000", "--output_dir", str(tmp_path / "run"), "--save_interval", "100000"]
    command = [*TELLING, *COMMON, *endless, "--cfg-options", f"train.rank_timeout={timeout}"]
    with pair([command, command], [machines[0]] * 2, tmp_path) as processes:
        metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not metrics.is_file() or metrics.read_text().count("\n") < 2:
            assert time.monotonic() < end, log_of(tmp_path, 0)
            assert all(process.poll() is None for process in processes), log_of(tmp_path, 0) + log_of(tmp_path, 1)
            time.sleep(0.1)
        yield processes


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_hangs_is_named_by_the_other(machines: list[Path], tmp_path: Path, stopped: int) -> None:
    with running(machines, tmp_path, 10) as processes:
        start = time.monotonic()
        os.kill(number_of(tmp_path, stopped), signal.SIGSTOP)
        other = processes[1 - stopped]
        while "a rank hangs" not in log_of(tmp_path, 1 - stopped):
            assert time.monotonic() - start < 10, log_of(tmp_path, 1 - stopped)
            time.sleep(0.05)
        print(f"named after {time.monotonic() - start:.1f} s")
        assert other.wait(timeout=10) == 2
    pattern = rf"rank {stopped} \(host \S+, pid {number_of(tmp_path, stopped)}\), last: step \d+"
    assert re.search(pattern, log_of(tmp_path, 1 - stopped))


def test_a_rank_that_waits_for_another_ends_when_told(machines: list[Path], tmp_path: Path) -> None:
    with running(machines, tmp_path, 600) as processes:
        os.kill(number_of(tmp_path, 1), signal.SIGSTOP)
        time.sleep(1)
        assert processes[0].poll() is None
        start = time.monotonic()
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(timeout=30) == 2
        print(f"ended {time.monotonic() - start:.1f} s after SIGTERM")
        assert time.monotonic() - start < 15
    assert f"rank 1 (host {os.uname().nodename}, pid {number_of(tmp_path, 1)})" in log_of(tmp_path, 0)


def test_a_rank_that_is_killed_ends_the_one_that_waits_for_it(machines: list[Path], tmp_path: Path) -> None:
    with running(machines, tmp_path, 600) as processes:
        os.kill(number_of(tmp_path, 1), signal.SIGKILL)
        start = time.monotonic()
        assert processes[0].wait(timeout=30) == 1
        print(f"ended {time.monotonic() - start:.1f} s after SIGKILL")


def test_a_rank_without_memory_ends_all(machines: list[Path], tmp_path: Path) -> None:
    endless = ["--max_steps", "100000", "--output_dir", str(tmp_path / "run")]
    own = [*TRAIN, *COMMON, *endless]
    code = (
        "import sys, torch\n"
        "from dual_loop.loop.task import DualLoopTask\n"
        "from dual_loop.commands.train import main\n"
        "forward, count = DualLoopTask.forward, []\n"
        "def without_memory(task, rows):\n"
        "    count.append(0)\n"
        "    if len(count) == 3:\n"
        "        print('OUT', flush=True)\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "    return forward(task, rows)\n"
        "DualLoopTask.forward = without_memory\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    with pair([own, ["-c", code, *own[2:]]], [machines[0]] * 2, tmp_path) as processes:
        while "OUT" not in log_of(tmp_path, 1):
            assert processes[1].poll() is None, log_of(tmp_path, 1)
            time.sleep(0.05)
        start = time.monotonic()
        assert [process.wait(timeout=30) for process in processes] == [2, 2]
        print(f"both ended {time.monotonic() - start:.1f} s after memory ran out")
        assert time.monotonic() - start < 10
    for rank in range(2):
        assert "out of memory; where: optimiser step 3" in log_of(tmp_path, rank)
        assert "lower --batch_size" in log_of(tmp_path, rank)
    assert "rank 1 (host" in log_of(tmp_path, 0)

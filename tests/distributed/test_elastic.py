"""Two launchers of one run: one of them leaves, the other goes on alone, the first comes back, both finish."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from dual_loop.testing.demo_data import write_demo_data

from end_to_end import BASE, ROOT, data_flags, environment, parameters, records, summary, train
from warm_python import warm_python

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS, RATE = 40, 1e-4
# Nothing random but the order of the data, so that a straight run gives the same weights up to rounding.
SAME = ["--effective_batch", "2", "--batch_size", "1", "--learning_rate", str(RATE), "--max_steps", str(STEPS)]
# What is started stands for the launcher, which has a number of its own.
LAUNCHER = "import os\nfrom torch.distributed.run import main\nprint('launcher', os.getpid(), flush=True)\nmain()\n"
# A launcher that says nothing for four seconds is taken for lost; torch's own figure is fifteen.
RENDEZVOUS = "last_call_timeout=3,join_timeout=120,keep_alive_interval=1,keep_alive_max_attempt=4"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    write_demo_data(folder, 6, seed=3)
    return folder


@pytest.fixture(scope="module")
def straight(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one rank from its first step to its last."""
    folder = tmp_path_factory.mktemp("straight")
    train([*BASE, *data_flags(demo), *SAME, "--output_dir", str(folder / "run")], folder)
    return folder / "run"


class Machine:
    """One launcher with one worker, in a process group of its own."""

    def __init__(self, tmp_path: Path, name: str, port: int, arguments: list[str]) -> None:
        self.log = tmp_path / f"{name}.log"
        # The rendezvous lives on the machine that stays; the others wait for it to appear.
        is_host = int(name == "stays")
        launcher = [
            *("-c", LAUNCHER, "--nnodes", "1:2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"),
            *("--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test", "--local_addr", "127.0.0.1"),
            *("--rdzv_conf", f"is_host={is_host},{RENDEZVOUS}", "--max_restarts", "5", "--monitor_interval", "0.3"),
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [warm_python(), *launcher, "-m", "dual_loop.train_dual_loop", *arguments],
                cwd=ROOT,
                # The second as the launch script does.
                env={
                    **environment(tmp_path),
                    **{"PYTHON_EXEC": warm_python(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def leave(self, number: signal.Signals) -> None:
        """Send a signal to the launcher; with SIGKILL, to its worker too, as when the machine is switched off."""
        if number == signal.SIGKILL:
            # The worker has a session of its own, so it is found by its parent.
            for own in re.findall(r"^launcher (\d+)$", self.log.read_text(), re.MULTILINE):
                found = subprocess.run(["pgrep", "-P", own], capture_output=True, text=True, check=False)
                for process in (own, *found.stdout.split()):
                    os.kill(int(process), signal.SIGKILL)
            self.process.kill()
        else:
            self.process.send_signal(number)
        self.process.wait(timeout=120)


@contextmanager
def _machines(tmp_path: Path, arguments: list[str]) -> Iterator[Callable[[str], Machine]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[Machine] = []

    def start(name: str) -> Machine:
        started.append(Machine(tmp_path, name, port, arguments))
        return started[-1]

    try:
        yield start
    finally:
        for machine in started:
            if machine.process.poll() is None:
                machine.leave(signal.SIGKILL)


def _wait_for(machine: Machine, is_met: Callable[[], bool], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not is_met():
        assert machine.process.poll() is None, f"ended before {what}: {machine.log.read_text()[-3000:]}"
        assert time.monotonic() < end, f"{what} did not come: {machine.log.read_text()[-3000:]}"
        time.sleep(0.1)


def _phases(out: Path) -> list[tuple[int, int]]:
    """Return ranks and number of steps of each stretch of the run so far, from the run folder's own record."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    ranks = [int(json.loads(line)["ranks"]) for line in lines if line.endswith("\n")]
    return [(ranks, len(list(steps))) for ranks, steps in groupby(ranks)]


def _reached(out: Path, *wanted: tuple[int, int]) -> Callable[[], bool]:
    """Tell whether the stretches of the run so far have the wanted ranks, and the last one as many steps or more."""

    def is_reached() -> bool:
        phases = _phases(out)
        same = [ranks for ranks, _ in phases] == [ranks for ranks, _ in wanted]
        return same and phases[-1][1] >= wanted[-1][1]

    return is_reached


def _same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("loss", "mask_loss", "dice_loss", "llm_loss"):
        assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), (name, one["step"])
    assert one["lr"] == other["lr"]
    assert one["counters"] == other["counters"]


# The machine that is told to leave saves first, and so does the one that is interrupted by its return: nothing else
# saves there. One that is switched off cannot; its last step is done again.
@pytest.mark.parametrize(
    ("number", "save_interval", "lost"), [(signal.SIGKILL, 1, 1), (signal.SIGTERM, 1000, 0)], ids=["killed", "told"]
)
def test_a_run_outlives_a_machine_that_leaves_and_takes_it_back(
    demo: Path, straight: Path, tmp_path: Path, number: signal.Signals, save_interval: int, lost: int
) -> None:
    out = tmp_path / "run"
    saving = ["--save_interval", str(save_interval), "--resume", "auto", "--output_dir", str(out)]
    with _machines(tmp_path, [*BASE, *data_flags(demo), *SAME, *saving]) as start:
        stays, leaves = start("stays"), start("leaves")
        _wait_for(stays, lambda: _phases(out)[-1:] > [(2, 2)], "three steps of two machines")
        leaves.leave(number)
        together = _phases(out)[-1][1]
        _wait_for(stays, lambda: _phases(out)[-1][0] == 1, "a step of one machine")
        back = start("back")
        _wait_for(stays, _reached(out, (2, 0), (1, 0), (2, 3)), "three more steps of two machines")
        for machine in (stays, back):
            assert machine.process.wait(timeout=300) == 0, machine.log.read_text()[-3000:]
    phases = _phases(out)
    assert [ranks for ranks, _ in phases] == [2, 1, 2]
    assert together - lost <= phases[0][1] <= together
    assert [record["step"] for record in records(out)] == list(range(1, STEPS + 1))
    for one, other in zip(records(out), records(straight), strict=True):
        _same(one, other)
    for key in ("steps", "effective_batch", "sources", "counters"):
        assert summary(out)[key] == summary(straight)[key]
    expected = parameters(straight, STEPS)
    for name, value in parameters(out, STEPS).items():
        # Equal bit for bit where it was written: the sum of two gradients has no order. The bounds leave room for other
        # kernels; AdamW turns the rounding of a gradient near zero into a step of either sign.
        difference = (value - expected[name]).abs()
        assert float(difference.max()) <= 2 * RATE, name
        assert float(difference.mean()) <= 1e-2 * RATE, name

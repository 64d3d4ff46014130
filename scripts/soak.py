"""Injects faults at random moments into a training run, resumes it each time, and compares it with a straight run.

    python scripts/soak.py --minutes 20

Every run takes the same steps on generated data with the tiny model. A fault comes at a random moment after the first
checkpoint, each kind once before any comes again; the run is then started again with ``--resume auto``. Parameters,
averages and records have to be those of the straight run, bit for bit. Exits with 1 where anything differs or a fault
did not end as it should.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dual_loop.testing.demo_data import demo_directories, write_demo_data  # noqa: E402

Process = subprocess.Popen[bytes]
SUSPENDED_SECONDS = 3.0
STEP_SECONDS = 0.5
HANG_SECONDS = 300.0
"""A run that takes longer behind a fault hangs."""
COMPARED = ("step", "loss", "grad_norm", "lr", "tokens", "cycle_iou")


def start(work: Path, run: Path, steps: int, *more: str) -> Process:
    """Start the trainer; what it prints goes behind the log of the run."""
    folders = [part for key, path in demo_directories(work / "data").items() for part in (f"--{key}", path)]
    flags = [
        *("--config", "tiny_cpu", *folders, "--output_dir", str(run), "--device", "cpu", "--max_steps", str(steps)),
        *("--batch_size", "1", "--gradient_accumulation_steps", "2", "--num_workers", "1", "--max_new_tokens", "4"),
        *("--log_interval", "1", "--save_interval", "1", "--keep_checkpoints", "4", "--panel_interval", "7", *more),
        *("--cfg-options", f"data.index_dir={work / 'index'}", "loop.temperature=1.0", "train.rank_timeout=20"),
        "loop.max_rejected_fraction=1",
    ]
    command = [sys.executable, "-m", "dual_loop.train_dual_loop", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=work)


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoints/step_*"))


def newest_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoints(run)), default=0)


def result(run: Path) -> tuple[list[str], list[list[object]]]:
    """Return the hashes of the last checkpoint's weights, and the records but for times."""
    last = checkpoints(run)[-1]
    names = ("model.safetensors", "ema.safetensors")
    hashes = [hashlib.sha256((last / name).read_bytes()).hexdigest() for name in names]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return hashes, [[record[key] for key in COMPARED] for record in records]


Statuses = set[int] | None
"""What a process may end with after a fault; None where it ended before the fault could be."""

# ---- faults ----------------------------------------------------------------------------------------------------------


def kill(process: Process, run: Path) -> Statuses:
    process.kill()
    return {-signal.SIGKILL}


def stop(process: Process, run: Path) -> Statuses:
    process.terminate()
    return {0, -signal.SIGTERM}  # the second while it starts


def suspend(process: Process, run: Path) -> Statuses:
    process.send_signal(signal.SIGSTOP)
    time.sleep(SUSPENDED_SECONDS)
    process.send_signal(signal.SIGCONT)
    return stop(process, run)


def full_disk(process: Process, run: Path) -> Statuses:
    """Let no file grow beyond a random size: room for the log, but not for all files of a checkpoint."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (random.choice((200_000, 1_000_000, 4_000_000)), -1))
    return {2}


def corrupt_newest(process: Process, run: Path) -> Statuses:
    if not wait_until(lambda: len(checkpoints(run)) > 1, process):
        return None
    process.kill()
    process.wait()
    path = random.choice([path for path in checkpoints(run)[-1].iterdir() if path.stat().st_size])
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 255
    path.write_bytes(data)
    return {-signal.SIGKILL}


def kill_worker(process: Process, run: Path, number: signal.Signals = signal.SIGKILL) -> Statuses:
    parent = psutil.Process(process.pid)
    if not wait_until(parent.children, process):
        return None
    for child in parent.children():
        with suppress(psutil.NoSuchProcess):
            child.send_signal(number)
    return {2}


def stop_worker(process: Process, run: Path) -> Statuses:
    return kill_worker(process, run, signal.SIGSTOP)


def second_start(process: Process, run: Path) -> Statuses:
    return {0} if start(run.parent, run, 1).wait() == 2 else set()


FAULTS: tuple[Callable[[Process, Path], Statuses], ...] = (
    *(kill, stop, suspend, full_disk, corrupt_newest, kill_worker, stop_worker, second_start),
)


def wait_until(is_so: Callable[[], object], process: Process) -> bool:
    """Wait for something of a running process; False where it ended before."""
    while process.poll() is None:
        if is_so():
            return True
        time.sleep(0.05)
    return False


class Soak:
    """Runs through faults, of which each kind comes once before any comes again; ``wrong`` is what went wrong.

    Args:
        start_seconds: from a start to its first checkpoint.
        end: no fault comes after this time, or after ``most`` faults.
    """

    def __init__(self, work: Path, steps: int, start_seconds: float, end: float, most: float) -> None:
        self.work, self.steps, self.start_seconds, self.end, self.most = work, steps, start_seconds, end, most
        self.table: Counter[str] = Counter({fault.__name__: 0 for fault in FAULTS})
        self.left: list[Callable[[Process, Path], Statuses]] = []
        self.wrong: list[str] = []

    def is_over(self) -> bool:
        return time.monotonic() > self.end or self.table.total() >= self.most

    def wait(self, process: Process, run: Path) -> None:
        """Wait for a random moment: while it starts, which takes longest, or around a step of those that are left."""
        newest, seconds = newest_step(run), self.start_seconds
        if newest == 0 or random.random() < 0.5:
            step, seconds = random.randint(min(newest + 1, self.steps), self.steps), STEP_SECONDS
            wait_until(lambda: newest_step(run) >= step, process)
        with suppress(subprocess.TimeoutExpired):
            process.wait(random.uniform(0, seconds))

    def take(self, run: Path) -> None:
        """Take one run to its end."""
        process = start(self.work, run, self.steps)
        while not self.wrong:
            self.wait(process, run)
            name, expected = "no fault", None
            if process.poll() is None and not self.is_over():
                self.left = self.left or random.sample(FAULTS, len(FAULTS))
                name, expected = self.left[-1].__name__, self.left[-1](process, run)
                if expected is not None:
                    self.left.pop()
                    self.table[name] += 1
            try:
                status = process.wait(HANG_SECONDS)
            except subprocess.TimeoutExpired:
                self.wrong.append(f"{name}: the run hangs")
                break
            if status == 0 and expected != set() and checkpoints(run)[-1].name == f"step_{self.steps:08d}":
                break
            if status not in (expected or set()):
                self.wrong.append(f"{name} ended with {status}, not {expected}")
            process = start(self.work, run, self.steps, "--resume", "auto")
        process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="no fault comes after this time")
    parser.add_argument("--faults", type=int, default=math.inf, help="nor after so many")
    parser.add_argument("--steps", type=int, default=30, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and faults")
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        work = Path(name)
        write_demo_data(work / "data", 4, seed=3)
        started, process = time.monotonic(), start(work, work / "straight", args.steps)
        wait_until(lambda: checkpoints(work / "straight"), process)
        start_seconds = time.monotonic() - started
        if process.wait() != 0:
            print((work / "straight.log").read_text()[-3000:])
            return 1
        wanted, runs = result(work / "straight"), 0
        soak = Soak(work, args.steps, start_seconds, time.monotonic() + 60 * args.minutes, args.faults)
        while not soak.wrong and not soak.is_over():
            runs += 1
            run = work / f"run_{runs}"
            soak.take(run)
            if not soak.wrong and result(run) != wanted:
                soak.wrong.append(f"run {runs} differs from the straight run")
            if soak.wrong:
                print(run.with_suffix(".log").read_text()[-3000:])
    print(f"{runs} runs of {args.steps} steps, {soak.table.total()} faults", *soak.wrong, sep="\n")
    for fault, count in soak.table.items():
        print(f"| {fault} | {count} |")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Injects faults at random moments into a training run, resumes it each time, and compares it with a straight run.

    python scripts/soak.py --minutes 20

Every run takes the same steps on generated data with the tiny model. A fault comes at a random moment after the first
checkpoint; the run is then started again with ``--resume auto``. Parameters, averages and records have to be those of
the straight run, bit for bit. Exits with 1 where anything differs or a fault did not end as it should.
"""

from __future__ import annotations

import argparse
import hashlib
import json
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
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dual_loop.testing.demo_data import demo_directories, write_demo_data  # noqa: E402

Process = subprocess.Popen[bytes]
LONGEST_WAIT = 25.0
"""Seconds from a start, of which a part are imports, or from the first checkpoint, to a fault."""
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


def result(run: Path) -> tuple[list[str], list[list[object]]]:
    """Return the hashes of the last checkpoint's weights, and the records but for times."""
    last = checkpoints(run)[-1]
    names = ("model.safetensors", "ema.safetensors")
    hashes = [hashlib.sha256((last / name).read_bytes()).hexdigest() for name in names]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return hashes, [[record[key] for key in COMPARED] for record in records]


# ---- faults: each gets the process and its run folder, and returns the exit statuses that are right ------------------


def kill(process: Process, run: Path) -> set[int]:
    process.kill()
    return {-signal.SIGKILL}


def stop(process: Process, run: Path) -> set[int]:
    process.terminate()
    return {0, -signal.SIGTERM}  # the second while it starts


def suspend(process: Process, run: Path) -> set[int]:
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    return stop(process, run)


def full_disk(process: Process, run: Path) -> set[int]:
    """Let no file grow beyond a random size: room for the log, but not for all files of a checkpoint."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (random.choice((200_000, 1_000_000, 4_000_000)), -1))
    return {2}


def corrupt_newest(process: Process, run: Path) -> set[int]:
    process.kill()
    process.wait()
    path = random.choice([path for path in checkpoints(run)[-1].iterdir() if path.stat().st_size])
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 255
    path.write_bytes(data)
    return {-signal.SIGKILL}


def kill_worker(process: Process, run: Path) -> set[int]:
    for child in psutil.Process(process.pid).children():
        child.kill()
    return {2}


FAULTS: tuple[Callable[[Process, Path], set[int]], ...] = (
    *(kill, stop, suspend, full_disk, corrupt_newest, kill_worker),
)


def soaked(work: Path, run: Path, steps: int, table: Counter[str], second_start: bool) -> list[str]:
    """Take one run to its end through faults; return what went wrong."""
    wrong: list[str] = []
    process = start(work, run, steps)
    while not wrong:
        while process.poll() is None and not checkpoints(run):
            time.sleep(0.05)
        time.sleep(random.uniform(0, LONGEST_WAIT))
        if second_start and process.poll() is None:
            status = start(work, run, steps).wait()
            table["second start"] += 1
            wrong += [] if status == 2 else [f"a second start ended with {status}"]
            second_start = False
        expected, fault = {0}, random.choice(FAULTS)
        if process.poll() is None:
            expected = fault(process, run)
            table[fault.__name__] += 1
        status = process.wait()
        if status == 0 and checkpoints(run)[-1].name == f"step_{steps:08d}":
            break
        wrong += [] if status in expected else [f"{fault.__name__} ended with {status}, not {expected}"]
        process = start(work, run, steps, "--resume", "auto")
    process.kill()
    process.wait()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="no run begins after this time")
    parser.add_argument("--steps", type=int, default=30, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and faults")
    args = parser.parse_args()
    random.seed(args.seed)
    end, table, wrong, runs = time.monotonic() + 60 * args.minutes, Counter[str](), list[str](), 0
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        work = Path(name)
        write_demo_data(work / "data", 4, seed=3)
        if start(work, work / "straight", args.steps).wait() != 0:
            print((work / "straight.log").read_text()[-3000:])
            return 1
        wanted = result(work / "straight")
        while not wrong and time.monotonic() < end:
            runs += 1
            run = work / f"run_{runs}"
            wrong = soaked(work, run, args.steps, table, second_start=runs % 2 == 1)
            if not wrong and result(run) != wanted:
                wrong = [f"run {runs} differs from the straight run"]
            if wrong:
                print(run.with_suffix(".log").read_text()[-3000:])
    print(f"{runs} runs of {args.steps} steps, {sum(table.values())} faults", *wrong, sep="\n")
    for fault, count in sorted(table.items()):
        print(f"| {fault} | {count} |")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""The same steps in one process, as one rank on NCCL, and as two on gloo that share the GPU."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import torch

from dual_loop.train_dual_loop import main as train

from acceptance.found import Asked, Found
from acceptance.runs import arguments, difference, losses
from acceptance.worker import release

STEPS, TOLERANCE = 3, 1e-4


def run(asked: Asked, found: Found) -> None:
    # TF32 rounds sums of another order of rows away from each other.
    torch.backends.cudnn.allow_tf32 = False
    shared = ["--effective_batch", "8", "--batch_size", "4", "--mixed_precision", "no"]
    status = train(arguments(asked, "alone", STEPS, *shared))
    release()
    found.check("one process", status == 0, f"status {status}")
    expected = losses(asked, "alone")
    if asked.device == "cpu":
        found.note("NCCL needs a GPU: here its rank talks over gloo too.")
    for name, backend, ranks in (("nccl", "nccl" if asked.device == "cuda" else "gloo", 1), ("gloo", "gloo", 2)):
        flags = arguments(asked, name, STEPS, *shared)
        statuses, log = start_ranks(asked, backend, ranks, flags)
        if any(statuses):
            found.check(f"{ranks} on {backend}", False, f"status {statuses}: {log}")
            continue
        seen = losses(asked, name)
        worst = max(difference(seen[step], expected[step]) for step in expected)
        found.row("process groups", backend=backend, ranks=ranks, loss=seen[STEPS]["loss"], difference=worst)
        found.check(f"{ranks} on {backend}: the losses of one process", worst <= TOLERANCE, f"difference {worst:.1e}")


def start_ranks(asked: Asked, backend: str, ranks: int, flags: list[str]) -> tuple[list[int], str]:
    """Run the ranks to their end; return their statuses and the last line of the first that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [Path(asked.folder) / f"{backend}_{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "acceptance.rank",
                backend,
                str(rank),
                str(ranks),
                str(port),
            ]
            processes.append(subprocess.Popen([*command, *flags], stdout=file, stderr=subprocess.STDOUT))
    try:
        statuses = [process.wait(timeout=max(1.0, asked.seconds_left - 5)) for process in processes]
    except subprocess.TimeoutExpired:
        statuses = [process.poll() if process.poll() is not None else -1 for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = next((log for log, status in zip(logs, statuses, strict=True) if status), None)
    return statuses, "" if failed is None else (failed.read_text().strip().splitlines() or ["no output"])[-1]

"""Run commands of the package on the emulated GPU: ``python tests/emulated_gpu/emulated_run.py PLAN.json OUT.json``.

The plan is ``{name: [arguments of dual-loop]}``. The answer is ``{name: {"status", "output", "events", "devices"}}``:
events are ``[[phase, kind, what, place, number], ...]``, where in a training step the phases have the names of the
step's own timer; devices are ``{"cuda:0": tensors made there}``. Of several ranks each leaves its own, ``OUT0.json``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from emulated_build import load_device

load_device()

import torch  # noqa: E402
from emulated_device import EmulatedGpu, active  # noqa: E402

from dual_loop.cli import main as run_command  # noqa: E402
from dual_loop.training.metrics_log import PhaseTimer  # noqa: E402

timed, made = PhaseTimer.end, PhaseTimer.__init__


def counted(timer: PhaseTimer, phase: str) -> None:
    timed(timer, phase)
    active().end(phase)


def started(timer: PhaseTimer, device: torch.device, exact: bool) -> None:
    # Not exact: waiting for the queue to take the time is no part of the step.
    made(timer, device, False)
    active().end("start")


def run(arguments: list[str]) -> dict[str, object]:
    gpu, output = EmulatedGpu(), io.StringIO()
    with gpu, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = run_command(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
        except Exception:
            traceback.print_exc()
            status = 1
    events = [[*event, number] for event, number in gpu.events.most_common()]
    return {"status": status, "output": output.getvalue(), "events": events, "devices": dict(gpu.devices)}


def main(plan: str, out: str) -> None:
    torch.set_num_threads(1)
    PhaseTimer.end, PhaseTimer.__init__ = counted, started  # type: ignore[method-assign]
    results = {name: run(arguments) for name, arguments in json.loads(Path(plan).read_text()).items()}
    answer = Path(out)
    answer.with_stem(answer.stem + os.environ.get("RANK", "")).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])

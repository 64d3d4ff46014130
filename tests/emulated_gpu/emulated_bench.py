"""Build a variant of the benchmark on the emulated GPU and take its steps: ``emulated_bench.py OUT.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from emulated_build import load_device  # noqa: E402

load_device()

import torch  # noqa: E402
from emulated_device import EmulatedGpu  # noqa: E402

from bench.setup import Setting  # noqa: E402
from bench.worker import Variant  # noqa: E402


def main(out: str) -> None:
    torch.set_num_threads(1)
    with EmulatedGpu() as gpu:
        variant = Variant(Setting("tiny", 1, 1, 4, 1, device="cuda"), "default")
        gpu.end("build")
        copies = sum(n for e, n in gpu.events.items() if (e.kind, e.what) == ("pageable copy", "copy to the device"))
        variant.step()
        gpu.end("start")
        step = variant.step()
        gpu.end("step")
        answer = {"copies": copies, "step": step, "counted": variant.step(counted=True), "end": variant.end()}
        answer["waits"] = sum(n for e, n in gpu.events.items() if (e.phase, e.what) == ("step", "cuda.synchronize"))
        answer["devices"] = sorted({p.device.type for p in variant.trainer.task.model.parameters()})
    Path(out).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])

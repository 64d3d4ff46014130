"""One variant in a process of its own: takes a step when a line asks for it, and answers in JSON lines."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dual_loop.accelerate.cpu import PackedLinear
from dual_loop.model.decode import Decoder
from dual_loop.model.prompts import Prompter
from dual_loop.training.stop import StopRequest

from bench.floors import wait
from bench.phases import PhaseClock, ProductCounter, Undo, watch, watch_task
from bench.setup import Setting, build_config, build_trainer

MIB = 2**20


class Variant:
    """A trainer whose steps are timed by phase; :meth:`close` ends what it changed in the package."""

    def __init__(self, setting: Setting, name: str) -> None:
        self.imports_mb = resident_mb()
        self.setting, self.config = setting, build_config(setting, name)
        self.trainer = build_trainer(self.config, setting)
        self.device: torch.device = self.trainer.accelerator.device
        self.clock = PhaseClock(self.is_gpu)
        self.decode_rows: list[int] = []
        self.captions: list[list[int]] = []
        self.windows = self.trainer.open_windows()
        self.undo = self._watch()
        self.trainer.task.train()
        self.stop = StopRequest()

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def step(self, counted: bool = False) -> dict[str, Any]:
        """Take one optimiser step; return seconds, and where it is counted operations, bytes and a GPU's memory."""
        captioner = self.trainer.task.captioner
        self.clock, self.decode_rows, self.captions = PhaseClock(self.is_gpu), [], []
        before = captioner.num_rejected
        wait()
        start = time.perf_counter()
        if counted:
            with ProductCounter() as self.clock.counter:
                self._run()
        else:
            self._run()
        answer: dict[str, Any] = {"seconds": time.perf_counter() - start, "phases": self.clock.seconds}
        answer["calls"], answer["decode_rows"] = self.clock.calls, self.decode_rows
        if counted:
            answer.update(flops=self.clock.flops, bytes=self.clock.bytes, captions=self.captions)
            answer.update(allocated=self.clock.allocated, reserved=self.clock.reserved)
            answer["rejected"] = captioner.num_rejected - before
        return answer

    def _run(self) -> None:
        self.clock.start()
        self.trainer.step(self.windows, self.stop)
        self.clock.stop()

    def end(self) -> dict[str, Any]:
        """Return the most memory so far, MiB: of the GPU where it computes, else resident; and the parameters."""
        model = self.trainer.task.model
        parameters = [*model.parameters()]
        packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
        allocated = max(torch.cuda.max_memory_allocated(), *self.clock.allocated.values()) if self.is_gpu else 0
        return {
            "peak_mb": allocated / MIB if self.is_gpu else resident_mb(),
            "imports_mb": 0.0 if self.is_gpu else self.imports_mb,
            "parameters": sum(p.numel() for p in parameters) + packed,
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
        }

    def close(self) -> None:
        for undo in reversed(self.undo):
            undo()

    def _watch(self) -> list[Undo]:
        def clock() -> PhaseClock:
            return self.clock

        def remembered(*args: Any, **options: Any) -> list[list[int]]:
            written = write(*args, **options)
            self.captions += written
            return written

        write = Decoder.write
        Decoder.write = remembered  # type: ignore[method-assign]
        return [
            partial(setattr, Decoder, "write", write),
            *watch_task(self.trainer.task, clock, lambda rows: self.decode_rows.append(rows)),
            watch(self.windows, "take", clock, "data"),
            watch(self.windows, "start_next", clock, "data"),
            watch(torch.Tensor, "backward", clock, "backward"),
            watch(self.trainer.optimizer, "step", clock, "optimiser"),
            watch(self.trainer.ema, "update", clock, "EMA"),
        ]


def spread_ends(new_tokens: int) -> None:
    """Let the k-th row of every generation end after a share of ``new_tokens``, evenly spread."""

    def ended(_: Prompter, ids: Sequence[int]) -> bool:
        # The first id of a row is different enough from row to row with random weights to spread the ends.
        return len(ids) >= ids[0] * 2654435761 % new_tokens + 1

    Prompter.ends_turn = ended  # type: ignore[method-assign,assignment]


def product_shape(variant: Variant) -> list[Any]:
    """Return rows, width, inner width and dtype of the largest product of this model's step: those of its MLP."""
    text, cells = variant.config.model.text, variant.trainer.data.shape.grid_size**2
    rows = variant.setting.batch * (cells + 64)
    return [rows, text["hidden_size"], text["intermediate_size"], variant.config.model.dtype]


def resident_mb() -> float:
    """Return the most resident memory of this process so far, MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike getrusage, it does not begin with what the starting process had
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB


def main() -> None:
    logging.getLogger("dual_loop").setLevel(logging.ERROR)
    setting_fields, name = json.loads(sys.stdin.readline())
    setting = Setting(**setting_fields)
    if setting.is_spread:
        spread_ends(setting.new_tokens)
    variant = Variant(setting, name)
    commands = {
        "step": variant.step,
        "counted": lambda: variant.step(counted=True),
        "shape": lambda: {"shape": product_shape(variant), "device": str(variant.device)},
        "end": variant.end,
    }
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()

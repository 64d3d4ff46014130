"""Sums over micro-batches and ranks, phase times, and the record of one optimiser step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

PHASES = ("data", "rollout", "forward", "backward", "optimiser")
MAIN_TERMS = ("mask_loss", "dice_loss", "llm_loss")


def add_into(sums: dict[str, float], values: Mapping[str, float], prefix: str = "") -> None:
    """Add ``values`` to ``sums`` key by key; a key that is new starts at 0."""
    for name, value in values.items():
        sums[prefix + name] = sums.get(prefix + name, 0.0) + float(value)


def reduce_sums(accelerator: Accelerator, sums: Mapping[str, float]) -> dict[str, float]:
    """Add ``sums`` over all ranks in one all-reduce of float64 numbers; every rank must give the same keys."""
    if accelerator.num_processes == 1:
        return dict(sums)
    names = sorted(sums)
    values = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(values)
    return dict(zip(names, values.tolist(), strict=True))


class PhaseTimer:
    """Seconds of one optimiser step, by phase.

    Args:
        device: on CUDA the queue is drained at the end of each phase where ``exact`` is set; kernels run later than
            the Python that starts them, and would be counted under the wrong phase.
    """

    def __init__(self, device: torch.device, exact: bool) -> None:
        self.must_wait = exact and device.type == "cuda"
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a ``with`` block to phase ``name``."""
        start = time.perf_counter()
        yield
        if self.must_wait:
            torch.cuda.synchronize()
        self.seconds[name] += time.perf_counter() - start

    def total(self) -> dict[str, float]:
        """Return seconds of all phases and ``total`` since construction, to a tenth of a millisecond."""
        whole = {"total": time.perf_counter() - self.start, **self.seconds}
        return {name: round(value, 4) for name, value in whole.items()}


class CounterLedger:
    """Cumulative counters of the run: metric keys with a slash that are no ratio, such as ``caption/rejected``."""

    def __init__(self, counters: Mapping[str, float] | None = None) -> None:
        self.counters: dict[str, float] = dict(counters or {})

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the counters among ``metrics`` (global sums of one step)."""
        add_into(self.counters, {name: value for name, value in metrics.items() if is_counter(name)})

    def as_dict(self) -> dict[str, int]:
        return {name: round(value) for name, value in sorted(self.counters.items())}


def is_counter(name: str) -> bool:
    """Tell whether a metric is summed over the whole run: it has a slash, and is no half of a ratio."""
    return "/" in name and not name.endswith(("/sum", "/count"))


def ratios_and_values(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Turn ``x/sum`` and ``x/count`` into the ratio ``x`` (None without a count) and keep plain per-step values."""
    result: dict[str, float | None] = {}
    for name, value in metrics.items():
        if name.endswith("/sum"):
            base = name.removesuffix("/sum")
            count = metrics[f"{base}/count"]
            result[base] = value / count if count else None
        elif "/" not in name:
            result[name] = value
    return result


def loss_means(totals: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    """Return each term's weighted average over the optimiser step and all ranks, and their sum as ``loss``."""
    means = {name: total / max(counts[name], 1.0) for name, total in totals.items()}
    return {"loss": sum(means.values()), **means}


def console_line(record: Mapping[str, Any], total_steps: int) -> str:
    """Return the printed line of a logged step: losses first, then where we are and what went wrong so far."""
    names = ("loss", *MAIN_TERMS, *(name for name in record["other_losses"]))
    values = {**record, **record["other_losses"]}
    parts = [f"{name}={values[name]:.3f}" for name in names]
    parts.append(f"step {record['step']}/{total_steps}")
    if record.get("cycle_iou") is not None:
        parts.append(f"cycle_iou={record['cycle_iou']:.3f}")
    shown = {name: value for name, value in record["counters"].items() if value and name.count("/") == 1}
    parts += [f"{name}={value}" for name, value in shown.items()]
    return ", ".join(parts)

"""Captions of many rows at once: milliseconds, kernels and synchronisations a token, eager and as a recorded graph."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dual_loop.data.prepare import batch_from_samples
from dual_loop.loop.captioner import Captioner
from dual_loop.model.build import geometry
from dual_loop.types import Seen

from acceptance.found import Asked, Found
from acceptance.step import real_setting, variant
from bench.floors import best, wait
from bench.setup import generated_samples

REGIONS, SHORT, LONG = 8, 8, 40
KERNELS_SHOWN = 15


class Operators(TorchDispatchMode):
    """Counts operators: what stands in for kernels where there is no GPU."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], object], is_gpu: bool) -> tuple[int, int | None]:
    """Return kernels (operators without a GPU) and synchronisations of the host (None without a GPU) of a run."""
    if not is_gpu:
        with Operators() as operators:
            run()
        return operators.number, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        wait()
    kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return kernels, sum("synchronizing CUDA operation" in str(one.message) for one in seen)


def run(asked: Asked, found: Found) -> None:
    # The emulated GPU runs kernels on the CPU: no profiler sees them.
    is_real = asked.device == "cuda" and torch.version.cuda is not None
    if not is_real:
        found.note(
            "There is no GPU: kernels are operators of torch that are no views, synchronisations are not counted."
        )
    modes = {"eager": {"speed.decode_graph": "off"}, "graph": {"speed.decode_graph": "auto"}}
    short, long = (2, 6) if asked.is_tiny else (SHORT, LONG)
    for mode, changes in modes.items():
        # One image a micro-batch: the model is what is asked for, the rows come from below.
        with variant(real_setting(asked, long, 1, **changes)) as one:
            for rows in (8, 32) if asked.is_tiny else (8, 32, 64, 160):
                with one.trainer.accelerator.autocast():
                    measure(found, one.trainer.task, mode, rows, (short, long), is_real, 1 if asked.is_tiny else 3)


@torch.no_grad()
def measure(
    found: Found, task: Any, mode: str, rows: int, lengths: tuple[int, int], is_real: bool, repeats: int
) -> None:
    """Write captions of two lengths: the difference is that of the tokens, without what comes before the first."""
    config, samples = task.config, generated_samples(rows // REGIONS, REGIONS)
    batch = batch_from_samples(samples, geometry(config)).to(task.model.device)
    seen = Seen(task.model.encode_vision(batch.pixel_values), None)

    def writer(length: int) -> Callable[[], Any]:
        loop = dataclasses.replace(config.loop, max_new_tokens=length, rollout_batch_size=rows)
        return lambda: Captioner(task.model, task.prompter, loop, is_silent=True).write([seen], [batch])

    seconds = [best(writer(length), repeats) for length in lengths]
    tokens = lengths[1] - lengths[0]
    per_token = (seconds[1] - seconds[0]) / tokens
    # Few tokens: a profiler takes its time over tens of thousands of kernels.
    counts = [count(writer(length), is_real) for length in (lengths[0], 2 * lengths[0])]
    kernels, waits = zip(*counts, strict=True)
    found.row(
        "decoding",
        mode=mode,
        rows=rows,
        ms_a_token=1e3 * per_token,
        tokens_a_second=rows / per_token,
        ms_before_the_second=1e3 * (seconds[0] - per_token * (lengths[0] - 1)),
        kernels_a_token=(kernels[1] - kernels[0]) / lengths[0],
        syncs_a_token=(waits[1] - waits[0]) / lengths[0] if is_real else None,
    )
    if rows == 32:
        show_kernels(found, writer(lengths[1]), mode, is_real)


def show_kernels(found: Found, run: Callable[[], object], mode: str, is_real: bool) -> None:
    """Table the kernels (operators without a GPU) that take most of the time."""
    activity = torch.profiler.ProfilerActivity.CUDA if is_real else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        run()
        wait()
    averages, name = profile.key_averages(), "self_device_time_total" if is_real else "self_cpu_time_total"
    chosen = [one for one in averages if one.device_type == torch.autograd.DeviceType.CUDA or not is_real]
    whole = sum(getattr(one, name) for one in chosen) or 1.0
    for one in sorted(chosen, key=lambda one: -getattr(one, name))[:KERNELS_SHOWN]:
        took = getattr(one, name)
        found.row(
            f"time by kernel, 32 rows, {mode}", kernel=one.key[:80], calls=one.count, ms=took / 1e3, share=took / whole
        )

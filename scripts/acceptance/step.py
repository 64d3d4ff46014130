"""A whole optimiser step of the real 4B model with random weights: seconds, operations and memory, by phase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from acceptance.found import Asked, Found
from acceptance.worker import release
from bench.floors import COPY_BYTES, measure_floors
from bench.phases import PHASES
from bench.setup import Setting
from bench.worker import Variant

GIB = 2**30
REAL, TINY = "sa2va_4b_full", "tiny"


def real_setting(asked: Asked, new_tokens: int, accumulation: int = 4, **changes: Any) -> Setting:
    """Return the full run's step on one rank: batch 2, four regions an image; in a rehearsal two of the tiny model.

    ``changes``: dotted keys. The tiny model is bfloat16 here, as the real one is.
    """
    if asked.is_tiny:
        changes = {"model.dtype": "bfloat16", **changes}
        return Setting(TINY, 2, min(accumulation, 2), max(2, new_tokens // 10), 2, device=asked.device, changes=changes)
    return Setting(REAL, 2, accumulation, new_tokens, 4, device=asked.device, changes=changes)


@contextmanager
def variant(setting: Setting, name: str = "default") -> Iterator[Variant]:
    """Give a variant whose memory is given back."""
    release()
    made = Variant(setting, name)
    try:
        yield made
    finally:
        made.close()
        del made
        release()


def product_rate(asked: Asked) -> float:
    """Return floating-point operations a second of a large matrix product, which shares of the peak are of."""
    side, copied = (512, COPY_BYTES // 64) if asked.is_tiny else (8192, COPY_BYTES)
    return measure_floors(side, side, side, torch.bfloat16, asked.device, copied)["flops_per_second"]


def run(asked: Asked, found: Found) -> None:
    peak = product_rate(asked)
    found.note(f"Shares are of a bf16 product in this process: {peak / 1e12:.4g} TFLOP/s.")
    for new_tokens in (40, 128):
        setting = real_setting(asked, new_tokens)
        with variant(setting) as one:
            one.step()
            steps = [one.step() for _ in range(1 if asked.is_tiny else 2)]
            counted, end = one.step(counted=True), one.end()
        if asked.device == "cuda":
            # Nobody counts what a recorded graph does when it is played.
            with variant(real_setting(asked, new_tokens, **{"speed.decode_graph": "off"})) as one:
                counted["flops"] = one.step(counted=True)["flops"]
        report(found, setting, steps, counted, end, peak)


def report(
    found: Found,
    setting: Setting,
    steps: list[dict[str, Any]],
    counted: dict[str, Any],
    end: dict[str, Any],
    peak: float,
) -> None:
    tokens, seconds, flops = (
        setting.new_tokens,
        median(step["seconds"] for step in steps),
        sum(counted["flops"].values()),
    )
    found.row(
        "step",
        new_tokens=tokens,
        images=setting.batch * setting.accumulation,
        captions=len(counted["captions"]),
        seconds=seconds,
        TFLOP=flops / 1e12,
        TFLOP_a_second=flops / 1e12 / seconds,
        share_of_peak=flops / seconds / peak,
        peak_GiB=end["peak_mb"] / 1024,
    )
    for phase in PHASES:
        took = median(step["phases"][phase] for step in steps)
        found.row(
            f"phases, {tokens} tokens",
            phase=phase,
            seconds=took,
            TFLOP=counted["flops"][phase] / 1e12,
            share_of_peak=counted["flops"][phase] / took / peak if took > 1e-5 else None,
            allocated_GiB=counted["allocated"][phase] / GIB or None,
            reserved_GiB=counted["reserved"][phase] / GIB or None,
        )
    lengths = sorted({len(ids) for ids in counted["captions"]})
    whole = lengths == [tokens] and counted["rejected"] == 0
    found.check(f"captions of {tokens} tokens", whole, f"lengths {lengths}, {counted['rejected']} rejected")

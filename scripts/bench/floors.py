"""What this machine can do at most: a matrix product of the step's own shape, and a memory copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from dual_loop.accelerate.cpu import is_slower_in_bfloat16

COPY_BYTES = 2**28


def measure_floors(
    rows: int,
    width: int,
    inner: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    copy_bytes: int = COPY_BYTES,
) -> dict[str, float]:
    """Return ``flops_per_second`` of (rows, width) x (width, inner) and ``bytes_per_second`` read plus written.

    The best of several runs: a floor is what the machine can do. A processor that multiplies float32 faster than
    bfloat16 is measured in float32. Several matrices are used in turn, so that none of them stays in a cache.
    """
    device = torch.device(device)
    is_wide = device.type == "cpu" and dtype == torch.bfloat16 and is_slower_in_bfloat16()
    rate = _product_rate(rows, width, inner, torch.float32 if is_wide else dtype, device)
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return {
        "flops_per_second": rate,
        "bytes_per_second": 2.0 * copy_bytes / best(lambda: target.copy_(source)),
        "rows": float(rows),
        "width": float(width),
        "inner": float(inner),
    }


def _product_rate(rows: int, width: int, inner: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return floating-point operations a second of one product."""
    x = torch.randn(rows, width, dtype=dtype, device=device)
    matrices = [torch.randn(inner, width, dtype=dtype, device=device) for _ in range(6)]

    def products() -> None:
        for matrix in matrices:
            torch.nn.functional.linear(x, matrix)

    return 2.0 * rows * width * inner * len(matrices) / best(products)


def best(run: Callable[[], object], repeats: int = 7) -> float:
    """Return the seconds of the quickest of several runs, after one that is not counted."""
    return min(_seconds(run, repeats))


def typical(run: Callable[[], object], repeats: int = 7) -> float:
    """Return the median seconds of several runs, after one that is not counted."""
    return median(_seconds(run, repeats))


def wait() -> None:
    """Wait until a GPU that was used has done all that it was asked for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _seconds(run: Callable[[], object], repeats: int) -> list[float]:
    run()
    seconds = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds

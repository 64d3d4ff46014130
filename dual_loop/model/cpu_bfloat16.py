"""How this CPU multiplies bfloat16 matrices: the questions that preflight, packing and the SAM 2 encoder ask.

Three kinds are about: CPUs without (torch emulates it, up to a hundred times slower than float32), CPUs whose kernels
are faster than those for float32 (AMX, AMD since Zen 4), and CPUs with ``avx512_bf16`` alone on which many rows take
longer than in float32, while few rows, bound by reading the matrix, take half as long.
"""

from __future__ import annotations

import platform
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

X86 = ("x86_64", "amd64", "i386", "i686")
MARGIN = 1.2
"""How much longer bfloat16 has to take to count as slower: far from both kinds of CPU, so the answer is stable."""
_ROWS, _WIDTH, _REPEATS = 256, 1024, 5


def is_native() -> bool:
    """Tell whether the CPU has instructions for bfloat16."""
    if platform.machine().lower() not in X86:
        return has_kernels()
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def has_kernels() -> bool:
    """Tell whether oneDNN has bfloat16 products for this CPU; on x86 they need AVX-512 or its successor."""
    is_there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    return is_there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def is_slower_than_float32() -> bool:
    """Tell whether a product with many rows takes longer in bfloat16; measured once in a process, some 20 ms.

    In a thread of its own: tensors without values, counters of operations and autocast belong to the thread that asks.
    """
    if not has_kernels():
        return True
    with ThreadPoolExecutor(1) as apart:
        half, full = apart.map(_seconds, (torch.bfloat16, torch.float32))
    return half > MARGIN * full


def _seconds(dtype: torch.dtype) -> float:
    x, matrix = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    best = float("inf")
    with torch.no_grad():
        for _ in range(_REPEATS):
            start = time.perf_counter()
            torch.nn.functional.linear(x, matrix)
            best = min(best, time.perf_counter() - start)
    return best

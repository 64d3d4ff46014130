"""What this machine can compute and which sizes suit it: for checks before a run and for what makes a step fast."""

from __future__ import annotations

import importlib.util
import os
import platform
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

GPU_ROWS = (8, 32, 64, 160)
"""Numbers of rows that a generation on a GPU has; few of them, so that what was made for one serves again."""
GPU_COLUMNS = 64
"""Lengths on a GPU are multiples of it: attention kernels take whole blocks, and the memory is cut in like pieces."""

_HALF = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}
_X86 = ("x86_64", "amd64", "i386", "i686")


def has_native_bfloat16() -> bool:
    """Tell whether the CPU has instructions for bfloat16."""
    if platform.machine().lower() not in _X86:
        return has_bfloat16_kernels()
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def has_bfloat16_kernels() -> bool:
    """Tell whether oneDNN has bfloat16 products for this CPU; on x86 they need AVX-512 or its successor."""
    is_there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    return is_there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(device_type: str, precision: str) -> AbstractContextManager[object]:
    """Return autocast to a half precision, called as accelerate or torch do; for another name, nothing."""
    return torch.autocast(device_type, _HALF[precision]) if precision in _HALF else nullcontext()


def why_no_liger(device_type: str) -> str | None:
    """Return what Liger's kernels (``speed.liger``) lack on a ``"cpu"`` or ``"cuda"``, None where they can run."""
    for package in ("liger_kernel", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels run on GPUs, not on a {device_type}"
    return None


def why_no_bitsandbytes(device_type: str) -> str | None:
    """Return what packed weights and 8-bit moments lack on a ``"cpu"`` or ``"cuda"``, None where they can be."""
    if device_type != "cuda":
        return "bitsandbytes saves a GPU's memory, and on a CPU unpacks every matrix again for each product"
    is_there = importlib.util.find_spec("bitsandbytes") is not None
    return None if is_there else "the package bitsandbytes is not installed"


def round_rows(count: int, device: torch.device) -> int:
    """Return how many rows a generation of ``count`` has on this device."""
    if device.type == "cpu":
        return count
    return next((rows for rows in GPU_ROWS if rows >= count), count)


def round_columns(count: int, device: torch.device) -> int:
    """Return the length that ``count`` columns are padded to on this device."""
    return count if device.type == "cpu" else -(-count // GPU_COLUMNS) * GPU_COLUMNS


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return ``values`` on ``device``; where they lie on the host, it does not wait for a GPU."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)

"""Versions, and what this machine can do at most: matrix products and a copy."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import real_size_step
import torch

from acceptance.found import Asked, Found
from bench.floors import COPY_BYTES, measure_floors

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "mmengine", "numpy", "liger-kernel")
PRODUCTS = {
    "square": (8192, 8192, 8192),
    "MLP of a step, 2 rows of 704": (1408, 2048, 11008),
    "MLP of a decoded token, 32 rows": (32, 2048, 11008),
}


def run(asked: Asked, found: Found) -> None:
    found.row("versions", what="dual_loop", version=real_size_step.commit())
    found.row("versions", what="Python", version=platform.python_version())
    for name in PACKAGES:
        try:
            found.row("versions", what=name, version=version(name))
        except PackageNotFoundError:
            found.row("versions", what=name, version="not installed")
    found.row("versions", what="machine", version=real_size_step.machine())
    if asked.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        found.row("versions", what="GPU", version=f"{torch.cuda.get_device_name()}, compute capability {capability}")
        found.row("versions", what="memory", version=f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} free")
        found.row("versions", what="CUDA, cuDNN", version=f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    for name, shape in PRODUCTS.items():
        for dtype in (torch.bfloat16, torch.float32):
            size = [max(32, side // 16) for side in shape] if asked.is_tiny else shape
            copied = COPY_BYTES // 64 if asked.is_tiny else COPY_BYTES
            floors = measure_floors(*size, dtype, asked.device, copied)
            found.row(
                "floors",
                product=name,
                dtype=str(dtype).removeprefix("torch."),
                rows=size[0],
                width=size[1],
                inner=size[2],
                TFLOP_a_second=floors["flops_per_second"] / 1e12,
                copy_GB_a_second=floors["bytes_per_second"] / 1e9,
            )

"""The machine: versions, device, precision, memory, disk, and whether processes reach each other."""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from dual_loop.config import Config, precision
from dual_loop.errors import EnvironmentProblem, listed
from dual_loop.model.hardware import has_native_bfloat16, why_no_bitsandbytes, why_no_liger
from dual_loop.preflight.data_checks import check_captions
from dual_loop.preflight.findings import NOTE, OK, PROBLEM, WARNING, Finding
from dual_loop.training.devices import available_cores, choose_device, device_type, why_no_kernel
from dual_loop.training.memory import GIB, estimate_memory, free_memory
from dual_loop.training.run_folder import foreign_files, versions

PRESETS = {size: f"sa2va_4b_{size}gb" for size in (12, 16, 24, 48, 80)}
USABLE_SHARE = 0.9
"""Of a device's memory: the rest goes to the context, to fragments and to what the estimate leaves out."""
COPIES_OF_TRAINED = 4
"""A checkpoint holds parameters, averages and two Adam moments, in float32."""
ALL_REDUCE_SECONDS = 60

_ALL_REDUCE = """
import os, sys, time, torch, torch.distributed as dist
(rank, size, port), backend = map(int, sys.argv[1:4]), sys.argv[4]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl":
    torch.cuda.set_device(device)
dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
value = torch.tensor([float(rank + 1)], device=device)
dist.all_reduce(value)
assert value.item() == size * (size + 1) / 2, value
dist.barrier()
time.sleep(0.2)
os._exit(0)  # gloo's threads can abort a process that takes its group down on a busy machine
"""


def check_versions() -> Iterator[Finding]:
    """Say what is installed, in one line that can be pasted into an issue."""
    found = versions()
    packages = ", ".join(map(" ".join, found["packages"].items()))
    yield Finding(NOTE, "versions", f"Python {found['python']}, {packages}")
    yield Finding(NOTE, "versions", f"{found['platform']}, commit {str(found['git_commit'])[:12]}")
    missing = [name for name, version in found["packages"].items() if version == "not installed"]
    if missing:
        fix = "bash test_dual_loop.sh sets up the environment"
        yield Finding(PROBLEM, "versions", f"not installed: {', '.join(missing)}", fix)


def check_precision(config: Config) -> Iterator[Finding]:
    """Look for what the configuration's precision needs."""
    kind = device_type(config)
    has = torch.cuda.is_bf16_supported(including_emulation=False) if kind == "cuda" else has_native_bfloat16()
    if precision(config) == "fp16" and kind == "cpu":
        fix = "--mixed_precision bf16, or no; --cfg-options model.dtype=bfloat16, or float32"
        yield Finding(PROBLEM, "device", "fp16 with a loss scale is for GPUs without bf16, and there is none", fix)
    elif precision(config) == "fp16":
        yield Finding(OK, "device", "computes in fp16, with a loss scale")
    elif precision(config) != "bf16":
        yield Finding(OK, "device", f"computes in {config.model.dtype}, without mixed precision")
    elif has:
        yield Finding(OK, "device", f"computes in bf16, which this {kind} has")
    else:
        level = WARNING if config.train.allow_emulated_bf16 else PROBLEM
        fix = "--mixed_precision fp16 --cfg-options model.dtype=float16, " if kind == "cuda" else ""
        fix += "--mixed_precision no --cfg-options model.dtype=float32 (twice the memory), or "
        fix += "train.allow_emulated_bf16=True to wait for it"
        yield Finding(level, "device", f"bf16 is asked for and this {kind} would have to emulate it", fix)


def check_device(config: Config) -> Iterator[Finding]:
    """Say what there is to compute on."""
    memory = psutil.virtual_memory().available / GIB
    yield Finding(NOTE, "device", f"{available_cores()} CPU cores, {memory:.1f} GiB of memory free")
    try:
        if choose_device(config.train.device).type == "cpu":
            yield Finding(NOTE, "device", "computes on the CPU")
    except EnvironmentProblem as problem:
        yield Finding(PROBLEM, "device", str(problem), "--device cpu")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(NOTE, "device", f"GPU {index}: {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    cuda = torch.backends.cuda
    are_on = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    enabled = ", ".join(itertools.compress(("flash", "memory-efficient", "math"), are_on))
    yield Finding(NOTE, "device", f"attention: {config.model.attn_implementation}, kernels {enabled}")


def check_kernels(config: Config) -> Iterator[Finding]:
    """Look for what ``speed.liger``, ``speed.sdpa_kernel`` and packed numbers need."""
    kind = device_type(config)
    if config.speed.liger:
        missing, fix = why_no_liger(kind), 'pip install "dual-loop[liger]", or speed.liger=False'
        if missing is not None:
            yield Finding(PROBLEM, "device", f"speed.liger: {missing}", fix)
        else:
            yield Finding(OK, "device", "Liger's kernels can be used")
    for name, value, plain in (
        ("--quantize", config.model.quantize, "none"),
        ("--optimizer", config.train.optimizer, "adamw"),
    ):
        if value != plain and (missing := why_no_bitsandbytes(kind)) is not None:
            fix = f'{name} {plain}, or on a GPU: pip install "dual-loop[quantize]"'
            yield Finding(PROBLEM, "device", f"{name} {value}: {missing}", fix)
    reason = why_no_kernel(config, kind)
    if reason is not None:
        yield Finding(PROBLEM, "device", f"speed.sdpa_kernel: {reason}", "speed.sdpa_kernel=auto")


def check_memory(config: Config, meta_model: nn.Module) -> Iterator[Finding]:
    """Compare the estimate of one process with the memory of every visible GPU; name the preset that would fit."""
    if device_type(config) == "cuda":
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        free = {f"on GPU {device.index}": free_memory(config, device) / GIB for device in devices}
    else:
        free = {"of memory": free_memory(config, torch.device("cpu")) / GIB}
    least = min(free.values())  # the ranks compute alike, so that of the fullest
    needed = estimate_memory(config, meta_model, USABLE_SHARE * least)[0].total / GIB
    fitting = [size for size in PRESETS if size <= least / USABLE_SHARE + 1]
    is_large = config.model.name.startswith("sa2va")
    fix = f"--config {PRESETS[max(fitting)]}" if fitting and is_large else "--batch_size 1 --regions_per_image 1"
    for where, own in free.items():
        text = f"estimate {needed:.2f} GiB a process, {own:.1f} GiB free {where}"
        fits = needed <= USABLE_SHARE * own
        yield Finding(OK, "memory", text) if fits else Finding(WARNING, "memory", text, fix)


def check_output(config: Config, meta_model: nn.Module | None = None) -> Iterator[Finding]:
    """Look for write access and for room for the checkpoints."""
    folder = Path(config.train.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Finding(PROBLEM, "run folder", f"{existing} cannot be written: {error}", "choose another --output_dir")
        return
    yield Finding(OK, "run folder", f"{existing} can be written")
    if foreign := foreign_files(folder):
        text = f"{folder} holds files that are no run's: {listed(foreign)}"
        yield Finding(PROBLEM, "run folder", text, "choose another --output_dir, or an empty one")
    if meta_model is None:
        return
    trained = sum(p.numel() for p in meta_model.parameters() if p.requires_grad)
    one = 4 * COPIES_OF_TRAINED * trained
    # A new checkpoint is written before the oldest is removed.
    needed, free = one * (config.train.keep_checkpoints + 1), shutil.disk_usage(existing).free
    text = f"{config.train.keep_checkpoints + 1} checkpoints of {one / GIB:.2f} GiB, {free / GIB:.1f} GiB free"
    if needed <= free:
        yield Finding(OK, "run folder", text)
    else:
        fix = "free some space, move --output_dir, or lower --keep_checkpoints"
        yield Finding(PROBLEM, "run folder", text, fix)


def require_ready(config: Config) -> list[Finding]:
    """Return the warnings of the quick checks that come before every training.

    Raises:
        EnvironmentProblem: something would stop the run; every such finding is listed.
    """
    findings = [*check_precision(config), *check_kernels(config), *check_output(config), *check_captions(config)]
    problems = [finding for finding in findings if finding.level == PROBLEM]
    if problems:
        listing = "\n".join(f"  - {finding.what}; to do: {finding.fix}" for finding in problems)
        raise EnvironmentProblem(f"{len(problems)} problem(s) before the start (see `dual-loop doctor`):\n{listing}")
    return [finding for finding in findings if finding.level == WARNING]


def check_all_reduce(config: Config) -> Iterator[Finding]:
    """Let processes add a number over what ranks here talk over: one a GPU over NCCL, else two over gloo."""
    backend, size = ("nccl", torch.cuda.device_count()) if device_type(config) == "cuda" else ("gloo", 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command, rest = [sys.executable, "-c", _ALL_REDUCE], [str(size), str(port), backend]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(rank), *rest], **pipes) for rank in range(size)]
    errors = []
    for rank in ranks:
        try:
            _, text = rank.communicate(timeout=ALL_REDUCE_SECONDS)
        except subprocess.TimeoutExpired:
            rank.kill()
            text = f"no answer in {ALL_REDUCE_SECONDS} s"
        if rank.returncode != 0:
            errors.append(text.strip().splitlines()[-1] if text.strip() else f"exit {rank.returncode}")
    if errors:
        fix = "check GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and the firewall of this machine"
        yield Finding(PROBLEM, "processes", f"{size} process(es) cannot add a number over {backend}: {errors[0]}", fix)
    else:
        yield Finding(OK, "processes", f"{size} process(es) added a number over {backend}")

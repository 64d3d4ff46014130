"""Where a run computes: processes, device, precision, threads; and how a step is shared out to them."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dual_loop.config import Config, precision
from dual_loop.errors import ConfigError, EnvironmentProblem, explain
from dual_loop.model.build import geometry
from dual_loop.training import ranks
from dual_loop.training.metrics_log import reduce_sums
from dual_loop.training.ranks import RankAccelerator
from dual_loop.types import RankComm

Item = TypeVar("Item")

ENOUGH_TOKENS = 256
"""Image tokens from which on one image is enough for a CPU."""

LET_GO_SECONDS = 0.5

KERNELS = ("flash", "efficient", "cudnn", "math")


def device_type(config: Config) -> str:
    """Return the kind of device that ``train.device`` means here: ``"cuda"`` where a GPU is visible and wanted."""
    return "cuda" if torch.cuda.is_available() and config.train.device != "cpu" else "cpu"


def choose_device(wanted: str) -> torch.device:
    """Return the device of this rank for ``auto``, ``cpu`` or ``cuda``: a GPU where there are any, else the CPU.

    Raises:
        EnvironmentProblem: no GPU where one is asked for, or a device of another kind, which is not supported: the CPU
            in its place would be slow for no visible reason.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted == "cuda" or other is not None:
        what, seen = "no GPU is visible that can be used", f"a device of the kind {other.type}" if other else "none"
        fix = "set --device cpu to compute on the CPU"
        raise EnvironmentProblem(explain(what, f"--device {wanted}", seen, "a CUDA device", fix))
    return torch.device("cpu")


def build_accelerator(config: Config) -> Accelerator:
    """Join the process group of the launcher (torchrun) and choose device and precision. Comes before any weights.

    GPUs talk over NCCL, CPUs over gloo. Accumulation stays at 1 in accelerate: the trainer accumulates itself, because
    the divisor of the loss is known only for the whole optimiser step.

    Raises:
        EnvironmentProblem: the device that ``train.device`` asks for is not there, or has no such attention kernel.
    """
    device = choose_device(config.train.device)
    choose_arithmetic(config, device.type)
    use_cpu = device.type == "cpu"
    if use_cpu:
        torch.set_num_threads(num_cpu_threads(config))
    else:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        timeout = timedelta(seconds=config.train.rank_timeout)
        torch.distributed.init_process_group("gloo" if use_cpu else "nccl", timeout=timeout)
    # accelerate would hold a second run of this process to the first one's precision.
    AcceleratorState._reset_state()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS")  # says that accelerate guesses; what counts is set below
        accelerator = RankAccelerator(cpu=use_cpu, mixed_precision=precision(config))
    ranks.watch(config.train.rank_timeout)
    if use_cpu:
        torch.set_num_threads(num_cpu_threads(config))
    return accelerator


def share_out_batch(config: Config, world_size: int) -> Config:
    """Return ``config`` with the micro-batches that give ``train.effective_batch`` images a step on so many ranks.

    A step then takes the same images, and has the same gradient up to rounding, on any number of ranks. Where
    ``speed.images_at_once`` is ``fit``, all images of a rank are one micro-batch, whatever ``train.batch_size`` is,
    unless the model is sharded, which always runs whole micro-batches.

    Raises:
        ConfigError: the images cannot be shared out evenly.
    """
    train, images = config.train, config.train.effective_batch
    if images is None:
        return config
    size = train.batch_size
    expected = f"a multiple of {world_size * size} = {world_size} processes x {size} images (--batch_size)"
    if config.speed.images_at_once == "fit" and train.parallel != "fsdp":
        size, expected = max(1, images // world_size), f"a multiple of {world_size} processes"
    if images % (world_size * size):
        what = "the images of a step cannot be shared out evenly"
        fix = "choose another --effective_batch, --batch_size or number of processes"
        raise ConfigError(explain(what, "--effective_batch", images, expected, fix))
    steps = images // (world_size * size)
    train = dataclasses.replace(train, batch_size=size, gradient_accumulation_steps=steps)
    return dataclasses.replace(config, train=train)


def images_at_once(config: Config, device_type: str) -> int:
    """Return how many images of a micro-batch are run together on this kind of device.

    ``auto`` is one on a CPU where an image has 256 tokens or more, else all; so is ``fit`` on a CPU, while on a GPU it
    is all until ``training.memory`` has looked. A sharded model runs all: its ranks have to take the same number of
    passes.
    """
    choice, size = config.speed.images_at_once, config.train.batch_size
    if choice.isdigit():
        return min(int(choice), size)
    if size == 1 or choice == "all" or device_type != "cpu" or config.train.parallel == "fsdp":
        return size
    sizes = geometry(config)
    return 1 if sizes.grid_size**2 * sizes.most_tiles >= ENOUGH_TOKENS else size


def as_computed(config: Config, device_type: str) -> Config:
    """Return ``config`` with the parts as micro-batches: what estimates of time and memory have to look at."""
    train, count = config.train, images_at_once(config, device_type)
    steps = train.gradient_accumulation_steps * -(-train.batch_size // count)
    train = dataclasses.replace(train, batch_size=count, gradient_accumulation_steps=steps)
    return dataclasses.replace(config, train=train)


def wrap_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Wrap ``model``, which is on its device, in DDP where there are several ranks.

    accelerate's own wrapping refuses sharded parameters on GPUs.
    """
    if accelerator.num_processes == 1:
        return model
    # Shards are exchanged by their own layers.
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else None
    with warnings.catch_warnings():
        # Its successor is unknown to the older torch versions that are supported too.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        # Buffers are constants here; sending them before every forward pass would only cost time.
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def why_no_kernel(config: Config, device_type: str) -> str | None:
    """Return why ``speed.sdpa_kernel`` cannot run the training step on this kind of device, None where it can."""
    kernel = config.speed.sdpa_kernel
    if device_type == "cpu" and kernel in ("efficient", "cudnn"):
        return f"a CPU has no {kernel} attention kernel (flash and math it has)"
    if device_type == "cuda" and kernel == "flash":
        return "the flash kernel of GPUs takes no mask, and packed rows have one (efficient and cudnn take it)"
    return None


def choose_attention_kernels(config: Config, device_type: str) -> None:
    """Let this process take ``speed.sdpa_kernel`` for attention and no other: in training, evaluation and serving.

    ``auto`` leaves out cuDNN's alone, which torch prefers on recent GPUs: it builds a graph for every new shape.

    Raises:
        EnvironmentProblem: the device has no such kernel for a training step.
    """
    kernel, backends = config.speed.sdpa_kernel, torch.backends.cuda
    reason = why_no_kernel(config, device_type)
    if reason is not None:
        raise EnvironmentProblem(explain("the attention kernel cannot run", "speed.sdpa_kernel", kernel, reason))
    switches = backends.enable_flash_sdp, backends.enable_mem_efficient_sdp, backends.enable_cudnn_sdp
    for name, switch in zip(KERNELS, (*switches, backends.enable_math_sdp), strict=True):
        switch(name == kernel or (kernel == "auto" and name != "cudnn"))


def choose_arithmetic(config: Config, device_type: str) -> None:
    """Set what a process decides once for all its models: attention kernels, TF32, determinism, the GPU's allocator.

    It is set before anything computes: cuBLAS and the allocator look only once.

    Raises:
        EnvironmentProblem: the device has no such attention kernel.
    """
    choose_attention_kernels(config, device_type)
    torch.set_float32_matmul_precision("high" if config.speed.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.speed.tf32  # torch's own default is True
    torch.use_deterministic_algorithms(config.train.deterministic)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    is_chosen = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if device_type == "cuda" and config.speed.expandable_segments and not is_chosen:
        # The newer name of the same, where torch has it: the older one warns there.
        change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (change or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def gather_objects(accelerator: Accelerator, own: Item) -> list[Item]:
    """Return what every rank gave, in the order of ranks. Only for values that this package made itself."""
    if accelerator.num_processes == 1:
        return [own]
    accelerator.wait_for_everyone()  # who measured or saved comes later than the others
    gathered = [own] * accelerator.num_processes
    with ranks.exchange():
        torch.distributed.all_gather_object(gathered, own)
    return gathered


class RankExchange(RankComm):
    """The loop's view of the ranks of ``accelerator``."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def reduce(self, sums: Mapping[str, float]) -> dict[str, float]:
        return reduce_sums(self.accelerator, sums)

    def gather(self, own: Sequence[str]) -> list[str]:
        return [text for texts in gather_objects(self.accelerator, list(own)) for text in texts]


def end_processes(accelerator: Accelerator) -> None:
    """Leave the process group; call it once, when all else is done.

    gloo's threads need Python's lock to free the tensors of the last collectives. If the group is taken down in that
    moment, by a thread that holds the lock and waits for them, the process hangs (torch 2.13). So the ranks meet once
    more without a collective, and the lock is given away for a while.
    """
    ranks.leave()
    if accelerator.num_processes > 1:
        time.sleep(LET_GO_SECONDS)
    accelerator.end_training()


def num_cpu_threads(config: Config) -> int:
    """Return torch's threads of one process: ``train.num_threads``, OMP_NUM_THREADS, or the cores shared out evenly.

    Torchrun sets OMP_NUM_THREADS to 1 where it is not set, so it is heeded only when one process runs.
    """
    if config.train.num_threads is not None:
        return config.train.num_threads
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    given = os.environ.get("OMP_NUM_THREADS", "")
    if local_world_size == 1 and given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, available_cores() // local_world_size)


def available_cores() -> int:
    """Return the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory used so far in MiB: of the GPU where there is one, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10

"""A GPU that is none: tensors say ``cuda:0``, the CPU computes, and what a GPU would mind is raised or counted.

Use it in a process of its own, before anything imports torch::

    from emulated_build import load_device; load_device()
    from emulated_device import EmulatedGpu
    with EmulatedGpu() as gpu:
        ...                      # the package, with device "cuda"
        gpu.end("step")          # names what was counted since the last call
    gpu.events                   # Counter of Event(phase, kind, what, place)

Every operator reaches :meth:`EmulatedGpu.__torch_dispatch__`, below autograd and autocast, so both run as on a GPU.
An operator on tensors of two devices raises, as do a CPU generator for a tensor of the GPU and ``numpy()`` of one.
With ``EMULATED_GPUS=2`` in the environment there are two; what is asked of "cuda" goes to that of ``set_device``.
Counted are kernels (operators that are no views), synchronisations (the host waits for the device: ``item``, copies to
the host, shapes that depend on values) and pageable copies (to the device from memory that is not pinned, for which
the host waits too), each with the line of the project that caused it.

A CUDA graph is a list of operators with the tensors that they read and write; nothing is computed while it is recorded,
and what a GPU refuses meanwhile (waiting for the device) raises.

What this cannot show: time, memory, numerics of GPU kernels, and anything behind more than one stream.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._dynamo  # before torch.cuda is replaced: it looks at it while it is imported
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten
CPU = torch.device("cpu")

INDEXING = {
    *(aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default),
    *(aten._index_put_impl_.default, aten._unsafe_index_put.default),
}
SHAPE_FROM_VALUES = ("nonzero", "masked_select", "unique", "bincount")
NO_KERNEL = {
    *("detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "_local_scalar_dense"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
}


class Event(NamedTuple):
    phase: str
    kind: str  # "kernel", "sync" or "pageable copy"
    what: str  # the operator
    place: str  # file:line of the project, or of the caller outside torch


class EmulatedTensor(torch.Tensor):
    """A tensor that says ``cuda:N`` and holds its values in ``value``, a tensor of the CPU."""

    value: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: torch.Tensor, requires_grad: bool = False, device: Any = "cuda") -> EmulatedTensor:
        place = with_index(device)
        active().devices[str(place)] += 1
        tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            layout=value.layout,
            device=place,
            requires_grad=requires_grad,
        )
        tensor.value = value
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return active().run(func, args, kwargs or {})

    # Python methods that read the memory without an operator.
    def tolist(self) -> Any:
        active().count("sync", "tolist")
        return self.value.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first ({place()})")

    __array__ = numpy

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, new: EmulatedTensor) -> None:
        torch._C.TensorBase.data.__set__(self, new)  # what it says of itself
        self.value = new.value

    # Where the memory lies; nobody reads it through these.
    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def storage(self) -> Any:
        return self.value.storage()

    def untyped_storage(self) -> Any:
        return self.value.untyped_storage()

    def __getitem__(self, index: Any) -> Any:
        return torch._C.TensorBase.__getitem__(self, on_device(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        torch._C.TensorBase.__setitem__(self, on_device(index), value)

    def __deepcopy__(self, memo: Any) -> EmulatedTensor:
        return EmulatedTensor(self.value.clone(), self.requires_grad, self.device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        active().count("sync", "pickle")
        return self.value.detach().clone().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.device} {self.value!r}"


def on_device(index: Any) -> Any:
    """Turn the lists of an index into tensors of the device, as torch does with a copy that the host waits for."""
    if isinstance(index, tuple):
        return tuple(on_device(part) for part in index)
    if not isinstance(index, (list, range)):
        return index
    active().count("pageable copy", "index by a list")
    return EmulatedTensor(CONSTRUCT(list(index), dtype=None if index else torch.long))


def place() -> str:
    """Return the innermost line of the package, or of whoever called torch where it is in no call of the package."""
    frame, outside = sys._getframe(1), "autograd"
    while frame is not None:
        name = frame.f_code.co_filename
        if "/dual_loop/" in name and "site-packages" not in name:
            return f"{name.rsplit('/dual_loop/', 1)[1]}:{frame.f_lineno}"
        if (
            outside == "autograd"
            and "/torch/" not in name
            and not name.endswith(("emulated_device.py", "contextlib.py"))
        ):
            outside = f"{name.rsplit('/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return outside


class Generator(torch.Generator):
    """A generator of either device; the CPU draws."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.place = with_index(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


CONSTRUCT, AS_TENSOR = torch.tensor, torch.as_tensor
ATTENTION, RMS_NORM, JOIN = F.scaled_dot_product_attention, F.rms_norm, torch.distributed.init_process_group


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def with_index(device: Any) -> torch.device:
    """Return the device with its number: of "cuda" alone that of ``torch.cuda.set_device``."""
    device = torch.device(device)
    return torch.device("cuda", active().index) if is_cuda(device) and device.index is None else device


def construct(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """``torch.tensor``: the values are made on the host and copied."""
    if not is_cuda(device):
        return CONSTRUCT(data, device=device, **options)
    active().count("pageable copy", "torch.tensor")
    requires_grad = options.pop("requires_grad", False)
    if isinstance(data, EmulatedTensor):
        data = data.value
    return EmulatedTensor(CONSTRUCT(data, **options), requires_grad, device)


def new_tensor(like: torch.Tensor, data: Any, dtype: Any = None, device: Any = None, **options: Any) -> torch.Tensor:
    return construct(data, dtype=dtype or like.dtype, device=device or like.device, **options)


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
    if isinstance(data, torch.Tensor):
        return data.to(device=device, dtype=dtype)
    return construct(data, dtype=dtype, device=device) if is_cuda(device) else AS_TENSOR(data, dtype=dtype)


class Fused(torch.autograd.Function):
    """What a GPU computes in one kernel, and differentiates in two; the CPU's own function computes it."""

    @staticmethod
    def forward(ctx: Any, name: str, function: Any, *tensors: EmulatedTensor) -> EmulatedTensor:
        if not all(isinstance(tensor, EmulatedTensor) for tensor in tensors):
            raise RuntimeError(f"{name} over tensors of two devices ({place()})")
        ctx.name = name
        with torch.enable_grad(), _disable_current_modes():
            ctx.inputs = [tensor.value.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
            ctx.output = function(*ctx.inputs)
        made = ctx.output.detach()
        active().count("kernel", name)
        active().record(lambda *values: function(*values).detach(), tuple(t.value for t in tensors), {}, made)
        return EmulatedTensor(made, device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, gradient: EmulatedTensor) -> Any:  # type: ignore[override]
        active().count("kernel", f"{ctx.name} backward", 2)
        wanted = [tensor for tensor in ctx.inputs if tensor.requires_grad]
        with torch.enable_grad(), _disable_current_modes():
            # The norms of the loss terms walk the graph once more.
            found = iter(torch.autograd.grad(ctx.output, wanted, gradient.value, retain_graph=True))
        gradients = [
            EmulatedTensor(next(found), device=gradient.device) if tensor.requires_grad else None
            for tensor in ctx.inputs
        ]
        return (None, None, *gradients)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    if not any(isinstance(tensor, EmulatedTensor) for tensor in tensors):
        return ATTENTION(query, key, value, attn_mask, **options)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        tensors = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
    return Fused.apply("attention", partial(ATTENTION, **options), *tensors)  # type: ignore[no-any-return]


def rms_norm(input: torch.Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> torch.Tensor:
    tensors = [input] if weight is None else [input, weight]
    if not any(isinstance(tensor, EmulatedTensor) for tensor in tensors):
        return RMS_NORM(input, normalized_shape, weight, eps)
    return Fused.apply("rms_norm", lambda x, *w: RMS_NORM(x, normalized_shape, *w, eps=eps), *tensors)  # type: ignore[no-any-return]


class Stream:
    """A stream, a device guard, an event and a graph pool in one: nothing to wait for, and a time that was marked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: Stream) -> float:
        return 1e3 * (later.seconds - self.seconds)


class EmulatedGraph:
    """Operators in the order of a recording, each with its arguments and the tensors that it made.

    Played again they read and write the same tensors, whatever has been bound to the names of then.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(self, written: list[torch.Tensor]) -> None:
        for tensor in written:
            memory = tensor.untyped_storage()
            whole = torch.empty(0, dtype=tensor.dtype).set_(memory)
            self.before.setdefault(memory.data_ptr(), (whole, whole.clone()))

    def replay(self) -> None:
        with _disable_current_modes(), torch.no_grad():
            for func, args, kwargs, made in self.calls:
                active().count("kernel", "of a graph")
                found = tree_flatten(func(*args, **kwargs))[0]
                if not getattr(func, "is_view", False) and not writes(func):
                    for old, new in zip(tree_flatten(made)[0], found, strict=True):
                        if isinstance(old, torch.Tensor):
                            old.copy_(new)


class Recording:
    """``torch.cuda.graph``: what runs inside goes into the graph, and changes nothing."""

    def __init__(self, graph: EmulatedGraph, **options: Any) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        active().recording = self.graph

    def __exit__(self, *args: Any) -> None:
        active().recording = None
        for whole, before in self.graph.before.values():
            whole.copy_(before)


def writes(func: Any) -> list[tuple[int, str]]:
    """Return place and name of the arguments that an operator changes."""
    arguments = enumerate(func._schema.arguments if hasattr(func, "_schema") else ())
    return [(n, one.name) for n, one in arguments if one.alias_info is not None and one.alias_info.is_write]


class EmulatedGpu(TorchDispatchMode):
    """The device; as a context it takes the place of ``torch.cuda``.

    Attributes:
        events: how often each :class:`Event` happened.
        devices: how many tensors were made on each device.
        index: number of the device that ``torch.cuda.set_device`` chose.
    """

    current: EmulatedGpu | None = None
    recording: EmulatedGraph | None = None

    def __init__(self, free_gib: float = 70.0, total_gib: float = 80.0) -> None:
        super().__init__()
        self.events: Counter[Event] = Counter()
        self.memory = (int(free_gib * 2**30), int(total_gib * 2**30))
        self.recent: Counter[Event] = Counter()
        self.devices: Counter[str] = Counter()
        self.index = 0
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> EmulatedGpu:
        EmulatedGpu.current = self
        for owner, names in self.replacements().items():
            for name, new in names.items():
                self.patches.enter_context(mock.patch.object(owner, name, new, create=True))
        self.patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.patches.close()
        self.end("end")

    def replacements(self) -> dict[Any, dict[str, Any]]:
        """Return what stands in for torch's own, by its owner."""
        nothing: Callable[..., None] = lambda *args, **kwargs: None  # noqa: E731
        cuda = {
            **dict.fromkeys(("_lazy_init", "manual_seed", "manual_seed_all", "empty_cache"), nothing),
            "set_device": self.set_device,
            "current_device": lambda: self.index,
            **{name: lambda *args: self.index for name in ("_exchange_device", "_maybe_exchange_device")},
            **{name: lambda *args: 0 for name in ("memory_allocated", "memory_reserved")},
            **{name: lambda *args: 2**20 for name in ("max_memory_allocated", "max_memory_reserved")},
            **{name: lambda *args, **kwargs: True for name in ("is_available", "is_initialized", "is_bf16_supported")},
            **dict.fromkeys(("device", "Stream", "Event", "current_stream", "stream"), Stream),
            **{"CUDAGraph": EmulatedGraph, "graph": Recording},
            "reset_peak_memory_stats": nothing,
            "device_count": lambda: int(os.environ.get("EMULATED_GPUS", "1")),
            "set_per_process_memory_fraction": nothing,
            "is_current_stream_capturing": lambda: False,
            "mem_get_info": lambda *args: self.memory,
            "get_device_name": lambda *args: "emulated GPU",
            "get_device_capability": lambda *args: (9, 0),
            "get_rng_state": lambda *args: torch.get_rng_state(),
            "get_rng_state_all": lambda: [torch.get_rng_state()],
            "set_rng_state": lambda state, *args: torch.set_rng_state(state),
            "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
            "synchronize": lambda *args: self.count("sync", "cuda.synchronize"),
        }
        tensor = {
            "new_tensor": new_tensor,
            "record_stream": nothing,
            "pin_memory": pinned,
            "is_pinned": lambda t, *a: hasattr(t, "pinned"),
        }
        return {
            torch.cuda: cuda,
            torch._C: {"_accelerator_setAllocatorSettings": nothing},
            torch.cuda.amp.common: {"amp_definitely_not_available": lambda: False},
            torch.Tensor: tensor,
            torch: {"tensor": construct, "as_tensor": as_tensor, "Generator": Generator},
            F: {"scaled_dot_product_attention": attention, "rms_norm": rms_norm},
            torch.distributed: {"init_process_group": join_over_gloo},
        }

    def set_device(self, device: Any) -> None:
        self.index = device if isinstance(device, int) else torch.device(device).index or 0

    # ---- counting --------------------------------------------------------------------------------------------------

    def end(self, phase: str) -> None:
        """Count what happened since the phase before ended under ``phase``."""
        for event, number in self.recent.items():
            self.events[event._replace(phase=phase)] += number
        self.recent.clear()

    def count(self, kind: str, what: str, number: int = 1) -> None:
        if self.recording is not None and kind != "kernel":
            raise RuntimeError(f"operation not permitted when stream is capturing: {what} ({place()})")
        self.recent[Event("", kind, what, place())] += number

    def record(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        """Put what was computed into the graph that is being recorded, if there is one."""
        if self.recording is not None:
            self.recording.calls.append((func, args, kwargs, made))

    # ---- operators -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operator on the values, and return its results as tensors of the device that they belong to."""
        flat: list[Any] = []
        own_args = unwrapped(args, flat)
        own_kwargs = {key: unwrapped(value, flat) for key, value in kwargs.items()}
        found = {value.device for value in flat if isinstance(value, EmulatedTensor)}
        on_gpu, target = bool(found), kwargs.get("device")
        to_gpu = on_gpu if target is None else is_cuda(target)
        if not on_gpu and not to_gpu:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if len(found) > 1 and name not in ("copy_", "_to_copy"):
            raise RuntimeError(f"expected all tensors on the same device, found {found} in {name} ({place()})")
        self.check_devices(func, name, args, flat, to_gpu)
        self.count_event(func, name, args, kwargs, on_gpu, to_gpu)
        if target is not None:
            own_kwargs["device"] = CPU
        own_kwargs.pop("pin_memory", None)
        places = writes(func)
        if self.recording is not None:
            self.recording.keep([own_args[n] if n < len(own_args) else own_kwargs[name] for n, name in places])
        out = func(*own_args, **own_kwargs)
        self.record(func, own_args, own_kwargs, out)
        written = [args[n] if n < len(args) else kwargs[name] for n, name in places]
        if written and out is not None and not isinstance(written[0], (list, tuple)):
            return type(out)(written) if isinstance(out, (tuple, list)) else written[0]
        device = next(iter(found)) if target is None and found else target
        return wrapped(out, device) if to_gpu else out

    def check_devices(self, func: Any, name: str, args: Any, flat: list[Any], to_gpu: bool) -> None:
        """Raise where a GPU would: tensors of two devices (a CPU scalar may mix), or the wrong generator."""
        host = [v for v in flat if isinstance(v, torch.Tensor) and not isinstance(v, EmulatedTensor)]
        gpu = [v for v in flat if isinstance(v, EmulatedTensor)]
        if any(isinstance(v, torch.Generator) and to_gpu and v.device.type == "cpu" for v in flat):
            raise RuntimeError(f"expected a cuda generator but found a cpu one: {name} ({place()})")
        if not (host and gpu) or name in ("copy_", "_to_copy"):
            return
        if func in INDEXING and isinstance(args[0], EmulatedTensor):
            self.count("pageable copy", "index from the host")
            host = (
                [args[2]] if len(args) > 2 and args[2] is not None and not isinstance(args[2], EmulatedTensor) else []
            )
        if any(tensor.dim() > 0 for tensor in host) or (host and func in INDEXING and host[0] is args[0]):
            shapes = [tuple(tensor.shape) for tensor in host]
            raise RuntimeError(f"expected all tensors on the same device, found cpu {shapes} in {name} ({place()})")

    def count_event(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], on_gpu: bool, to_gpu: bool) -> None:
        if name in ("copy_", "_to_copy"):
            source = args[1] if name == "copy_" else args[0]
            into = isinstance(args[0], EmulatedTensor) if name == "copy_" else to_gpu
            from_gpu = isinstance(source, EmulatedTensor)
            if from_gpu and not into:
                self.count("sync", "copy to the host")
            elif into and not from_gpu:
                free = hasattr(source, "pinned") and (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
                self.count("kernel" if free or source.dim() == 0 else "pageable copy", "copy to the device")
                return
        flags = [t for t in (args[1] or []) if isinstance(t, torch.Tensor)] if func in INDEXING else []
        if (
            name in ("_local_scalar_dense", "equal")
            or name.startswith(SHAPE_FROM_VALUES)
            or (name == "repeat_interleave" and kwargs.get("output_size") is None)
            or any(t.dtype in (torch.bool, torch.uint8) for t in flags)
        ):
            self.count("sync", name)
        if not func.is_view and name not in NO_KERNEL:
            self.count("kernel", name)


def join_over_gloo(backend: Any = None, **options: Any) -> None:
    """``init_process_group``: gloo in the place of NCCL, which this torch has not."""
    JOIN("gloo", **{name: value for name, value in options.items() if name != "device_id"})


def unwrapped(value: Any, flat: list[Any]) -> Any:
    """Return an operator's argument with its tensors' values; add what it is, or what its sequences hold, to ``flat``.

    Several times as fast as torch's trees.
    """
    if isinstance(value, (list, tuple)):
        return type(value)([unwrapped(part, flat) for part in value])
    flat.append(value)
    return value.value if isinstance(value, EmulatedTensor) else value


def wrapped(out: Any, device: Any) -> Any:
    """Return an operator's result with its tensors on the device."""
    if isinstance(out, (list, tuple)):
        return type(out)([wrapped(part, device) for part in out])
    return EmulatedTensor(out, device=device) if isinstance(out, torch.Tensor) else out


def pinned(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
    """``Tensor.pin_memory``: a mark that :meth:`EmulatedGpu.count_event` looks for."""
    if isinstance(tensor, EmulatedTensor):
        raise RuntimeError(f"cannot pin a tensor of the GPU ({place()})")
    copy = tensor.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


def active() -> EmulatedGpu:
    assert EmulatedGpu.current is not None, "no emulated GPU is there"
    return EmulatedGpu.current

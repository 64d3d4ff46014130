"""What a CPU alone takes: attention, matrices in its own layout or width, SAM 2's encoder in float32, the heap.

Three kinds of CPU are about: those without bfloat16 (torch emulates it, up to a hundred times slower than float32),
those whose kernels for it are faster than for float32 (AMX, AMD since Zen 4), and those with ``avx512_bf16`` alone, on
which many rows take longer than in float32, while few rows, bound by reading the matrix, take half as long.

* :class:`PackedLinear`: a frozen matrix in oneDNN's blocked layout. The stock product brings the matrix into such a
  layout at every call, which for a few rows takes longer than the product.
* :class:`WidenedLinear`: a frozen bfloat16 matrix multiplied in float32 a slice at a time.
* :class:`HybridLinear`: both, where bfloat16 is faster for few rows and float32 for many.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dual_loop.accelerate import replace
from dual_loop.config import Config
from dual_loop.errors import EnvironmentProblem, explain
from dual_loop.model import hardware
from dual_loop.model.sa2va import GroundingDecoder, Sa2VA

GROUPED = "sdpa_grouped_decoding"
"""The name of :func:`grouped_attention` among transformers' attention functions."""
MARGIN = 1.2
"""How much longer bfloat16 has to take to count as slower: far from both kinds of CPU, so the answer is stable."""
_ROWS, _WIDTH, _REPEATS = 256, 1024, 5
_KEPT_BLOCK, _NEVER = 2**30, 2**31 - 1
_PACKED_ROWS = 8
_SLICE_VALUES = 2**21
"""Most values of a plain matrix that exist in float32 at a time: 8 MiB, which a processor's cache holds."""
_PRODUCT_VALUES = 2**23
"""Most values of an unpacked matrix multiplied at a time: 32 MiB, so that a wide output is written in parts."""
_SLICE_STEP = 32
"""Rows of a slice are a multiple of this: a product with 95 columns takes half as long again as one with 96."""
_MANY_ROWS = 96
"""From here on a hybrid multiplies in float32; below, unpacking the matrix costs more than it saves."""
_PART_VALUES = 2**25
"""Most values of a hybrid's packed parts: what is unpacked at a time, 128 MiB. Only heads are larger."""


def apply(model: Sa2VA, config: Config) -> None:
    """Choose the attention and SAM 2's precision; the heap and the matrices wait for the device and the weights."""
    if config.model.attn_implementation == "sdpa":
        AttentionInterface.register(GROUPED, grouped_attention)
        AttentionMaskInterface.register(GROUPED, sdpa_mask)
        model.mllm.model.language_model.set_attn_implementation(GROUPED)
    replace(model.grounding, encode)
    model.after_loading.append(partial(_after_loading, model, config))


def _after_loading(model: Sa2VA, config: Config, device: torch.device) -> None:
    if device.type == "cpu":
        keep_heap()
    pack_model(model, config, device)


@cache
def is_slower_in_bfloat16() -> bool:
    """Tell whether a product with many rows takes longer than in float32; measured once in a process, some 20 ms.

    In a thread of its own: tensors without values, counters of operations and autocast belong to the thread that asks.
    """
    if not hardware.has_bfloat16_kernels():
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
            F.linear(x, matrix)
            best = min(best, time.perf_counter() - start)
    return best


def encode(grounding: GroundingDecoder, pixels: Tensor) -> list[Tensor]:
    """``GroundingDecoder.encode`` without autocast to bfloat16 on a CPU that is faster in float32."""
    kind = pixels.device.type
    is_wide = kind == "cpu" and torch.is_autocast_enabled(kind) and is_slower_in_bfloat16()
    with torch.autocast(kind, enabled=False) if is_wide else nullcontext():
        return GroundingDecoder.encode(grounding, pixels)


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention in transformers' form, in torch's fused kernel; on a GPU the stock call is this already.

    For a single new token, query heads that share keys and values go through the kernel as so many queries of one head:
    keys and values are neither repeated nor copied. Where the CPU is faster in float32, bfloat16 is taken in float32
    and rounded once.

    Args:
        query: (R, heads, n, d). key, value: (R, key-value heads, columns, d).
        attention_mask: (R, 1, n, columns) additive, or None.

    Returns:
        (R, n, heads, d), and no weights.
    """
    kind, dtype, (rows, heads, new, width) = query.device.type, query.dtype, query.shape
    if new == 1 and kind == "cpu" and not torch.is_grad_enabled():
        grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
        mask = None if attention_mask is None else attention_mask.expand(-1, -1, grouped.shape[2], -1)
        output = F.scaled_dot_product_attention(grouped, key, value, mask, scale=options.get("scaling"))
        return output.reshape(rows, 1, heads, width), None
    if kind != "cpu" or dtype != torch.bfloat16 or not is_slower_in_bfloat16():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0], None
    mask = attention_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast(kind, enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
    return output.to(dtype), None


class PackedLinear(nn.Module):
    """A frozen ``nn.Linear`` whose matrix is kept in oneDNN's blocked layout alone; CPU, float32 or bfloat16.

    The backward pass unpacks the matrix for a moment. The matrix is no parameter any more: nothing that reads weights
    by name sees it, so a model is packed last, and saved by what trains.

    Args:
        linear: the layer; its weight is given up.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.packed = pack_matrix(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()
        del linear.weight

    @property
    def weight(self) -> Tensor:
        """(out, in), unpacked: a copy."""
        return self.packed.to_dense()

    @staticmethod
    def merge(layers: Sequence[LoraLinear], undo: ExitStack) -> None:
        """Add the adapters of ``layers``, whose base layers are packed, to the matrices; ``undo`` restores them."""
        for layer in layers:
            base: Any = layer.get_base_layer()
            undo.callback(setattr, base, "packed", base.packed)
            base.packed = pack_matrix(base.packed.to_dense() + layer.get_delta_weight(layer.active_adapters[0]))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the matrix's dtype."""
        x = x.to(self.dtype)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return _packed_product(x, self.packed, self.bias)
        return torch.as_tensor(_PackedProduct.apply(x, self.packed, self.bias))


def _packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.as_tensor(torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], ""))


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return _packed_product(x, packed, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        matrix = ctx.packed.to_dense()
        return gradients[0].to(matrix.dtype) @ matrix, None, None


class WidenedLinear(nn.Linear):
    """A frozen bfloat16 ``nn.Linear`` whose products are taken in float32 and rounded once.

    Made by :func:`widen_frozen_linears`; the weight stays the parameter that it was.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the matrix's dtype."""
        sizes = (self.out_features, self.in_features)
        return torch.as_tensor(_WidenedProduct.apply(x.to(self.weight.dtype), self._slices, sizes, self.bias))

    def widens(self, x: Tensor) -> bool:
        """Tell whether ``x`` will be multiplied in float32."""
        return True

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        buffer = torch.empty(0)
        for rows in _row_slices(self.weight, _SLICE_VALUES):
            values = self.weight[rows]
            if buffer.numel() < values.numel():
                buffer = torch.empty(values.shape)
            yield rows, buffer[: len(values)].copy_(values)


class HybridLinear(nn.Module):
    """A frozen bfloat16 matrix, packed: few rows are multiplied in bfloat16, many in float32; CPU.

    For many rows the matrix is unpacked into float32. As with :class:`PackedLinear`, it is no parameter any more.

    Args:
        linear: the layer; its weight is given up.
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.bias = None if linear.bias is None else linear.bias.detach()
        count = max(1, _PART_VALUES // self.in_features)
        self.parts = [pack_matrix(part) for part in linear.weight.detach().split(count)]
        del linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the matrix's dtype."""
        x, sizes = x.to(self.dtype), (self.out_features, self.in_features)
        if self.widens(x) or (torch.is_grad_enabled() and x.requires_grad):
            return torch.as_tensor(_WidenedProduct.apply(x, self._slices, sizes, self.bias))
        if len(self.parts) == 1:
            return _packed_product(x, self.parts[0], self.bias)
        product = torch.cat([_packed_product(x, part, None) for part in self.parts], dim=-1)
        return product if self.bias is None else product + self.bias

    def widens(self, x: Tensor) -> bool:
        """Tell whether ``x`` (..., in) has so many rows that it will be multiplied in float32."""
        return x.numel() >= _MANY_ROWS * self.in_features

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        start = 0
        for part in self.parts:
            matrix = part.to_dense(torch.float32)  # one pass: unpacked and widened
            for rows in _row_slices(matrix, _PRODUCT_VALUES):
                yield slice(start + rows.start, start + rows.stop), matrix[rows]
            start += len(matrix)


def _row_slices(matrix: Tensor, most: int) -> Iterator[slice]:
    """Cut the rows of a matrix (rows, in) into slices of at most ``most`` values."""
    count = most // matrix.shape[1]
    count = max(1, count - count % _SLICE_STEP)
    for start in range(0, len(matrix), count):
        yield slice(start, min(start + count, len(matrix)))


class _WidenedProduct(torch.autograd.Function):
    """A product in float32, rounded once, with the gradient of ``x`` alone.

    ``slices`` yields rows of the matrix and their values; ``sizes`` is (out, in).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slices: Callable[[], Iterator[tuple[slice, Tensor]]],
        sizes: tuple[int, int],
        bias: Tensor | None,
    ) -> Tensor:
        ctx.slices, ctx.in_features = slices, sizes[1]
        wide = x.flatten(0, -2).float()
        output = x.new_empty(len(wide), sizes[0])
        with torch.autocast(x.device.type, enabled=False):
            for rows, part in slices():
                product = wide @ part.t() if bias is None else torch.addmm(bias[rows].float(), wide, part.t())
                output[:, rows] = product
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        wide = gradients[0].flatten(0, -2).float()
        total = wide.new_zeros(len(wide), ctx.in_features)
        with torch.autocast(wide.device.type, enabled=False):
            for rows, part in ctx.slices():
                total.addmm_(wide[:, rows], part)
        return total.to(gradients[0].dtype).view(*gradients[0].shape[:-1], -1), None, None, None


def widen_frozen_linears(model: nn.Module) -> int:
    """Let every frozen bfloat16 ``nn.Linear`` inside ``model`` compute in float32; return how many there are."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    chosen = [layer for layer in layers if layer.weight.dtype == torch.bfloat16 and not layer.weight.requires_grad]
    for layer in chosen:
        layer.__class__ = WidenedLinear
    return len(chosen)


def pack_matrix(weight: Tensor) -> Tensor:
    """Return a matrix (out, in) in oneDNN's blocked layout for few rows, which serves many rows as well."""
    return torch.as_tensor(torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS))


def pack_frozen_linears(
    model: nn.Module,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    kind: type[PackedLinear] | type[HybridLinear] = PackedLinear,
) -> int:
    """Replace every frozen ``nn.Linear`` of ``dtypes`` inside ``model`` by a ``kind``; return how many.

    Raises:
        EnvironmentProblem: this torch or processor has no such layout, or the weights are not on the CPU.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child.weight.requires_grad or child.weight.dtype not in dtypes:
                continue
            if child.weight.device.type != "cpu" or not can_pack(child.weight.dtype):
                seen = f"{child.weight.dtype} on {child.weight.device}"
                expected = "a dtype that oneDNN has packed kernels for on this processor"
                where = f"speed.pack_weights, {name}"
                fix = "set it to auto or off"
                raise EnvironmentProblem(explain("frozen weights cannot be packed", where, seen, expected, fix))
            setattr(parent, name, kind(child))
            count += 1
    return count


def can_pack(dtype: torch.dtype = torch.float32) -> bool:
    """Tell whether this torch has oneDNN's packed linear layer, and this processor its kernels for ``dtype``.

    Those for bfloat16 need AVX-512 or its successor.
    """
    is_there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return is_there and (dtype != torch.bfloat16 or hardware.has_bfloat16_kernels())


def gains_from_packing(dtype: torch.dtype = torch.float32) -> bool:
    """Tell whether packed matrices of ``dtype`` are worth it: the layout is there, and stock products are slower.

    MKL's float32 products on Intel's processors are not: 8 rows with 512 x 1536 take 0.13 ms either way, on AMD's 0.35
    and 0.14, and the backward pass need not unpack. The processor's name decides, not a measurement, so that a run and
    its continuation take the same kernels.
    """
    is_intel = "intel" in str(torch.cpu.get_capabilities().get("cpu_name", "")).lower()
    is_lean = dtype == torch.float32 and is_intel and torch.backends.mkl.is_available()
    return can_pack(dtype) and not is_lean


def pack_model(model: Sa2VA, config: Config, device: torch.device) -> int:
    """Pack the frozen matrices where ``speed.pack_weights`` says so; return how many.

    ``auto`` does so on a CPU, for the dtypes that gain from it. A CPU that is faster in float32 multiplies bfloat16
    matrices in that: all of them, or where it has bfloat16 those that meet many rows. Float32 matrices that autocast
    would round are left alone. Call it after weights were loaded, before training: the packed matrices are no
    parameters any more. The output head stays plain where trained rows are written into it.
    """
    choice = config.speed.pack_weights
    # A packed matrix cannot be sharded.
    if config.train.parallel == "fsdp" or choice == "off" or (choice == "auto" and device.type != "cpu"):
        return 0
    language = model.mllm if model.new_token_rows is None else model.mllm.model
    encoder, precision = model.grounding_encoder.vision_encoder, config.train.mixed_precision
    is_full = precision == "no" or (precision == "auto" and config.model.dtype != "bfloat16")
    dtypes, done = [torch.bfloat16, *([torch.float32] if is_full else [])], 0
    if choice == "auto":
        if is_slower_in_bfloat16():
            # Images are always many rows, tokens may be few. What was converted once is left alone by what follows.
            done = sum(widen_frozen_linears(tower) for tower in (model.mllm.model.vision_tower, encoder))
            if can_pack(torch.bfloat16):
                done += pack_frozen_linears(language, [torch.bfloat16], HybridLinear)
            else:
                done += widen_frozen_linears(language)
        dtypes = [dtype for dtype in dtypes if gains_from_packing(dtype)]
    return done + (sum(pack_frozen_linears(part, dtypes) for part in (language, encoder)) if dtypes else 0)


def keep_heap() -> bool:
    """Let glibc serve large tensors from memory that was freed before; return whether it can be told so.

    By default it maps every block over 32 MiB anew and unmaps it afterwards, so each such tensor pays for a page fault
    every 4 KiB. Memory that is kept belongs to this process until it ends.
    """
    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_threshold, _KEPT_BLOCK) and mallopt(trim_threshold, _NEVER))

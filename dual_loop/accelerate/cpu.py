"""What a CPU alone takes: frozen matrices in its own layout or width, attention and SAM 2's encoder in float32.

Two kinds of CPU are about: those that multiply bfloat16 faster than float32 (AMX, AMD since Zen 4), and those that do
not (without bfloat16 torch emulates it, up to a hundred times slower; with ``avx512_bf16`` alone many rows are slower).

* :class:`PackedLinear`: a matrix in oneDNN's blocked layout. The stock product brings the matrix into such a layout at
  every call, which for a few rows takes longer than the product.
* :class:`WidenedLinear`: a bfloat16 matrix that is multiplied in float32 a slice at a time.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dual_loop.accelerate import replace
from dual_loop.config import Config
from dual_loop.errors import EnvironmentProblem, explain
from dual_loop.model import hardware
from dual_loop.model.sa2va import GroundingDecoder, Sa2VA

WIDE = "sdpa_wide"
"""The name of :func:`wide_attention` among transformers' attention functions."""
MARGIN = 1.2
"""How much longer bfloat16 has to take to count as slower: far from both kinds of CPU, so the answer is stable."""
SLICE_VALUES = 2**21
"""Most values of a matrix that exist in float32 at a time: 8 MiB, which a processor's cache holds."""
SLICE_STEP = 32
"""Rows of a slice are a multiple of this: a product with 95 columns takes half as long again as one with 96."""


def apply(model: Sa2VA, config: Config) -> None:
    """Choose the precision of SAM 2 and of attention where there is any bfloat16, and the form of the matrices.

    Attention and matrices wait for the device, and the matrices for the weights.
    """
    if config.model.dtype == "bfloat16" or config.train.mixed_precision == "bf16":
        replace(model.grounding, encode)
        model.after_loading.append(partial(widen_attention, model, config))
    model.after_loading.append(partial(convert_matrices, model, config))


def widen_attention(model: Sa2VA, config: Config, device: torch.device) -> None:
    """Let the language model take :func:`wide_attention` on a CPU; elsewhere it keeps transformers' own."""
    if device.type == "cpu" and config.model.attn_implementation == "sdpa":
        model.mllm.model.language_model.set_attn_implementation(WIDE)


@cache
def is_slower_in_bfloat16() -> bool:
    """Tell whether a product with many rows takes longer than in float32; measured once in a process, some 20 ms.

    In a thread of its own: tensors without values, counters of operations and autocast belong to the thread that asks.
    """
    if not hardware.has_bfloat16_kernels():
        return True
    with ThreadPoolExecutor(1) as apart:
        half, full = apart.map(seconds_of_product, (torch.bfloat16, torch.float32))
    return half > MARGIN * full


@torch.no_grad()
def seconds_of_product(dtype: torch.dtype) -> float:
    """Return the seconds of the quickest of five products of 256 rows with a square matrix of width 1,024."""
    x, matrix, seconds = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype), []
    for _ in range(5):
        start = time.perf_counter()
        F.linear(x, matrix)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def encode(grounding: GroundingDecoder, pixels: Tensor) -> list[Tensor]:
    """``GroundingDecoder.encode`` without autocast to bfloat16 on a CPU that is faster in float32."""
    kind = pixels.device.type
    is_wide = kind == "cpu" and torch.is_autocast_enabled(kind) and is_slower_in_bfloat16()
    with torch.autocast(kind, enabled=False) if is_wide else nullcontext():
        return GroundingDecoder.encode(grounding, pixels)


def wide_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention; on a CPU that is faster in float32, bfloat16 is taken in that and rounded once.

    Args:
        query: (R, heads, n, d). key, value: (R, key-value heads, columns, d).
        attention_mask: (R, 1, n, columns) additive, or None.

    Returns:
        (R, n, heads, d), and no weights.
    """
    kind, dtype = query.device.type, query.dtype
    if dtype != torch.bfloat16 or not is_slower_in_bfloat16():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0], None
    mask = attention_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast(kind, enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
    return output.to(dtype), None


AttentionInterface.register(WIDE, wide_attention)
AttentionMaskInterface.register(WIDE, sdpa_mask)


def pack_matrix(matrix: Tensor) -> Tensor:
    """Return a matrix (out, in) in oneDNN's blocked layout for few rows of input, which serves many as well."""
    return torch.as_tensor(torch.ops.mkldnn._reorder_linear_weight(matrix, 8))


class FrozenProduct(torch.autograd.Function):
    """``layer.product(x)``, with the gradient of ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear | WidenedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.product_back(gradients[0]), None


class PackedLinear(nn.Linear):
    """A frozen ``nn.Linear`` whose matrix is kept in oneDNN's blocked layout alone; CPU, float32 or bfloat16.

    Made by :func:`pack_frozen_linears`. The backward pass unpacks the matrix for a moment. The matrix is no parameter
    any more: nothing that reads weights by name sees it, so a model is packed last, and saved by what trains.
    """

    packed: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in), unpacked: a copy."""
        return self.packed.to_dense()

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    def add_to_matrix(self, delta: Tensor, undo: ExitStack) -> None:
        """Add (out, in) to the matrix; ``undo`` restores it."""
        undo.callback(setattr, self, "packed", self.packed)
        self.packed = pack_matrix(self.weight + delta)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the matrix's dtype."""
        return torch.as_tensor(FrozenProduct.apply(x.to(self.packed.dtype).contiguous(), self))

    def product(self, x: Tensor) -> Tensor:
        return torch.as_tensor(torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], ""))

    def product_back(self, gradient: Tensor) -> Tensor:
        return gradient.to(self.packed.dtype) @ self.weight


class WidenedLinear(nn.Linear):
    """A frozen bfloat16 ``nn.Linear`` whose products are taken in float32 and rounded once.

    Made by :func:`widen_frozen_linears`; the weight stays the parameter that it was.
    """

    widens = True

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the matrix's dtype."""
        return torch.as_tensor(FrozenProduct.apply(x.to(self.weight.dtype), self))

    def product(self, x: Tensor) -> Tensor:
        wide = x.flatten(0, -2).float()
        output = x.new_empty(len(wide), self.out_features)
        with torch.autocast(x.device.type, enabled=False):
            for rows, part in self._slices():
                bias = None if self.bias is None else self.bias[rows].float()
                output[:, rows] = F.linear(wide, part, bias)
        return output.view(*x.shape[:-1], -1)

    def product_back(self, gradient: Tensor) -> Tensor:
        wide = gradient.flatten(0, -2).float()
        total = wide.new_zeros(len(wide), self.in_features)
        with torch.autocast(wide.device.type, enabled=False):
            for rows, part in self._slices():
                total.addmm_(wide[:, rows], part)
        return total.to(gradient.dtype).view(*gradient.shape[:-1], -1)

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the matrix and their values in float32, which last until the next ones."""
        count = max(SLICE_STEP, SLICE_VALUES // self.in_features // SLICE_STEP * SLICE_STEP)
        buffer = torch.empty(min(count, self.out_features), self.in_features)
        for start in range(0, self.out_features, count):
            values = self.weight[start : start + count]
            yield slice(start, start + len(values)), buffer[: len(values)].copy_(values)


def _frozen_linears(model: nn.Module, dtypes: Collection[torch.dtype]) -> list[nn.Linear]:
    # DoRA looks at the matrix that it adapts in every forward pass.
    read = {
        module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer) and module.lora_variant
    }
    layers = [module for module in model.modules() if type(module) is nn.Linear and module not in read]
    return [layer for layer in layers if layer.weight.dtype in dtypes and not layer.weight.requires_grad]


def widen_frozen_linears(model: nn.Module) -> int:
    """Let every frozen bfloat16 ``nn.Linear`` inside ``model`` compute in float32; return how many there are."""
    layers = _frozen_linears(model, [torch.bfloat16])
    for layer in layers:
        layer.__class__ = WidenedLinear
    return len(layers)


def pack_frozen_linears(model: nn.Module, dtypes: Collection[torch.dtype] = (torch.float32, torch.bfloat16)) -> int:
    """Turn every frozen ``nn.Linear`` of ``dtypes`` inside ``model`` into a :class:`PackedLinear`; return how many.

    Raises:
        EnvironmentProblem: this torch or processor has no such layout, or the weights are not on the CPU.
    """
    layers = _frozen_linears(model, dtypes)
    for layer in layers:
        matrix = layer.weight.detach()
        if matrix.device.type != "cpu" or not can_pack(matrix.dtype):
            seen, expected = f"{matrix.dtype} on {matrix.device}", "a dtype that oneDNN packs on this processor"
            what, fix = "frozen weights cannot be packed", "set it to auto or off"
            raise EnvironmentProblem(explain(what, "speed.pack_weights", seen, expected, fix))
        del layer.weight
        layer.__class__ = PackedLinear
        layer.packed = pack_matrix(matrix)
    return len(layers)


def can_pack(dtype: torch.dtype = torch.float32) -> bool:
    """Tell whether this torch has oneDNN's packed linear layer, and this processor its kernels for ``dtype``."""
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


def convert_matrices(model: Sa2VA, config: Config, device: torch.device) -> None:
    """Widen or pack the frozen matrices where ``speed.pack_weights`` says so.

    ``auto`` does so on a CPU: bfloat16 is widened where float32 is faster, what gains from packing is packed. Float32
    matrices that autocast would round are left alone. Call it after weights were loaded, before training: packed
    matrices are no parameters any more. The output head stays plain where trained rows are written into it.
    """
    choice = config.speed.pack_weights
    is_off = choice == "off" or (choice == "auto" and device.type != "cpu")
    # A packed matrix can be neither sharded nor traced.
    if is_off or config.train.parallel == "fsdp" or config.speed.compile:
        return
    precision = config.train.mixed_precision
    is_full = precision == "no" or (precision == "auto" and config.model.dtype != "bfloat16")
    dtypes = [torch.bfloat16, *([torch.float32] if is_full else [])]
    if choice == "auto":
        dtypes = [dtype for dtype in dtypes if gains_from_packing(dtype)]
    language = model.mllm if model.new_token_rows is None else model.mllm.model
    for part in (language, model.grounding_encoder.vision_encoder):
        if choice == "auto" and is_slower_in_bfloat16():
            widen_frozen_linears(part)
        pack_frozen_linears(part, dtypes)

"""Adapters and frozen matrices that cost less, with the values and gradients of the stock ones up to rounding.

* :class:`FusedLora`: ``W x + s B A x`` as the frozen product, one into the low rank, and one that adds into the output.
  The stock layer makes a float32 copy of the input, and writes the wide output three more times.
* :func:`sixteen_bit_dropout`: four random numbers from each draw of the generator instead of one.
* :class:`PackedLinear`: a frozen matrix in oneDNN's blocked layout (CPU). The stock product brings the matrix into
  such a layout at every call, which for a few rows takes longer than the product.
* :class:`WidenedLinear`: a frozen bfloat16 matrix on a CPU that is faster in float32 (``model.cpu_bfloat16``),
  multiplied in float32 a slice at a time. Where bfloat16 is emulated, torch's own products are five to a hundred times
  slower.
* :class:`HybridLinear`: both, where bfloat16 is faster for few rows and float32 for many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from dual_loop.errors import EnvironmentProblem, explain
from dual_loop.model import cpu_bfloat16

_SCALE = 2**16
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


class FusedLora(LoraLinear):
    """peft's LoRA layer with a lean forward; parameters, names and switches are peft's.

    Made by :func:`fuse_adapters` from an existing layer. Merged, mixed and variant adapters take peft's own path.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out), in the dtype of the frozen layer's output."""
        if self._disable_adapters and not self.merged:
            return torch.as_tensor(self.base_layer(x))
        names = [name for name in self.active_adapters if name in self.lora_A]
        is_plain = len(names) == 1 and not (args or kwargs or self.merged or self.disable_adapters or self.lora_variant)
        if not is_plain:
            return torch.as_tensor(super().forward(x, *args, **kwargs))
        name = names[0]
        output = self.base_layer(x)
        down, up = self._weights(name)
        dropout = self.lora_dropout[name]
        rate = float(getattr(dropout, "p", 0.0)) if self.training else 0.0
        if isinstance(self.base_layer, (WidenedLinear, HybridLinear)) and self.base_layer.widens(x):
            with torch.autocast(x.device.type, enabled=False):
                low = _low_rank(x, down, rate, self.scaling[name], down.dtype)
                return torch.as_tensor((output + F.linear(low, up)).to(output.dtype))
        dtype = x.dtype if torch.is_autocast_enabled(x.device.type) else down.dtype
        low = _low_rank(x, down, rate, self.scaling[name], dtype)
        if not torch.is_grad_enabled() and output.dtype == low.dtype:
            # Autocast keeps what it casts for ``linear`` until its context ends; decoding calls this for every token.
            return torch.as_tensor(output.add_(F.linear(low, up)))
        added = torch.addmm(output.flatten(0, -2).to(low.dtype), low.flatten(0, -2), up.to(low.dtype).t())
        return added.view(output.shape).to(output.dtype)

    def _weights(self, name: str) -> tuple[Tensor, Tensor]:
        layers: tuple[Any, Any] = self.lora_A[name], self.lora_B[name]
        return layers[0].weight, layers[1].weight


def fuse_adapters(model: nn.Module) -> int:
    """Let every LoRA layer of ``model`` use the lean forward; return how many there are."""
    layers = [module for module in model.modules() if type(module) is LoraLinear]
    for layer in layers:
        layer.__class__ = FusedLora
    return len(layers)


def _low_rank(x: Tensor, down: Tensor, rate: float, scale: float, dtype: torch.dtype) -> Tensor:
    """Return ``s A dropout(x)``, (..., rank). What the dropout divides by goes to the narrow side."""
    kept, factor = sixteen_bit_dropout(x, rate)
    return F.linear(kept.to(dtype), down) * (scale * factor)


def sixteen_bit_dropout(x: Tensor, rate: float) -> tuple[Tensor, float]:
    """Dropout whose rate is rounded to a multiple of 1 / 65,536 (0.05 becomes 0.050003); 0 returns ``x`` itself.

    Args:
        x: (...) float.
        rate: share of values that become 0, 0..1.

    Returns:
        ``x`` with zeros, and the factor that is still to be multiplied with: 1 / the share that stays, 1.0 where none
        does. Behind a linear map into fewer values it costs less.
    """
    threshold = round(rate * _SCALE)
    if threshold == 0:
        return x, 1.0
    if threshold >= _SCALE:
        return x * 0.0, 1.0
    numbers = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept = numbers.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - _SCALE // 2
    # Of this, the graph keeps one byte a value; of a product with the mask it would keep the mask in x's dtype.
    return torch.where(kept, x, x.new_zeros(())), _SCALE / (_SCALE - threshold)


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
    return is_there and (dtype != torch.bfloat16 or cpu_bfloat16.has_kernels())


def gains_from_packing(dtype: torch.dtype = torch.float32) -> bool:
    """Tell whether packed matrices of ``dtype`` are worth it: the layout is there, and stock products are slower.

    MKL's float32 products on Intel's processors are not: 8 rows with 512 x 1536 take 0.13 ms either way, on AMD's 0.35
    and 0.14, and the backward pass need not unpack. The processor's name decides, not a measurement, so that a run and
    its continuation take the same kernels.
    """
    is_intel = "intel" in str(torch.cpu.get_capabilities().get("cpu_name", "")).lower()
    is_lean = dtype == torch.float32 and is_intel and torch.backends.mkl.is_available()
    return can_pack(dtype) and not is_lean

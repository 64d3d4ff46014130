"""``W x + s B A x`` as the frozen product, one into the low rank, and one that adds into the output.

peft's layer makes a float32 copy of the input, and writes the wide output three more times.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from dual_loop.config import Config
from dual_loop.model.sa2va import Sa2VA

_SCALE = 2**16


class FusedLora(LoraLinear):
    """peft's LoRA layer with a lean forward; parameters, names and switches are peft's.

    Made by :func:`fuse_adapters` from an existing layer. Merged, mixed and variant adapters take peft's own path.
    """

    @property
    def plain_adapter(self) -> str | None:
        """The adapter in use, None where there is none, several, a merged one or a variant."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        is_plain = len(names) == 1 and not (self.merged or self.disable_adapters or self.lora_variant)
        return names[0] if is_plain else None

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(..., in) -> (..., out), in the dtype of the frozen layer's output."""
        if self._disable_adapters and not self.merged:
            return torch.as_tensor(self.base_layer(x))
        name = self.plain_adapter
        if name is None or args or kwargs:
            return torch.as_tensor(super().forward(x, *args, **kwargs))
        output = self.base_layer(x)
        down, up = (cast(Tensor, layers[name].weight) for layers in (self.lora_A, self.lora_B))
        rate = float(getattr(self.lora_dropout[name], "p", 0.0)) if self.training else 0.0
        kind = x.device.type
        widens = getattr(self.base_layer, "widens", False)  # a bfloat16 matrix that this CPU multiplies in float32
        dtype = x.dtype if torch.is_autocast_enabled(kind) and not widens else down.dtype
        kept, factor = sixteen_bit_dropout(x, rate)
        with torch.autocast(kind, enabled=False) if widens else nullcontext():
            # What the dropout divides by goes to the narrow side.
            low = F.linear(kept.to(dtype), down) * (self.scaling[name] * factor)
            if not torch.is_grad_enabled() and output.dtype == low.dtype:
                # Autocast keeps what it casts for ``linear`` until its context ends, and decoding calls this often.
                return torch.as_tensor(output.add_(F.linear(low, up)))
            added = torch.addmm(output.flatten(0, -2).to(low.dtype), low.flatten(0, -2), up.to(low.dtype).t())
        return added.view(output.shape).to(output.dtype)


TokenProjection = Callable[[Tensor], Tensor]


def token_projection(layer: nn.Module) -> TokenProjection:
    """Return what ``layer`` makes of a few rows (R, in), with its weights of this moment; no graph.

    Under autocast an adapter is cast here, once, and its scale goes into the narrow matrix.
    """
    if not isinstance(layer, FusedLora):
        return layer
    base: nn.Module = layer.base_layer
    if layer.disable_adapters and not layer.merged:
        return base
    name = layer.plain_adapter
    if name is None or getattr(base, "widens", False):
        return layer
    down, up = (cast(Tensor, layers[name].weight) for layers in (layer.lora_A, layer.lora_B))
    if not torch.is_autocast_enabled(down.device.type):
        return layer
    dtype = torch.get_autocast_dtype(down.device.type)
    narrow, wide = down.to(dtype).t(), (up * layer.scaling[name]).to(dtype).t()
    return lambda x: base(x).addmm_(x @ narrow, wide)  # type: ignore[no-any-return]


def apply(model: Sa2VA, config: Config) -> None:
    """Let the adapters of the language model use the lean forward."""
    fuse_adapters(model.mllm.model.language_model)


def fuse_adapters(model: nn.Module) -> int:
    """Let every LoRA layer of ``model`` use the lean forward; return how many there are."""
    layers = [module for module in model.modules() if type(module) is LoraLinear]
    for layer in layers:
        layer.__class__ = FusedLora
    return len(layers)


def sixteen_bit_dropout(x: Tensor, rate: float) -> tuple[Tensor, float]:
    """Dropout that draws four of its random numbers from each of the generator's.

    Its rate is rounded to a multiple of 1 / 65,536 (0.05 becomes 0.050003); 0 returns ``x`` itself.

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

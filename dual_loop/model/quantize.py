"""Frozen matrices of the language model in four bits: NF4 with double quantisation (QLoRA, 2305.14314).

bitsandbytes packs them and unpacks each before a product; adapters, and what flows, keep the precision of the run.
"""

from __future__ import annotations

from typing import cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from dual_loop.model.sa2va import Sa2VA

BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a value: four bits, a byte for 64 values, and a float32 for 256 of these."""


def quantize_frozen(model: Sa2VA, device: torch.device) -> str:
    """Pack the matrices that LoRA adapts, which lie on ``device``, one at a time; return a line to print.

    Their memory is free afterwards, and no export can be made of ``model`` any more.
    """
    import bitsandbytes  # an extra

    layers = [module for module in model.mllm.model.language_model.modules() if isinstance(module, LoraLayer)]
    before, after = 0.0, 0.0
    for layer in layers:
        base = cast(nn.Linear, layer.get_base_layer())
        packed = bitsandbytes.nn.Linear4bit(
            *(base.in_features, base.out_features, base.bias is not None),
            **{"compute_dtype": base.weight.dtype, "quant_type": "nf4", "device": "meta"},
        )
        weight = bitsandbytes.nn.Params4bit(base.weight.data, requires_grad=False, quant_type="nf4")
        packed.weight, packed.bias = weight.to(device), base.bias  # ``to`` is what packs
        packed.register_forward_pre_hook(cast_input)
        before, after = before + base.weight.nbytes, after + packed.weight.nbytes
        layer.base_layer = packed
    return f"✓ {len(layers)} frozen matrices in NF4: {before / 2**20:,.0f} -> {after / 2**20:,.0f} MiB"


def cast_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast the input as autocast does for a plain product: what bitsandbytes returns has the input's dtype."""
    kind = inputs[0].device.type
    return (inputs[0].to(torch.get_autocast_dtype(kind)),) if torch.is_autocast_enabled(kind) else inputs

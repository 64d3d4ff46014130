"""One linear layer with an adapter, and its values and gradients, for tests."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn


def adapted(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(24, 40, dtype=dtype))
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], lora_dropout=dropout), model)
    nn.init.normal_(model.q_proj.lora_B["default"].weight)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def run(model: nn.Module, x: torch.Tensor, autocast: bool = False) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    (y.float() ** 2).sum().backward()
    layer = model.q_proj
    return y.detach(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad

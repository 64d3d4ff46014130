"""Two layers of which one matrix is frozen, for tests of averages and of weights that stand in for others."""

from __future__ import annotations

import torch

from dual_loop.model.ema import ExponentialMovingAverage


def two_layers(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)
    model[0].weight.requires_grad_(False)
    return model


def average_of(model: torch.nn.Module, **options) -> ExponentialMovingAverage:
    return ExponentialMovingAverage(dict(model.named_parameters()), **options)


def move(model: torch.nn.Module, amount: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * amount)


def copies_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def bitwise_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    integer = {4: torch.int32, 2: torch.int16}[first.element_size()]
    return torch.equal(first.view(integer), second.view(integer))

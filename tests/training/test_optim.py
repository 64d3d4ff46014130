"""AdamW groups and the learning-rate schedule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_loop.config import TrainConfig
from dual_loop.training.optim import build_optimizer, learning_rate_at


def test_only_matrices_decay() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(dict(layer.named_parameters()), TrainConfig(weight_decay=0.5, learning_rate=0.1))
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(layer.bias, before["bias"])
    torch.testing.assert_close(layer.weight, before["weight"] * (1 - 0.1 * 0.5))


def test_a_model_of_matrices_alone_has_one_group() -> None:
    parameters = {"w": torch.nn.Parameter(torch.ones(2, 2))}
    assert len(build_optimizer(parameters, TrainConfig()).param_groups) == 1


def test_schedule_by_hand() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_ratio=0.2, min_lr_ratio=0.1)
    rates = [learning_rate_at(step, 10, config) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 8))
    assert rates[6] == pytest.approx(expected)
    assert learning_rate_at(10, 10, config) == pytest.approx(0.1)


@given(
    total=st.integers(1, 500),
    warmup=st.floats(0, 1),
    floor=st.floats(0, 1),
    step=st.integers(0, 600),
)
def test_rate_stays_between_zero_and_peak(total: int, warmup: float, floor: float, step: int) -> None:
    config = TrainConfig(learning_rate=2.0, warmup_ratio=warmup, min_lr_ratio=floor)
    assert 0 <= learning_rate_at(step, total, config) <= 2.0 + 1e-12
    assert learning_rate_at(0, total, config) > 0

"""The weight average: schedule, values by hand, swapping and restoring, state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dual_loop.model.ema import ExponentialMovingAverage

from two_layers import average_of, move, two_layers


def test_only_trainable_parameters_are_averaged_in_float32():
    averages = average_of(two_layers(torch.bfloat16)).values
    assert set(averages) == {"0.bias", "1.weight", "1.bias"}
    assert {tensor.dtype for tensor in averages.values()} == {torch.float32}


def test_updates_follow_the_warmup_schedule_by_hand():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    ema = ExponentialMovingAverage({"p": parameter}, decay=0.15)
    expected = 1.0
    for live, decay in ((3.0, 0.1), (5.0, 0.15), (2.0, 0.15)):  # (1 + 1) / (10 + 1) is above 0.15
        parameter.data.fill_(live)
        ema.update()
        expected = decay * expected + (1 - decay) * live
        assert ema.values["p"].item() == pytest.approx(expected, rel=1e-6)
    assert ema.num_updates == 3


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8), decay=st.floats(0, 1))
def test_the_average_stays_between_the_values_seen(values: list[float], decay: float):
    parameter = torch.nn.Parameter(torch.tensor([values[0]]))
    ema = ExponentialMovingAverage({"p": parameter}, decay=decay)
    for value in values:
        parameter.data.fill_(value)
        ema.update()
    average = ema.values["p"].item()
    assert min(values) - 1e-4 <= average <= max(values) + 1e-4


def test_decay_zero_copies_the_live_weights_even_over_a_nan():
    model = two_layers()
    ema = average_of(model, decay=0.0)
    ema.values["1.bias"].fill_(float("nan"))
    move(model)
    ema.update()
    for name, average in ema.values.items():
        assert torch.equal(average, dict(model.named_parameters())[name])


def test_a_bfloat16_model_still_moves_its_average():
    parameter = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    ema = ExponentialMovingAverage({"p": parameter}, decay=0.999)
    ema.num_updates = 10_000  # the warm-up is over
    parameter.data.fill_(1.0078125)  # the next bfloat16 after 1
    ema.update()
    assert ema.values["p"].item() == pytest.approx(1 + 0.0078125 * 0.001, abs=2e-7)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="out of range"):
        average_of(two_layers(), decay=1.5)
    with pytest.raises(ValueError, match="nothing to average"):
        average_of(two_layers().requires_grad_(False))

"""The weight average: schedule, values by hand, swapping and restoring, state."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dual_loop.errors import CheckpointError
from dual_loop.model.ema import ExponentialMovingAverage


def _model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)
    model[0].weight.requires_grad_(False)
    return model


def _average(model: torch.nn.Module, **options) -> ExponentialMovingAverage:
    return ExponentialMovingAverage(dict(model.named_parameters()), **options)


def _move(model: torch.nn.Module, amount: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * amount)


def _copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _bitwise_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    integer = {4: torch.int32, 2: torch.int16}[first.element_size()]
    return torch.equal(first.view(integer), second.view(integer))


def test_only_trainable_parameters_are_averaged_in_float32():
    averages = _average(_model(torch.bfloat16)).state_dict()["averages"]
    assert set(averages) == {"0.bias", "1.weight", "1.bias"}
    assert {tensor.dtype for tensor in averages.values()} == {torch.float32}


def test_updates_follow_the_warmup_schedule_by_hand():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    ema = ExponentialMovingAverage({"p": parameter}, decay=0.15)
    assert ema.current_decay == pytest.approx(0.1)  # (1 + 0) / (10 + 0)
    expected = 1.0
    for live, decay in ((3.0, 0.1), (5.0, 0.15), (2.0, 0.15)):  # (1 + 1) / (10 + 1) is above 0.15
        parameter.data.fill_(live)
        ema.update()
        expected = decay * expected + (1 - decay) * live
        assert ema.state_dict()["averages"]["p"].item() == pytest.approx(expected, rel=1e-6)
    assert ema.num_updates == 3


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8), decay=st.floats(0, 1))
def test_the_average_stays_between_the_values_seen(values: list[float], decay: float):
    parameter = torch.nn.Parameter(torch.tensor([values[0]]))
    ema = ExponentialMovingAverage({"p": parameter}, decay=decay)
    for value in values:
        parameter.data.fill_(value)
        ema.update()
    average = ema.state_dict()["averages"]["p"].item()
    assert min(values) - 1e-4 <= average <= max(values) + 1e-4


def test_decay_zero_copies_the_live_weights_even_over_a_nan():
    model = _model()
    ema = _average(model, decay=0.0)
    ema.state_dict()["averages"]["1.bias"].fill_(float("nan"))
    _move(model)
    ema.update()
    for name, average in ema.state_dict()["averages"].items():
        assert torch.equal(average, dict(model.named_parameters())[name])


def test_a_bfloat16_model_still_moves_its_average():
    parameter = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    ema = ExponentialMovingAverage({"p": parameter}, decay=0.999)
    ema.num_updates = 10_000  # the warm-up is over
    parameter.data.fill_(1.0078125)  # the next bfloat16 after 1
    ema.update()
    assert ema.state_dict()["averages"]["p"].item() == pytest.approx(1 + 0.0078125 * 0.001, abs=2e-7)


def test_state_round_trip_continues_identically():
    model = _model()
    ema = _average(model)
    for _ in range(3):
        _move(model)
        ema.update()
    saved = copy.deepcopy(ema.state_dict())
    other = _average(model)
    other.load_state_dict(saved)
    _move(model)
    ema.update()
    other.update()
    assert other.num_updates == ema.num_updates == 4
    for name, average in ema.state_dict()["averages"].items():
        assert torch.equal(average, other.state_dict()["averages"][name])


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "dtype", "malformed"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(fault: str):
    model = _model()
    ema = _average(model)
    state = copy.deepcopy(ema.state_dict())
    state["num_updates"] = 9
    for tensor in state["averages"].values():
        tensor.add_(1)
    if fault == "missing":
        del state["averages"]["1.bias"]
    elif fault == "unexpected":
        state["averages"]["2.bias"] = torch.zeros(1)
    elif fault == "shape":
        state["averages"]["1.bias"] = torch.zeros(5)
    elif fault == "dtype":
        state["averages"]["1.bias"] = state["averages"]["1.bias"].bfloat16()
    else:
        state = state["averages"]
    before = copy.deepcopy(ema.state_dict())
    with pytest.raises(CheckpointError, match="malformed" if fault == "malformed" else "does not fit"):
        ema.load_state_dict(state)
    assert ema.num_updates == before["num_updates"]
    assert all(torch.equal(t, before["averages"][n]) for n, t in ema.state_dict()["averages"].items())


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="out of range"):
        _average(_model(), decay=1.5)
    with pytest.raises(ValueError, match="nothing to average"):
        _average(_model().requires_grad_(False))

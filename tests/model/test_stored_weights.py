"""Weights that stand in for others: lent for a while, given back bitwise, kept in memory or in a file."""

from __future__ import annotations

import tempfile

import pytest
import torch

from dual_loop.errors import EnvironmentProblem
from dual_loop.model.stored_weights import StartingWeights, weights

from two_layers import average_of, bitwise_equal, copies_of, move, two_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_lends_the_averages_and_restores_bitwise(dtype: torch.dtype):
    model = two_layers(dtype)
    ema = average_of(model)
    move(model)
    ema.update()
    move(model)
    model[1].bias.data[0] = float("nan")  # equality would not see a NaN; the bits must come back too
    live, frozen_storage = copies_of(model), model[0].weight.data_ptr()
    with weights(ema):
        for name, average in ema.values.items():
            assert torch.equal(dict(model.named_parameters())[name], average.to(dtype))
        assert torch.equal(model[0].weight, live["0.weight"])
    assert all(bitwise_equal(parameter, live[name]) for name, parameter in model.named_parameters())
    assert model[0].weight.data_ptr() == frozen_storage


def test_swapping_restores_after_an_exception_and_keeps_training_possible():
    model = two_layers()
    ema = average_of(model)
    move(model)
    live = copies_of(model)

    def fail_inside() -> None:
        with weights(ema):
            model[1].weight.data.zero_()
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail_inside()
    assert all(bitwise_equal(parameter, live[name]) for name, parameter in model.named_parameters())
    model(torch.randn(2, 3)).sum().backward()
    assert model[1].weight.grad is not None
    ema.update()


def test_updating_or_nesting_inside_a_swap_is_refused():
    model = two_layers()
    ema = average_of(model)
    move(model)
    live = copies_of(model)
    with weights(ema):
        with pytest.raises(RuntimeError, match="updated while"):
            ema.update()
        with pytest.raises(RuntimeError, match="nested"), weights(ema):
            pass
    assert all(bitwise_equal(parameter, live[name]) for name, parameter in model.named_parameters())


def test_bfloat16_autocast_sees_the_weights_that_were_put_in_and_those_that_came_back():
    model, x = torch.nn.Linear(3, 3), torch.randn(2, 3)
    starting = StartingWeights(dict(model.named_parameters()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = model(x)
        model.weight.mul_(-2.0)
        torch.clear_autocast_cache()
        live = model(x)
        with weights(starting):
            assert torch.equal(model(x), first)
        assert torch.equal(model(x), live)
    assert not torch.equal(first, live)


def test_starting_weights_on_disk_are_those_in_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    torch.manual_seed(0)
    parameters = {
        "matrix": torch.nn.Parameter(torch.randn(3, 5)),
        "turned": torch.nn.Parameter(torch.randn(4, 2).t()),
        "half": torch.nn.Parameter(torch.randn(7).bfloat16()),
        "single": torch.nn.Parameter(torch.tensor(2.5)),
        "empty": torch.nn.Parameter(torch.zeros(0, 3)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
    }
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    starting = StartingWeights(parameters, on_disk=True)
    assert not list(tmp_path.iterdir()), "the file has no name"
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1.0)
    for _ in range(2):
        with weights(starting):
            for name, parameter in parameters.items():
                assert torch.equal(parameter, before[name] + (name == "frozen")), name
        assert all(torch.equal(p, before[name] + 1.0) for name, p in parameters.items())
    assert "frozen" not in starting.values
    assert len(starting.values) == 5


def test_starting_weights_that_cannot_be_stored_say_where(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(EnvironmentProblem, match="start_on_disk"):
        StartingWeights({"a": torch.nn.Parameter(torch.ones(2))}, on_disk=True)

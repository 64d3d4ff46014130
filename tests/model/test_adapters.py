"""Adapters added to their matrices for a while: the same values, and no trace of it whatever happens inside."""

from __future__ import annotations

import pytest
import torch

from dual_loop.accelerate.cpu import can_pack, pack_frozen_linears
from dual_loop.accelerate.lora import fuse_adapters
from dual_loop.model.decode import merged_adapters

from small_adapter import adapted

needs_packing = pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN packed linear layer")


@pytest.mark.parametrize("is_packed", [False, pytest.param(True, marks=needs_packing)])
def test_merged_adapters_write_the_same_and_leave_no_trace(is_packed: bool) -> None:
    model, x = adapted(), torch.randn(3, 24)
    fuse_adapters(model)
    expected, before = model(x), model.q_proj.base_layer.weight.clone()
    if is_packed:
        pack_frozen_linears(model)
    with torch.no_grad(), merged_adapters(model):
        assert model.q_proj.disable_adapters
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert not model.q_proj.disable_adapters
    assert torch.equal(model.q_proj.base_layer.weight, before)
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_bfloat16_matrices_keep_their_adapters() -> None:
    model = adapted(torch.bfloat16)
    with merged_adapters(model):
        assert not model.q_proj.disable_adapters


@pytest.mark.parametrize("is_packed", [False, pytest.param(True, marks=needs_packing)])
@pytest.mark.parametrize("fails", ["inside", "while merging"])
def test_whatever_fails_the_matrices_come_back(fails: str, is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.ModuleList([adapted(), adapted()])
    layers, before = [one.q_proj for one in model], [one.q_proj.base_layer.weight.clone() for one in model]
    if is_packed:
        pack_frozen_linears(model)
    if fails == "while merging":
        monkeypatch.setattr(layers[1], "get_delta_weight", lambda name: 1 / 0)

    def fail() -> None:
        with merged_adapters(model):
            assert all(layer.disable_adapters for layer in layers)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for layer, matrix in zip(layers, before, strict=True):
        assert torch.equal(layer.base_layer.weight, matrix)
        assert not layer.disable_adapters


def test_an_adapter_that_was_off_stays_off() -> None:
    model = torch.nn.ModuleList([adapted(), adapted()])
    model[0].q_proj._disable_adapters = True
    before = model[0].q_proj.base_layer.weight.clone()
    with merged_adapters(model):
        assert torch.equal(model[0].q_proj.base_layer.weight, before)
    assert [one.q_proj.disable_adapters for one in model] == [True, False]

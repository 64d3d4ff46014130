"""Adapters added to their matrices for a while: the same values, and no trace of it whatever happens inside."""

from __future__ import annotations

import pytest
import torch

from dual_loop.accelerate.cpu import can_pack, pack_frozen_linears
from dual_loop.accelerate.lora import fuse_adapters
from dual_loop.model.adapters import merged_adapters

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

"""Packed and widened matrices, attention and precision on a CPU against the stock ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dual_loop.accelerate import cpu
from dual_loop.accelerate.cpu import (
    PackedLinear,
    WidenedLinear,
    can_pack,
    convert_matrices,
    gains_from_packing,
    pack_frozen_linears,
    wide_attention,
    widen_frozen_linears,
)
from dual_loop.accelerate.lora import fuse_adapters
from dual_loop.errors import EnvironmentProblem

from bench.phases import ProductCounter
from small_adapter import adapted, run
from small_model import small_config, small_model

needs_packing = pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN packed linear layer")
needs_bfloat16 = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this processor has no bfloat16 kernels")


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 50])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [pytest.param(torch.bfloat16, 2e-2, marks=needs_bfloat16), (torch.float32, 1e-5)]
)
def test_a_packed_matrix_gives_the_stock_values_and_gradients(
    bias: bool, rows: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    stock = nn.Linear(48, 72, bias=bias, dtype=dtype).requires_grad_(False)
    packed = copy.deepcopy(stock)
    assert pack_frozen_linears(packed) == 1
    assert torch.equal(packed.weight, stock.weight)
    x = torch.randn(2, rows, 48, dtype=dtype)
    results = []
    for layer in (stock, packed):
        leaf = x.clone().requires_grad_(True)
        y = layer(leaf)
        y.float().square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for seen, expected in zip(results[1], results[0], strict=True):
        assert torch.allclose(seen.float(), expected.float(), rtol=tolerance, atol=tolerance)


@needs_bfloat16
def test_only_frozen_bfloat16_matrices_are_packed() -> None:
    model = adapted(torch.bfloat16)
    model.add_module("trained", nn.Linear(4, 4, dtype=torch.bfloat16))
    model.add_module("single", nn.Linear(4, 4).requires_grad_(False))
    assert pack_frozen_linears(model, [torch.bfloat16]) == 1
    assert isinstance(model.q_proj.base_layer, PackedLinear)
    assert type(model.trained) is type(model.single) is nn.Linear
    assert "q_proj.base_layer.weight" not in dict(model.named_parameters())
    fuse_adapters(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.q_proj(torch.randn(3, 24, dtype=torch.bfloat16)).shape == (3, 40)


@needs_packing
def test_weights_elsewhere_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16, device="meta").requires_grad_(False))
    with pytest.raises(EnvironmentProblem, match="pack_weights"):
        pack_frozen_linears(model)


@pytest.mark.parametrize("slower", [True, False])
def test_attention_is_taken_in_float32_where_that_is_faster(slower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dual_loop.accelerate.cpu.is_slower_in_bfloat16", lambda: slower)
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    shapes = ((2, 8, 40, 16), (2, 2, 40, 16), (2, 2, 40, 16))
    leaves = [torch.randn(shape).bfloat16().requires_grad_(True) for shape in shapes]
    exact = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    mask = torch.zeros(40, 40).masked_fill_(~torch.ones(40, 40, dtype=torch.bool).tril(), -1e4)[None, None]
    with torch.autocast("cpu", torch.bfloat16):
        seen, _ = wide_attention(module, *leaves, mask.bfloat16(), scaling=0.25)
    expected, _ = sdpa_attention_forward(module, *exact, mask.double(), scaling=0.25)
    seen.float().square().sum().backward()
    expected.square().sum().backward()
    assert seen.dtype == torch.bfloat16
    bound = 2**-8 if slower else 2**-5  # one rounding, or one of each intermediate value
    assert torch.allclose(seen.double(), expected, rtol=bound, atol=1e-5 if slower else bound)
    for leaf, true in zip(leaves, exact, strict=True):
        assert (leaf.grad.double() - true.grad).abs().max() <= 2 * bound * true.grad.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 50])
def test_a_widened_matrix_rounds_once(bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dual_loop.accelerate.cpu.SLICE_VALUES", 48 * 10)
    torch.manual_seed(0)
    layer = nn.Linear(48, 72, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    exact = copy.deepcopy(layer).double()
    assert widen_frozen_linears(nn.Sequential(layer)) == 1
    x = torch.randn(2, rows, 48, dtype=torch.bfloat16, requires_grad=True)
    truth = x.detach().double().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    gradient = torch.randn(y.shape).bfloat16()
    y.backward(gradient)
    expected = exact(truth)
    expected.backward(gradient.double())
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.double(), expected, rtol=2**-8, atol=1e-6)
    assert torch.allclose(x.grad.double(), truth.grad, rtol=2**-8, atol=1e-6)


def test_only_frozen_bfloat16_matrices_are_widened() -> None:
    model = adapted(torch.bfloat16)
    model.add_module("trained", nn.Linear(4, 4, dtype=torch.bfloat16))
    model.add_module("single", nn.Linear(4, 4).requires_grad_(False))
    names = [name for name, _ in model.named_parameters()]
    assert widen_frozen_linears(model) == 1
    assert isinstance(model.q_proj.base_layer, WidenedLinear)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize(("slower", "kernels"), [(True, False), (True, True), (False, True)])
def test_bfloat16_is_packed_by_what_the_processor_is_good_at(
    slower: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels and not can_pack(torch.bfloat16):
        pytest.skip("this processor has no bfloat16 kernels")
    monkeypatch.setattr("dual_loop.accelerate.cpu.is_slower_in_bfloat16", lambda: slower)
    monkeypatch.setattr("dual_loop.model.hardware.has_bfloat16_kernels", lambda: kernels)
    model, _, config = small_model(small_config(dtype="bfloat16"))
    convert_matrices(model, config, torch.device("cpu"))
    language = model.mllm.model.language_model.layers[0].mlp.up_proj.base_layer
    tower = next(m for m in model.mllm.model.vision_tower.modules() if isinstance(m, nn.Linear))
    assert type(language) is type(tower) is (WidenedLinear if slower else PackedLinear)


@needs_packing
@pytest.mark.parametrize(
    ("name", "mkl", "gains"), [("Intel Xeon", True, False), ("AMD EPYC", True, True), ("", False, True)]
)
def test_float32_is_packed_unless_mkl_runs_on_its_own_processors(
    name: str, mkl: bool, gains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"cpu_name": name, "avx512_bf16": True})
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: mkl)
    assert gains_from_packing(torch.float32) is gains
    assert gains_from_packing(torch.bfloat16) is can_pack(torch.bfloat16)
    model, _, config = small_model(small_config())
    convert_matrices(model, config, torch.device("cpu"))
    assert any(isinstance(module, PackedLinear) for module in model.modules()) is gains


@needs_bfloat16
def test_the_speed_of_bfloat16_is_measured_with_real_values_whoever_asks() -> None:
    with ProductCounter() as counter, FakeTensorMode():
        first = cpu.is_slower_in_bfloat16.__wrapped__()
    assert counter.flops == 0
    assert first in (True, False)


@pytest.mark.parametrize(("kernels", "seconds", "slower"), [(False, 0.0, True), (True, 1.3, True), (True, 1.1, False)])
def test_bfloat16_counts_as_slower_by_a_margin(
    kernels: bool, seconds: float, slower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {torch.bfloat16: seconds, torch.float32: 1.0}
    monkeypatch.setattr("dual_loop.model.hardware.has_bfloat16_kernels", lambda: kernels)
    monkeypatch.setattr(cpu, "seconds_of_product", taken.__getitem__)
    assert cpu.is_slower_in_bfloat16.__wrapped__() is slower


def test_an_adapter_of_a_widened_matrix_computes_in_float32() -> None:
    model, x = adapted(torch.bfloat16), torch.randn(64, 24, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()
    fuse_adapters(model)
    widen_frozen_linears(model)
    for seen, true in zip(run(model, x, True), run(exact, x.double()), strict=True):
        assert (seen.double() - true).abs().max() <= 2e-2 * true.abs().max()

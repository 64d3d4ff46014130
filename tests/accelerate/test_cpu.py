"""Lean adapters, fast dropout, packed matrices and grouped attention against the stock ones."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dual_loop.errors import EnvironmentProblem
from dual_loop.model import cpu_bfloat16
from dual_loop.model.adapters import merged_adapters
from dual_loop.model.attention import grouped_attention
from dual_loop.accelerate.cpu import (
    FusedLora,
    HybridLinear,
    PackedLinear,
    WidenedLinear,
    can_pack,
    fuse_adapters,
    gains_from_packing,
    pack_frozen_linears,
    sixteen_bit_dropout,
    widen_frozen_linears,
)
from dual_loop.training.counting import ProductCounter
from dual_loop.training.devices import pack_model

from small_model import small_config, small_model

needs_packing = pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN packed linear layer")
needs_bfloat16 = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this processor has no bfloat16 kernels")


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


def test_the_lean_adapter_is_pefts_in_double_precision() -> None:
    stock, x = adapted().double(), torch.randn(2, 5, 24, dtype=torch.float64)
    lean = copy.deepcopy(stock)
    assert fuse_adapters(lean) == 1
    assert isinstance(lean.q_proj, FusedLora)
    for seen, expected in zip(run(lean, x), run(stock, x), strict=True):
        assert torch.allclose(seen, expected, rtol=1e-12, atol=1e-12)


def test_the_lean_adapter_under_autocast_is_as_near_to_the_truth_as_pefts() -> None:
    stock, x = adapted(torch.bfloat16), torch.randn(64, 24, dtype=torch.bfloat16)
    lean = copy.deepcopy(stock)
    fuse_adapters(lean)
    exact = copy.deepcopy(stock).double()
    truth = run(exact, x.double())
    for seen, peft, true in zip(run(lean, x, True), run(stock, x, True), truth, strict=True):
        assert seen.dtype == peft.dtype
        errors = [(value.double() - true).abs().mean() for value in (seen, peft)]
        assert errors[0] <= 1.5 * errors[1] + 1e-9


def test_switched_off_and_merged_adapters_take_pefts_own_path() -> None:
    lean, x = adapted(), torch.randn(3, 24)
    fuse_adapters(lean)
    with_adapter = lean(x)
    lean.q_proj._disable_adapters = True
    assert torch.equal(lean(x), lean.q_proj.base_layer(x))
    lean.q_proj._disable_adapters = False
    lean.q_proj.merge()
    assert torch.allclose(lean(x), with_adapter, atol=1e-4)


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1001)
    kept, factor = sixteen_bit_dropout(x, 0.05)
    y = kept * factor
    assert float((y == 0).float().mean()) == pytest.approx(0.05, abs=0.001)
    assert float(y.mean()) == pytest.approx(1.0, abs=0.002)
    assert len(y.unique()) == 2
    rows, columns = (y == 0).float().mean(0), (y == 0).float().mean(1)
    assert rows.std() == pytest.approx((0.05 * 0.95 / 1000) ** 0.5, rel=0.15)
    assert columns.std() == pytest.approx((0.05 * 0.95 / 1001) ** 0.5, rel=0.15)


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 1.0), (1e-7, 1.0), (1.0, 0.0)])
def test_dropout_at_its_ends(rate: float, expected: float) -> None:
    kept, factor = sixteen_bit_dropout(torch.ones(7), rate)
    assert float(kept.mean()) * factor == expected


def test_dropout_follows_the_seed_and_reaches_the_adapter_alone_in_training() -> None:
    lean, x = adapted(dropout=0.5), torch.randn(4, 24)
    fuse_adapters(lean)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(lean.train()(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(lean.eval()(x), lean.eval()(x))


def test_the_adapter_hears_its_input_divided_by_the_share_that_dropout_keeps() -> None:
    lean, x = adapted(dropout=0.25).train(), torch.ones(20000, 24)
    fuse_adapters(lean)
    frozen = lean.q_proj.base_layer(x)
    added = (lean(x) - frozen).mean(0).detach()
    expected = (lean.eval()(x) - frozen).mean(0)
    assert torch.allclose(added, expected, atol=0.02 * float(expected.detach().abs().max()))


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
    packed = PackedLinear(copy.deepcopy(stock))
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
    assert not any("base_layer" in name for name, _ in model.named_parameters())
    fuse_adapters(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.q_proj(torch.randn(3, 24, dtype=torch.bfloat16)).shape == (3, 40)


@needs_packing
def test_weights_elsewhere_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16, device="meta").requires_grad_(False))
    with pytest.raises(EnvironmentProblem, match="pack_weights"):
        pack_frozen_linears(model)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("new", [1, 3])
def test_grouped_attention_is_sdpas(masked: bool, new: int) -> None:
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    query, key, value = torch.randn(3, 8, new, 16), torch.randn(3, 2, 9, 16), torch.randn(3, 2, 9, 16)
    mask = torch.zeros(3, 1, new, 9)
    mask[:, :, :, :2] = torch.finfo(torch.float32).min
    for given in (mask, mask == 0) if masked else (None,):
        with torch.no_grad():
            seen, _ = grouped_attention(module, query, key, value, given, scaling=0.25)
            expected, _ = sdpa_attention_forward(module, query, key, value, given, scaling=0.25)
        assert torch.allclose(seen, expected, atol=1e-6)


@pytest.mark.parametrize("slower", [True, False])
def test_attention_is_taken_in_float32_where_that_is_faster(slower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dual_loop.model.cpu_bfloat16.is_slower_than_float32", lambda: slower)
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    shapes = ((2, 8, 40, 16), (2, 2, 40, 16), (2, 2, 40, 16))
    leaves = [torch.randn(shape).bfloat16().requires_grad_(True) for shape in shapes]
    exact = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    mask = torch.zeros(40, 40).masked_fill_(~torch.ones(40, 40, dtype=torch.bool).tril(), -1e4)[None, None]
    with torch.autocast("cpu", torch.bfloat16):
        seen, _ = grouped_attention(module, *leaves, mask.bfloat16(), scaling=0.25)
    expected, _ = sdpa_attention_forward(module, *exact, mask.double(), scaling=0.25)
    seen.float().square().sum().backward()
    expected.square().sum().backward()
    assert seen.dtype == torch.bfloat16
    bound = 2**-8 if slower else 2**-5  # one rounding, or one of each intermediate value
    assert torch.allclose(seen.double(), expected, rtol=bound, atol=1e-5 if slower else bound)
    for leaf, true in zip(leaves, exact, strict=True):
        assert (leaf.grad.double() - true.grad).abs().max() <= 2 * bound * true.grad.abs().max()


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 50])
def test_a_widened_matrix_rounds_once(bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dual_loop.accelerate.cpu._SLICE_VALUES", 48 * 10)
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


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [2, 50])
def test_a_hybrid_matrix_rounds_few_rows_as_packed_ones_and_many_once(
    bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_SLICE_VALUES", 48 * 20), ("_PART_VALUES", 48 * 64), ("_MANY_ROWS", 96)):
        monkeypatch.setattr(f"dual_loop.accelerate.cpu.{name}", value)
    torch.manual_seed(0)
    stock = nn.Linear(48, 72, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    exact, packed = copy.deepcopy(stock).double(), PackedLinear(copy.deepcopy(stock))
    layer = HybridLinear(stock)
    assert [part.shape[0] for part in layer.parts] == [64, 8]
    x = torch.randn(2, rows, 48, dtype=torch.bfloat16)
    assert layer.widens(x) == (rows == 50)
    with torch.no_grad():
        seen = layer(x)
        if rows == 2:
            assert torch.allclose(seen.float(), packed(x).float(), rtol=2**-7, atol=2**-7)
    leaf, truth = x.clone().requires_grad_(True), x.double().requires_grad_(True)
    gradient = torch.randn(seen.shape).bfloat16()
    y, expected = layer(leaf), exact(truth)
    y.backward(gradient)
    expected.backward(gradient.double())
    assert torch.allclose(y.double(), expected, rtol=2**-8, atol=1e-6)
    assert torch.allclose(leaf.grad.double(), truth.grad, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("slower", "kernels"), [(True, False), (True, True), (False, True)])
def test_bfloat16_is_packed_by_what_the_processor_is_good_at(
    slower: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels and not can_pack(torch.bfloat16):
        pytest.skip("this processor has no bfloat16 kernels")
    monkeypatch.setattr("dual_loop.model.cpu_bfloat16.is_slower_than_float32", lambda: slower)
    monkeypatch.setattr("dual_loop.model.cpu_bfloat16.has_kernels", lambda: kernels)
    model, _, config = small_model(small_config(dtype="bfloat16"))
    pack_model(config, model, torch.device("cpu"))
    language = model.mllm.model.language_model.layers[0].mlp.up_proj.base_layer
    tower = next(m for m in model.mllm.model.vision_tower.modules() if isinstance(m, (nn.Linear, PackedLinear)))
    expected = {(True, False): WidenedLinear, (True, True): HybridLinear, (False, True): PackedLinear}[slower, kernels]
    assert type(language) is expected
    assert type(tower) is (WidenedLinear if slower else PackedLinear)


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
    assert (pack_model(config, model, torch.device("cpu")) > 0) is gains


@needs_bfloat16
def test_the_speed_of_bfloat16_is_measured_with_real_values_whoever_asks() -> None:
    with ProductCounter() as counter, FakeTensorMode():
        first = cpu_bfloat16.is_slower_than_float32.__wrapped__()
    assert counter.flops == 0
    assert first in (True, False)


@pytest.mark.parametrize(("kernels", "seconds", "slower"), [(False, 0.0, True), (True, 1.3, True), (True, 1.1, False)])
def test_bfloat16_counts_as_slower_by_a_margin(
    kernels: bool, seconds: float, slower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {torch.bfloat16: seconds, torch.float32: 1.0}
    monkeypatch.setattr(cpu_bfloat16, "has_kernels", lambda: kernels)
    monkeypatch.setattr(cpu_bfloat16, "_seconds", taken.__getitem__)
    assert cpu_bfloat16.is_slower_than_float32.__wrapped__() is slower


def test_an_adapter_of_a_widened_matrix_computes_in_float32() -> None:
    model, x = adapted(torch.bfloat16), torch.randn(64, 24, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()
    fuse_adapters(model)
    widen_frozen_linears(model)
    for seen, true in zip(run(model, x, True), run(exact, x.double()), strict=True):
        assert (seen.double() - true).abs().max() <= 2e-2 * true.abs().max()

"""The lean adapter and its dropout against peft's."""

from __future__ import annotations

import copy

import pytest
import torch

from dual_loop.accelerate.lora import FusedLora, fuse_adapters, sixteen_bit_dropout

from small_adapter import adapted, run


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

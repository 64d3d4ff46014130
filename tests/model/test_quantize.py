"""The language model's frozen matrices in four bits: what flows and learns is what the unpacked numbers give."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from dual_loop.config import Config
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.quantize import BYTES, quantize_frozen

from loop_settings import build, masks_only, setting
from small_model import small_batch

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra quantize)")
CPU = torch.device("cpu")


def layers_of(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def gradients(config: Config, is_packed: bool) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Return losses and gradients of a step on packed matrices, or on plain ones of the same numbers."""
    torch.manual_seed(0)
    model, task = build(config)
    plain = [layer.get_base_layer().weight.detach().clone() for layer in layers_of(model)]
    line = quantize_frozen(model, CPU)
    assert f"{len(plain)} frozen matrices" in line
    bases = [layer.get_base_layer() for layer in layers_of(model)]
    numbers = [bitsandbytes.functional.dequantize_4bit(base.weight, base.weight.quant_state) for base in bases]
    for packed, own in zip(numbers, plain, strict=True):
        # A tenth of large matrices, more of these: what is quantised twice has one mean for all blocks.
        assert 0 < float((packed - own).norm() / own.norm()) < 0.5
    if not is_packed:
        for layer, weight in zip(layers_of(model), numbers, strict=True):
            old = layer.get_base_layer()
            layer.base_layer = nn.Linear(old.in_features, old.out_features, old.bias is not None, dtype=weight.dtype)
            layer.base_layer.weight, layer.base_layer.bias = nn.Parameter(weight, requires_grad=False), old.bias
    [packed_rows] = task.prepare([small_batch(config, masks_only(1))])
    terms = task(packed_rows).terms
    torch.stack([term.mean for term in terms.values()]).sum().backward()
    grads = {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}
    return grads, [term.total.detach() for term in terms.values()]


@pytest.mark.usefixtures("precision")
def test_a_step_is_that_of_the_unpacked_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its own format for CPUs takes no matrices as small as these.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    config = setting()
    packed, plain = gradients(config, True), gradients(config, False)
    assert packed[0].keys() == plain[0].keys()
    for name, gradient in plain[0].items():
        assert (packed[0][name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-7, name
    torch.testing.assert_close(packed[1], plain[1], rtol=1e-2, atol=1e-4)


def test_the_size_is_what_the_estimate_says() -> None:
    matrix = torch.randn(512, 1024)
    packed = bitsandbytes.nn.Params4bit(matrix, requires_grad=False, quant_type="nf4").to("cpu")
    state = packed.quant_state
    held = [packed.data, state.absmax, state.state2.absmax]
    assert sum(part.nbytes for part in held) == pytest.approx(BYTES * matrix.numel(), rel=0.01)

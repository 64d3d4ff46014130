"""One token at a time without the library's layers around it: the values of transformers' own forward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model
from transformers.cache_utils import DynamicCache

from dual_loop.accelerate import qwen2
from dual_loop.accelerate.cpu import WIDE, pack_frozen_linears
from dual_loop.accelerate.lora import fuse_adapters
from dual_loop.accelerate.qwen2 import make_trimmable
from dual_loop.config import ModelConfig
from dual_loop.model.adapters import add_lora
from dual_loop.model.decode import merged_adapters

ROWS, PROMPT, NEW, WIDTH = 3, 7, 4, 32


def language_model(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 11, **changes}
    model = Qwen2Model(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    for layer in model.layers:
        torch.nn.init.normal_(layer.input_layernorm.weight)
    add_lora(model, ModelConfig(lora_r=4, lora_alpha=8, lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            parameter.requires_grad_("lora_A" in name)
    fuse_adapters(model)
    return model.to(dtype).eval()


@torch.no_grad()
def continued(model: Any, is_lean: bool) -> torch.Tensor:
    """Hidden states (NEW, R, D) of new columns behind left-padded prompts."""
    torch.manual_seed(1)
    embeds = torch.randn(ROWS, PROMPT + NEW, WIDTH, dtype=model.norm.weight.dtype)
    valid = torch.ones(ROWS, PROMPT + NEW, dtype=torch.bool)
    valid[1, :3] = False
    positions = (valid.long().cumsum(1) - 1).clamp_min(0)
    cache, hidden = DynamicCache(), []
    seen = valid[:, :PROMPT].long()
    model(inputs_embeds=embeds[:, :PROMPT], attention_mask=seen, past_key_values=cache, use_cache=True)
    for column in range(PROMPT, PROMPT + NEW):
        mask = torch.zeros(ROWS, 1, 1, column + 1, dtype=embeds.dtype)
        mask.masked_fill_(~valid[:, None, None, : column + 1], torch.finfo(mask.dtype).min)
        place = positions[:, column : column + 1]
        if is_lean:
            hidden.append(qwen2.step(model, qwen2.token_layers(model), embeds[:, column, None], mask, place, cache))
        else:
            given = {"inputs_embeds": embeds[:, column : column + 1], "attention_mask": mask, "position_ids": place}
            hidden.append(model(**given, past_key_values=cache, use_cache=True).last_hidden_state[:, -1])
    return torch.stack(hidden)


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        *((attention, dtype) for attention in ("sdpa", WIDE) for dtype in (torch.float32, torch.float64)),
        ("eager", torch.float32),  # its softmax is in float32 whatever the values are
    ],
)
def test_values_are_those_of_the_stock_layers(attention: str, dtype: torch.dtype) -> None:
    model = language_model(dtype)
    model.config._attn_implementation = attention
    assert qwen2.can_step(model)
    expected = continued(model, is_lean=False)
    torch.testing.assert_close(continued(model, is_lean=True), expected)
    assert expected.std() > 0.1


def test_values_stay_with_packed_matrices_merged_adapters_and_a_trimmable_last_layer() -> None:
    model = language_model()
    expected = continued(model, is_lean=False)
    make_trimmable(model)
    pack_frozen_linears(model)
    with merged_adapters(model):
        torch.testing.assert_close(continued(model, is_lean=True), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(continued(model, is_lean=True), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_rounds_where_the_stock_layers_round() -> None:
    model = language_model(torch.bfloat16)
    torch.testing.assert_close(continued(model, is_lean=True), continued(model, is_lean=False), rtol=0.02, atol=0.02)


def test_models_that_are_not_plain_are_told_apart() -> None:
    model = language_model()
    assert qwen2.can_step(model)
    hooked, patched, derived = (copy.deepcopy(model) for _ in range(3))
    hooked.layers[0].mlp.register_forward_hook(lambda *_: None)
    patched.layers[1].input_layernorm.forward = lambda hidden: hidden
    derived.layers[0].__class__ = type("Sharded", (type(derived.layers[0]),), {})
    assert not any(qwen2.can_step(one) for one in (hooked, patched, derived))
    assert not qwen2.can_step(language_model(hidden_act="gelu"))
    sliding = language_model(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert not qwen2.can_step(sliding)

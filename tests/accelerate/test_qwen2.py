"""The last layer without unread tokens: the same values and gradients, with checkpointing and with a cache."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model
from transformers.cache_utils import DynamicCache

from dual_loop.accelerate.qwen2 import TrimmedLayer, make_trimmable, run_language, trimming
from dual_loop.loop.packing import conversation_mask
from dual_loop.model.sa2va import additive_mask

ROWS, LENGTH, WIDTH, READ_FROM = 2, 9, 16, 5


def language_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 11}
    return Qwen2Model(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).double()


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    conversations = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 1, 1, 2, -1]])
    embeds = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    mask = additive_mask(conversation_mask(conversations), embeds.dtype)
    return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}


def run(model: Any, read_from: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    given = inputs()
    given["inputs_embeds"].requires_grad_(True)
    hidden = model(**given, use_cache=False, **trimming(model, read_from)).last_hidden_state
    read = hidden[:, READ_FROM - read_from :]
    model.zero_grad()
    read.square().sum().backward()
    gradients = [parameter.grad for _, parameter in sorted(model.named_parameters())]
    return read.detach(), given["inputs_embeds"].grad, gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_values_and_gradients_are_those_of_the_whole_layer(checkpointed: bool, attention: str) -> None:
    whole = language_model()
    whole.config._attn_implementation = attention
    trimmed = copy.deepcopy(whole)
    make_trimmable(trimmed)
    if checkpointed:
        trimmed.gradient_checkpointing_enable({"use_reentrant": False})
        trimmed.train()
    read, embeds, gradients = run(trimmed, READ_FROM)
    expected_read, expected_embeds, expected_gradients = run(whole, 0)
    torch.testing.assert_close(read, expected_read)
    torch.testing.assert_close(embeds, expected_embeds)
    for seen, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(seen, expected)


def test_under_autocast_values_are_those_of_the_whole_layer() -> None:
    whole, given = language_model().float(), inputs()
    trimmed = copy.deepcopy(whole)
    make_trimmable(trimmed)
    given["inputs_embeds"] = given["inputs_embeds"].float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        given["attention_mask"] = additive_mask(given["attention_mask"] == 0, torch.float32)
        seen = trimmed(**given, use_cache=False, **trimming(trimmed, READ_FROM)).last_hidden_state
        expected = whole(**given, use_cache=False).last_hidden_state[:, READ_FROM:]
    torch.testing.assert_close(seen, expected, rtol=2e-2, atol=2e-2)
    assert expected.std() > 0.1


def test_unread_columns_are_not_computed() -> None:
    model = language_model()
    make_trimmable(model)
    widths = []
    model.layers[-1].mlp.register_forward_hook(lambda _module, given, _output: widths.append(given[0].shape[1]))
    model(**inputs(), use_cache=False, **trimming(model, READ_FROM))
    assert widths == [LENGTH - READ_FROM]


def test_keys_and_values_of_unread_columns_are_kept() -> None:
    model = language_model()
    whole, trimmed = DynamicCache(), DynamicCache()
    model(**inputs(), past_key_values=whole, use_cache=True)
    make_trimmable(model)
    model(**inputs(), past_key_values=trimmed, use_cache=True, **trimming(model, LENGTH - 1))
    for seen, expected in zip(trimmed.layers, whole.layers, strict=True):
        torch.testing.assert_close(seen.keys, expected.keys)
        torch.testing.assert_close(seen.values, expected.values)


def test_what_is_not_read_comes_back_as_zeros_in_its_place() -> None:
    language, given = language_model(), inputs()
    make_trimmable(language)
    model: Any = SimpleNamespace(mllm=SimpleNamespace(model=SimpleNamespace(language_model=language)))
    mask = given["attention_mask"] == 0
    hidden = run_language(model, given["inputs_embeds"], mask, given["position_ids"], READ_FROM)
    assert hidden.shape == (ROWS, LENGTH, WIDTH)
    assert not hidden[:, :READ_FROM].any()
    expected = language(**given, use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden[:, READ_FROM:], expected[:, READ_FROM:])


def test_other_language_models_stay_as_they_are() -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    make_trimmable(model)
    assert not isinstance(model.layers[0], TrimmedLayer)
    assert trimming(model, 3) == {}

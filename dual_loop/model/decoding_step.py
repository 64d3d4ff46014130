"""One more token for many rows through a Qwen2 language model, without what the library does around each layer.

With a few rows a decoding step is bound by reading the weights, and what transformers does around layers for a token
(masks, recorded outputs, keyword arguments) counts. The operations are those of its layers in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from dual_loop.accelerate.qwen2 import TrimmedLayer, attend


def can_step(language_model: Any) -> bool:
    """Tell whether :func:`step` computes what ``language_model`` does: plain Qwen2 layers with full attention.

    A layer that another library has changed (FSDP's class, a method of Liger's, a hook) is not plain.
    """
    config = language_model.config
    is_known = config.hidden_act == "silu" and all(kind == "full_attention" for kind in config.layer_types)
    return is_known and all(_is_plain(layer) for layer in language_model.layers)


def _is_plain(layer: nn.Module) -> bool:
    parts: Any = (layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
    is_changed = any("forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks for part in parts)
    return type(layer) in (Qwen2DecoderLayer, TrimmedLayer) and not is_changed


@torch.no_grad()
def step(language_model: Any, embeds: Tensor, position_ids: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
    """Run one new column behind what ``cache`` holds.

    Args:
        language_model: a ``Qwen2Model`` for which :func:`can_step` is true; its linear layers may have adapters.
        embeds: (R, D) embedded tokens.
        position_ids: (R, 1) int64.
        mask: (R, 1, 1, columns) additive, or None where every column is seen.
        cache: keys and values, one layer for each of the model's; the new ones are appended.

    Returns:
        (R, D) last hidden states, after the final norm.
    """
    hidden = embeds[:, None]
    turn = language_model.rotary_emb(hidden, position_ids)
    for layer in language_model.layers:
        hidden = hidden + attend(layer.self_attn, layer.input_layernorm(hidden), mask, turn, cache)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return torch.as_tensor(language_model.norm(hidden)[:, 0])

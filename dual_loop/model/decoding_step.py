"""One more token for many rows through a Qwen2 language model, without what the library does around each layer.

With a few rows a decoding step is bound by reading the weights; building masks, recording outputs and passing through
the attention and MLP modules took as long again on a CPU. The operations are those of transformers' layers in the same
order, but for the sine, whose sign is changed instead of that of the turned half.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from dual_loop.model.last_layer import TrimmedLayer


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
    cosine, sine = language_model.rotary_emb(embeds, position_ids)
    half = sine.shape[-1] // 2
    turn = (cosine, torch.cat([-sine[..., :half], sine[..., half:]], dim=-1))
    attend = ALL_ATTENTION_FUNCTIONS[language_model.config._attn_implementation]
    hidden = embeds
    for layer in language_model.layers:
        hidden = hidden + _attention(layer, _normed(layer.input_layernorm, hidden), turn, mask, cache, attend)
        normed, mlp = _normed(layer.post_attention_layernorm, hidden), layer.mlp
        hidden = hidden + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    return _normed(language_model.norm, hidden)


def _normed(norm: Any, hidden: Tensor) -> Tensor:
    wide = hidden.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return torch.as_tensor(norm.weight * (wide * scale).to(hidden.dtype))


def _attention(
    layer: Any, normed: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache, attend: Any
) -> Tensor:
    """Return the attention's output (R, D) of one layer; ``turn`` is cosine and signed sine, (R, 1, d)."""
    attention = layer.self_attn
    width = attention.head_dim
    query = _rotate(attention.q_proj(normed).unflatten(-1, (-1, width)), turn)[:, :, None]
    key = _rotate(attention.k_proj(normed).unflatten(-1, (-1, width)), turn)[:, :, None]
    value = attention.v_proj(normed).unflatten(-1, (-1, width))[:, :, None]
    keys, values = cache.update(key, value, attention.layer_idx)
    output, _ = attend(attention, query, keys, values, mask, dropout=0.0, scaling=attention.scaling)
    return torch.as_tensor(attention.o_proj(output.flatten(1)))


def _rotate(values: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn (R, heads, d); swapping halves by ``roll`` and a signed sine is ``rotate_half`` in fewer operations."""
    cosine, signed_sine = turn
    return values * cosine + values.roll(values.shape[-1] // 2, -1) * signed_sine

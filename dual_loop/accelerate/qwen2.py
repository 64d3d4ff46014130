"""The last decoder layer without the tokens that nobody reads.

Of what the language model puts out, the losses and [SEG] read a few positions behind the image; step 1 reads the last
one. Earlier positions matter to the last layer as keys and values alone, so their queries, attention and MLP, in
training most of that layer, are left out. In a packed row of one region nine of ten positions are such.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, eager_attention_forward, rotate_half


class TrimmedLayer(Qwen2DecoderLayer):  # type: ignore[misc]
    """A decoder layer that puts out the columns from ``read_from`` on: (B, L, D) -> (B, L - read_from, D).

    ``read_from`` comes as an argument through the language model, so that a checkpointed layer that is computed again
    in the backward pass gets it again. The mask must then be the four-dimensional one.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        read_from: int = 0,
        **options: Any,
    ) -> Tensor:
        if read_from == 0 or attention_mask is None or position_embeddings is None:
            rest: Any = (position_ids, past_key_values, use_cache, position_embeddings)
            return torch.as_tensor(super().forward(hidden_states, attention_mask, *rest, **options))
        normed = self.input_layernorm(hidden_states)
        mask = attention_mask[:, :, read_from:]
        hidden = hidden_states[:, read_from:]
        hidden = hidden + attend(self.self_attn, normed, mask, position_embeddings, past_key_values, read_from)
        return torch.as_tensor(hidden + self.mlp(self.post_attention_layernorm(hidden)))


def attend(
    attention: Any, normed: Tensor, mask: Tensor | None, turn: tuple[Tensor, Tensor], cache: Any, start: int = 0
) -> Tensor:
    """Attention of a Qwen2 layer with queries from column ``start`` on alone: (B, L, D) -> (B, L - start, D).

    Args:
        attention: a ``Qwen2Attention``; its projections may have adapters.
        normed: (B, L, D), after the layer's first norm.
        mask: (B, 1, L - start, columns) additive, or None where every column is seen.
        turn: cosines and sines of the rotary angles, (B, L, d).
        cache: keys and values seen before, which those of ``normed`` are appended to; None for none.
    """
    cosine, sine = turn
    query = _heads(attention.q_proj(normed[:, start:]), attention.head_dim)
    key = _heads(attention.k_proj(normed), attention.head_dim)
    value = _heads(attention.v_proj(normed), attention.head_dim)
    query = _rotate(query, cosine[:, start:], sine[:, start:])
    key = _rotate(key, cosine, sine)
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    output, _ = kernel(attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling)
    return torch.as_tensor(attention.o_proj(output.flatten(2)))


def _heads(values: Tensor, width: int) -> Tensor:
    return torch.as_tensor(values.unflatten(-1, (-1, width)).transpose(1, 2))


def _rotate(values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn (B, heads, n, d) by the rotary angles whose cosines and sines are (B, n, d)."""
    return torch.as_tensor(values * cosine[:, None] + rotate_half(values) * sine[:, None])


def make_trimmable(language_model: nn.Module) -> None:
    """Let the last layer of a Qwen2 language model be trimmed; other models stay as they are."""
    layers: Any = language_model.layers
    if type(layers[-1]) is Qwen2DecoderLayer:
        layers[-1].__class__ = TrimmedLayer


def trimming(language_model: nn.Module, column: int) -> dict[str, int]:
    """Return the arguments that let the model put out the columns from ``column`` on alone, if it can."""
    layers: Any = language_model.layers
    return {"read_from": column} if column and isinstance(layers[-1], TrimmedLayer) else {}


def restore_columns(hidden: Tensor, start: int) -> Tensor:
    """(B, n, D) -> (B, start + n, D), zeros in the columns that were left out."""
    return F.pad(hidden, (0, 0, start, 0)) if start else hidden

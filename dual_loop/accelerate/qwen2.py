"""A Qwen2 language model without what nobody reads and without what the library does around each layer.

* The last layer (``speed.trim_last_layer``): the losses and [SEG] read a few positions behind the image, step 1 the
  last one. Earlier positions matter to the last layer as keys and values alone, so their queries, attention and MLP are
  left out; in a packed row of one region nine of ten positions are such.
* Rows of like length together: a micro-batch of uneven rows runs group by group, each padded to its own longest.
* One more token for many rows: with a few rows a decoding step is bound by reading the weights, and what transformers
  does around layers for a token (masks, recorded outputs, keyword arguments) counts; keys and values grow in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, eager_attention_forward, rotate_half

from dual_loop.accelerate import replace
from dual_loop.config import Config
from dual_loop.model.sa2va import Sa2VA, additive_mask

SLACK = 0.1
"""Largest share of padding in a row of a group. Smaller groups would pad less and fill the device less."""


def apply(model: Sa2VA, config: Config) -> None:
    """Replace ``run_language``, ``step_language`` and ``new_cache``, and let the last layer be trimmed."""
    replace(model, step_language, run_language, new_cache)
    if config.speed.trim_last_layer:
        make_trimmable(model.mllm.model.language_model)


def run_language(
    model: Sa2VA,
    embeds: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None,
    read_from: int = 0,
    row_lengths: Sequence[int] | None = None,
) -> Tensor:
    """``Sa2VA.run_language``: what is before ``read_from`` or behind ``row_lengths`` may be zeros."""
    if attention_mask.dim() != 4:
        return Sa2VA.run_language(model, embeds, attention_mask, position_ids)
    language, columns = model.mllm.model.language_model, embeds.shape[1]
    trimmed = trimming(language, read_from)
    groups = row_groups(row_lengths) if row_lengths is not None and model.group_rows else []
    outputs = []
    for group in groups if len(groups) > 1 else [None]:
        rows: Any = slice(None) if group is None else torch.tensor(group, device=embeds.device)
        end = columns if group is None or row_lengths is None else row_lengths[group[0]]
        mask = additive_mask(attention_mask[rows, :, :end, :end], embeds.dtype)
        positions = None if position_ids is None else position_ids[rows, :end]
        given = {"inputs_embeds": embeds[rows, :end], "attention_mask": mask, "position_ids": positions}
        hidden = language(**given, use_cache=False, **trimmed).last_hidden_state
        padding = (0, 0, trimmed.get("read_from", 0), columns - end)
        outputs.append(F.pad(hidden, padding) if any(padding) else hidden)
    if len(outputs) == 1:
        return torch.as_tensor(outputs[0])
    order = torch.tensor([row for group in groups for row in group], device=embeds.device)
    return torch.cat(outputs)[order.argsort()]


def step_language(model: Sa2VA, embeds: Tensor, mask: Tensor | None, position_ids: Tensor, cache: Cache) -> Tensor:
    """``Sa2VA.step_language``. Layers are looked at in every call: they may be wrapped at any time."""
    language, count = model.mllm.model.language_model, embeds.shape[1]
    if count == 1 and can_step(language):
        return step(language, embeds[:, 0], position_ids, mask, cache)
    given = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": position_ids}
    output = language(**given, past_key_values=cache, use_cache=True, **trimming(language, count - 1))
    return torch.as_tensor(output.last_hidden_state[:, -1])


class TrimmedLayer(Qwen2DecoderLayer):  # type: ignore[misc]
    """A decoder layer that puts out the columns from ``read_from`` on: (B, L, D) -> (B, L - read_from, D).

    ``read_from`` comes as an argument through the language model, so that a checkpointed layer that is computed again
    in the backward pass gets it again. The mask must then be the four-dimensional one.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *rest: Any,
        read_from: int = 0,
        **options: Any,
    ) -> Tensor:
        turn, cache = options.get("position_embeddings"), options.get("past_key_values")
        if read_from == 0 or attention_mask is None or turn is None:
            return torch.as_tensor(super().forward(hidden_states, attention_mask, *rest, **options))
        normed = self.input_layernorm(hidden_states)
        hidden = hidden_states[:, read_from:]
        hidden = hidden + attend(self.self_attn, normed, attention_mask[:, :, read_from:], turn, cache, read_from)
        return torch.as_tensor(hidden + self.mlp(self.post_attention_layernorm(hidden)))


def attend(
    attention: Any, normed: Tensor, mask: Tensor | None, turn: Sequence[Tensor], cache: Cache | None, start: int = 0
) -> Tensor:
    """Attention of a Qwen2 layer with queries from column ``start`` on alone: (B, L, D) -> (B, L - start, D).

    Args:
        attention: a ``Qwen2Attention``; its projections may have adapters.
        normed: (B, L, D), after the layer's first norm.
        mask: (B, 1, L - start, columns) additive, or None where every column is seen.
        turn: cosines and sines of the rotary angles, (B, L, d).
        cache: keys and values seen before, which those of ``normed`` are appended to; None for none.
    """
    cosine, sine = (part[:, None] for part in turn)
    flat = attention.q_proj(normed[:, start:]), attention.k_proj(normed), attention.v_proj(normed)
    query, key, value = (values.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for values in flat)
    query = query * cosine[:, :, start:] + rotate_half(query) * sine[:, :, start:]
    key = key * cosine + rotate_half(key) * sine
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    output, _ = kernel(attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling)
    # One matrix: of a single column torch would multiply row by row, and read the weights again for each.
    return torch.as_tensor(attention.o_proj(output.flatten(2).flatten(0, 1)).unflatten(0, output.shape[:2]))


def make_trimmable(language_model: nn.Module) -> None:
    """Let the last layer of a Qwen2 language model be trimmed; other models stay as they are."""
    layers: Any = language_model.layers
    if type(layers[-1]) is Qwen2DecoderLayer:
        layers[-1].__class__ = TrimmedLayer


def trimming(language_model: nn.Module, column: int) -> dict[str, int]:
    """Return the arguments that let the model put out the columns from ``column`` on alone, if it can."""
    layers: Any = language_model.layers
    return {"read_from": column} if column and isinstance(layers[-1], TrimmedLayer) else {}


def row_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Return the numbers of the rows, longest first, in groups; none is shorter than 1 - ``SLACK`` of its longest."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if groups and lengths[row] >= (1 - SLACK) * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def can_step(language_model: Any) -> bool:
    """Tell whether :func:`step` computes what ``language_model`` does: plain Qwen2 layers with full attention.

    A layer that another library has changed (FSDP's class, a method of Liger's, a hook) is not plain.
    """
    config = language_model.config
    if config.hidden_act != "silu" or any(kind != "full_attention" for kind in config.layer_types):
        return False
    for layer in language_model.layers:
        parts = (layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
        if type(layer) not in (Qwen2DecoderLayer, TrimmedLayer) or any(
            "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks for part in parts
        ):
            return False
    return True


def step(language_model: Any, embeds: Tensor, position_ids: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
    """Run one new column behind what ``cache`` holds: the operations of the library's layers in the same order.

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


def new_cache(model: Sa2VA, reserve: int) -> Cache:
    """``Sa2VA.new_cache``: each layer's keys and values grow in place."""
    return Cache(layers=[GrowingLayer(reserve) for _ in model.mllm.model.language_model.layers])


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in a buffer that is written in place; for inference only.

    The stock layer copies all keys and values for each new token.

    Args:
        reserve: columns to keep free behind what is first written.
    """

    def __init__(self, reserve: int) -> None:
        super().__init__()
        self.reserve = reserve
        self._buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append (R, heads, new, d) keys and values; return all of them, (R, heads, columns, d)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < end:
            rows, heads, _, width = key_states.shape
            grown = [key_states.new_empty(rows, heads, end + self.reserve, width) for _ in range(2)]
            for new, old in zip(grown, self._buffers, strict=False):
                new[:, :, :length] = old[:, :, :length]
            self._buffers = grown
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length:end] = states
        return self._view(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` alone."""
        length = self.get_seq_length()
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self._view(length)

    def _view(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, :length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

"""A Qwen2 language model without what nobody reads and without what the library does around each layer.

* The last layer (``speed.trim_last_layer``): the losses and [SEG] read a few positions behind the image, step 1 the
  last one. Earlier positions matter to the last layer as keys and values alone, so their queries, attention and MLP are
  left out; in a packed row of one region nine of ten positions are such.
* Rows of like length together: a micro-batch of uneven rows runs group by group, each padded to its own longest.
* One more token for many rows: with a few rows a decoding step is bound by reading the weights, or on a GPU by starting
  kernels, and what transformers does for a token counts (masks, recorded outputs, norms and rotations in many pieces).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, eager_attention_forward, rotate_half

from dual_loop.accelerate import replace
from dual_loop.accelerate.lora import TokenProjection, token_projection
from dual_loop.config import Config
from dual_loop.model.hardware import round_columns, send
from dual_loop.model.sa2va import Sa2VA, TokenStep, additive_mask

SLACK = 0.1
"""Largest share of padding in a row of a group. Smaller groups would pad less and fill the device less."""


def apply(model: Sa2VA, config: Config) -> None:
    """Replace ``run_language``, ``step_language`` and ``token_step``, and let the last layer be trimmed."""
    replace(model, step_language, run_language, token_step)
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
        rows: Any = slice(None) if group is None else send(torch.tensor(group), embeds.device)
        end = columns if group is None or row_lengths is None else round_columns(row_lengths[group[0]], embeds.device)
        mask = additive_mask(attention_mask[rows, :, :end, :end], embeds.dtype)
        positions = None if position_ids is None else position_ids[rows, :end]
        given = {"inputs_embeds": embeds[rows, :end], "attention_mask": mask, "position_ids": positions}
        hidden = language(**given, use_cache=False, **trimmed).last_hidden_state
        padding = (0, 0, trimmed.get("read_from", 0), columns - end)
        outputs.append(F.pad(hidden, padding) if any(padding) else hidden)
    if len(outputs) == 1:
        return torch.as_tensor(outputs[0])
    order = torch.tensor([row for group in groups for row in group]).argsort()
    return torch.cat(outputs)[send(order, embeds.device)]


def step_language(model: Sa2VA, embeds: Tensor, mask: Tensor | None, position_ids: Tensor, cache: Cache) -> Tensor:
    """``Sa2VA.step_language`` with the last layer trimmed."""
    language = model.mllm.model.language_model
    given = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": position_ids}
    output = language(**given, past_key_values=cache, use_cache=True, **trimming(language, embeds.shape[1] - 1))
    return torch.as_tensor(output.last_hidden_state[:, -1])


def token_step(model: Sa2VA) -> TokenStep:
    """``Sa2VA.token_step``: the layers are looked at now, for they may be wrapped between generations."""
    language = model.mllm.model.language_model
    return partial(step, language, token_layers(language)) if can_step(language) else model.step_language


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
    return torch.as_tensor(attention.o_proj(output.flatten(2)))


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


@dataclass(frozen=True)
class TokenLayer:
    """What one layer needs for a new token: a projection maps (R, in) to (R, out), its adapter included."""

    attention: Any
    norms: tuple[Any, Any]
    query: TokenProjection
    key: TokenProjection
    value: TokenProjection
    output: TokenProjection
    gate: TokenProjection
    up: TokenProjection
    down: TokenProjection


def token_layers(language_model: Any) -> list[TokenLayer]:
    """Return the layers of a language model for which :func:`can_step` is true, with their weights of this moment."""
    found = []
    for layer in language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        projections += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        norms = layer.input_layernorm, layer.post_attention_layernorm
        found.append(TokenLayer(attention, norms, *map(token_projection, projections)))
    return found


def step(
    language_model: Any,
    layers: Sequence[TokenLayer],
    embeds: Tensor,
    mask: Tensor | None,
    position_ids: Tensor,
    cache: Cache,
) -> Tensor:
    """Run one new column behind what ``cache`` holds: what the library's layers compute, in fewer kernels.

    Args:
        language_model: a ``Qwen2Model``.
        layers: its :func:`token_layers`.
        embeds: (R, 1, D) embedded tokens.
        mask: (R, 1, 1, columns) additive, or None where every column is seen.
        position_ids: (R, 1) int64.
        cache: keys and values, one layer for each of the model's; the new ones are appended.

    Returns:
        (R, D) last hidden states, after the final norm.
    """
    hidden, kind = embeds[:, 0], embeds.device.type
    cosine, sine = language_model.rotary_emb(embeds, position_ids)  # (R, 1, d)
    half = sine.shape[-1] // 2
    sine = torch.cat([-sine[..., :half], sine[..., half:]], dim=-1)  # the sign of ``rotate_half``
    name = language_model.config._attn_implementation
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    # What enters several products under autocast is cast once.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    for number, layer in enumerate(layers):
        normed = rms_norm(layer.norms[0], hidden).to(dtype)
        value, width = layer.value(normed), layer.attention.head_dim
        heads = torch.cat([layer.query(normed), layer.key(normed)], dim=1).unflatten(1, (-1, width))
        heads = torch.addcmul(heads * cosine, heads.roll(half, -1), sine)
        query, key = heads[:, :, None].split([heads.shape[1] - value.shape[1] // width, value.shape[1] // width], dim=1)
        keys, values = cache.update(key, value.unflatten(1, (-1, 1, width)), number)
        scaling = layer.attention.scaling
        output, _ = kernel(layer.attention, query, keys, values, mask, dropout=0.0, scaling=scaling)
        hidden = hidden + layer.output(output.flatten(1))
        normed = rms_norm(layer.norms[1], hidden).to(dtype)
        hidden = hidden + layer.down(F.silu(layer.gate(normed)) * layer.up(normed))
    return rms_norm(language_model.norm, hidden)


def rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    """Run a ``Qwen2RMSNorm`` in one kernel."""
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)

"""Step 1's decoding: many prompts at once, an image's prefix paid once, finished rows leave the batch.

A row of the key-value cache is ``padding, image prefix, padding, question, new tokens``; positions count real tokens
only. Keys and values of a prefix are computed once for each image and copied into the rows of all its regions and
samples. The result is that of transformers' ``generate`` on the whole prompts, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from dual_loop.model.packing import additive_mask
from dual_loop.model.video_llava_sam import VideoLLaVASAMModel

Stop = Callable[[Tensor, Any], Tensor]
"""(R, t) new ids, scores -> (R,) bool: which rows have ended."""


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

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (R, heads, new, d) keys and values; return all of them, (R, heads, columns, d)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < end:
            self._grow(key_states, end + self.reserve, length)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length:end] = states
        return self._view(end)

    def contents(self) -> tuple[Tensor, Tensor]:
        """Return keys and values (R, heads, columns, d)."""
        return self._view(self.get_seq_length())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` alone."""
        length = self.get_seq_length()
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self._view(length)

    def _grow(self, like: Tensor, columns: int, length: int) -> None:
        rows, heads, _, width = like.shape
        grown = [like.new_empty(rows, heads, columns, width) for _ in range(2)]
        for new, old in zip(grown, self._buffers, strict=False):
            new[:, :, :length] = old[:, :, :length]
        self._buffers = grown

    def _view(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, :length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


@dataclass
class PrefixCache:
    """Keys and values of I image prefixes, padded on the left.

    Attributes:
        layers: for each layer keys and values (I, heads, P, d).
        valid: (I, P) bool, true on real tokens.
    """

    layers: list[tuple[Tensor, Tensor]]
    valid: Tensor

    @classmethod
    def joined(cls, parts: Sequence[PrefixCache]) -> PrefixCache:
        """Return the prefixes of ``parts``, all padded to the same P, as one."""
        if len(parts) == 1:
            return parts[0]
        layers = [
            (torch.cat([keys for keys, _ in same]), torch.cat([values for _, values in same]))
            for same in zip(*(part.layers for part in parts), strict=True)
        ]
        return cls(layers, torch.cat([part.valid for part in parts]))


@dataclass
class PromptRows:
    """R rows to be continued.

    Attributes:
        embeds: (R, Q, D) embedded questions, padded on the left.
        valid: (R, Q) bool, true on real tokens.
        prefix: the prefixes of their images; None where the questions hold the whole prompts.
        prefix_index: (R,) int64, the prefix of each row.
    """

    embeds: Tensor
    valid: Tensor
    prefix: PrefixCache | None = None
    prefix_index: Tensor | None = None


@torch.no_grad()
def encode_prefixes(model: VideoLLaVASAMModel, embeds: Tensor, valid: Tensor) -> PrefixCache:
    """Run the language model over I embedded prefixes (I, P, D), padded on the left where ``valid`` is false."""
    layers: list[Any] = [GrowingLayer(0) for _ in range(_num_layers(model))]
    _forward(model, embeds, valid, valid, Cache(layers=layers))
    return PrefixCache([layer.contents() for layer in layers], valid)


@torch.no_grad()
def decode_rows(
    model: VideoLLaVASAMModel,
    rows: PromptRows,
    max_new_tokens: int,
    *,
    eos_token_id: int | None,
    stop: Stop,
    choose: Callable[[Tensor, Tensor], Tensor] | None = None,
    drop_finished: bool = True,
) -> list[list[int]]:
    """Continue every row until it ends; return the new ids, up to and with what ended them.

    Args:
        rows: prompts.
        max_new_tokens: longest continuation.
        eos_token_id: id that ends a row.
        stop: ends rows by their text.
        choose: ``(rows (r,) int64, logits (r, V) float32) -> (r,) int64``, the next token of the rows that are left;
            None takes the arg-max.
        drop_finished: compute only the rows that have not ended.
    """
    model.sync_new_tokens()
    hidden, valid, cache = _read_questions(model, rows, max_new_tokens)
    alive = torch.arange(len(rows.embeds), device=valid.device)
    written: list[list[int]] = [[] for _ in range(len(alive))]
    ids = alive.new_zeros(len(alive), 0)
    open_rows = torch.ones_like(alive, dtype=torch.bool)
    for number in range(max_new_tokens):
        logits = model.mllm.lm_head(hidden).float()
        chosen = logits.argmax(-1) if choose is None else choose(alive, logits)
        ids = torch.cat([ids, chosen[:, None]], dim=1)
        for row, token, is_open in zip(alive.tolist(), chosen.tolist(), open_rows.tolist(), strict=True):
            if is_open:
                written[row].append(token)
        ended = stop(ids, logits).to(ids.device)
        open_rows = open_rows & ~(ended | (chosen == eos_token_id) if eos_token_id is not None else ended)
        if not open_rows.any() or number == max_new_tokens - 1:
            break
        if drop_finished and not open_rows.all():
            kept = open_rows.nonzero()[:, 0]
            alive, ids, chosen, valid, open_rows = (t[kept] for t in (alive, ids, chosen, valid, open_rows))
            cache.batch_select_indices(kept)
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
        embeds = model.mllm.get_input_embeddings()(chosen)[:, None]
        hidden = _forward(model, embeds, valid[:, -1:], valid, cache)
    return written


def _read_questions(model: VideoLLaVASAMModel, rows: PromptRows, reserve: int) -> tuple[Tensor, Tensor, Cache]:
    """Return the last hidden state (R, D) of each row, the real columns (R, columns), and the filled cache."""
    cache = Cache(layers=[GrowingLayer(reserve + rows.embeds.shape[1]) for _ in range(_num_layers(model))])
    valid = rows.valid
    if rows.prefix is not None and rows.prefix_index is not None:
        index = rows.prefix_index
        for number, (keys, values) in enumerate(rows.prefix.layers):
            cache.update(keys[index], values[index], number)
        valid = torch.cat([rows.prefix.valid[index], valid], dim=1)
    return _forward(model, rows.embeds, rows.valid, valid, cache), valid, cache


def _forward(model: VideoLLaVASAMModel, embeds: Tensor, own: Tensor, valid: Tensor, cache: Cache) -> Tensor:
    """Run new columns (R, n, D) behind what the cache holds; return the hidden state (R, D) of the last one.

    Args:
        own: (R, n) bool, the real ones among the new columns.
        valid: (R, columns) bool, the real ones among all columns, the new ones included.
    """
    count, total = own.shape[1], valid.shape[1]
    positions = (valid.long().cumsum(1) - 1).clamp_min(0)[:, -count:]
    mask = None
    if count > 1 or not bool(valid.all()):
        seen = torch.arange(total, device=valid.device)[None, :]
        last = torch.arange(total - count, total, device=valid.device)[:, None]
        # A padded column sees itself: a softmax over nothing has no meaning.
        allowed = (valid[:, None, :] & (seen <= last)) | (seen == last)
        mask = additive_mask(allowed[:, None], embeds.dtype)
    return model.step_language(embeds, mask, positions, cache)


def _num_layers(model: VideoLLaVASAMModel) -> int:
    return int(model.mllm.config.text_config.num_hidden_layers)

"""Many prompts continued at once: an image's prefix is paid once, finished rows leave the batch.

A row of the key-value cache is ``padding, image prefix, padding, question, new tokens``; positions count real tokens
only. Keys and values of a prefix are computed once for each image and copied into the rows of all its regions and
samples. The result is that of transformers' ``generate`` on the whole prompts, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.logits_process import TopPLogitsWarper

from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA, additive_mask

IMAGES_AT_ONCE = 8
"""Most image prefixes that one forward pass reads."""
CPU_TOKENS = 1024
"""Tokens that keep a CPU's products busy; more at a time would hold memory for no speed."""


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

    def contents(self) -> tuple[Tensor, Tensor]:
        """Return keys and values (R, heads, columns, d)."""
        return self._view(self.get_seq_length())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` alone."""
        length = self.get_seq_length()
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self._view(length)

    def _view(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, :length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one row are chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        seed: of the row's own random numbers, so that a sampled text does not depend on the rows beside it.
        top_p: share of probability to sample from; 1.0 is all of it.
    """

    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0


@dataclass
class Prompts:
    """R prompts about I images, each an image and a question about it.

    Attributes:
        questions: R lists of token ids that follow the image.
        images: R numbers of images.
        prefixes: I lists of token ids, the image prefixes.
        tiles: I lists of tile indices of each image.
        masks: R region prompts (G, G) bool, or None for a question without one.
    """

    questions: Sequence[Sequence[int]]
    images: Sequence[int]
    prefixes: Sequence[Sequence[int]]
    tiles: Sequence[Sequence[int]]
    masks: Sequence[Tensor | None]


class Decoder:
    """Continues prompts about the same images as often as asked; an image's prefix is computed once.

    Use it while the weights stay as they are.

    Args:
        model: in eval mode.
        prompter: tokenizer and ends of turns.
        prompts: all of them.
        image_features: (T, M, D) projected features of all tiles.
        max_new_tokens: longest continuation.
    """

    def __init__(
        self, model: Sa2VA, prompter: Prompter, prompts: Prompts, image_features: Tensor, max_new_tokens: int
    ) -> None:
        self.model, self.prompter, self.prompts = model, prompter, prompts
        self.image_features, self.max_new_tokens = image_features, max_new_tokens
        self.pad_id = prompter.tokenizer.pad_token_id or 0
        self.side = int(image_features.shape[1] ** 0.5)
        model.sync_new_tokens()
        self.prefix_layers, self.prefix_valid = self._read_prefixes()

    @torch.no_grad()
    def write(self, rows: Sequence[int], sampling: Sequence[Sampling] = ()) -> list[list[int]]:
        """Return the new ids of prompts ``rows``, up to and with what ended them.

        Args:
            rows: numbers of prompts.
            sampling: one for each of ``rows``; none takes the most likely token everywhere.
        """
        hidden, valid, cache = self._read_questions(rows)
        generators = [torch.Generator().manual_seed(one.seed) for one in sampling]
        end_id = self.prompter.tokenizer.eos_token_id
        alive = torch.arange(len(rows), device=valid.device)
        written: list[list[int]] = [[] for _ in rows]
        for number in range(self.max_new_tokens):
            logits = self.model.mllm.lm_head(hidden).float()
            for place, row in enumerate(alive.tolist() if sampling else ()):
                logits[place] = _perturbed(logits[place], sampling[row], generators[row])
            chosen = logits.argmax(-1)
            for row, token in zip(alive.tolist(), chosen.tolist(), strict=True):
                written[row].append(token)
            is_open = [
                written[row][-1] != end_id and not self.prompter.ends_turn(written[row]) for row in alive.tolist()
            ]
            if not any(is_open) or number == self.max_new_tokens - 1:
                break
            if not all(is_open):
                kept = torch.tensor(is_open, device=valid.device).nonzero()[:, 0]
                alive, chosen, valid = alive[kept], chosen[kept], valid[kept]
                cache.batch_select_indices(kept)
            valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
            embeds = self.model.mllm.get_input_embeddings()(chosen)[:, None]
            hidden = self._forward(embeds, valid, cache)
        return written

    @torch.no_grad()
    def _read_prefixes(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return keys and values (I, heads, P, d) of every layer for all image prefixes, and (I, P) real columns.

        A few images are read at a time.
        """
        ids, valid = left_pad(self.prompts.prefixes, self.pad_id, self.model.device)
        layers, size = [], prefixes_at_once(ids.shape[1], self.model.device.type)
        none = torch.zeros(0, dtype=torch.long, device=ids.device)
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            tiles = [tile for image in self.prompts.tiles[part] for tile in image]
            no_masks = torch.zeros(0, self.side, self.side, dtype=torch.bool, device=ids.device)
            embeds = self.model.embed_prompt(ids[part], self.image_features[tiles], none, no_masks)
            own = [GrowingLayer(0) for _ in range(self.model.num_layers)]
            self._forward(embeds, valid[part], Cache(layers=list(own)))
            layers.append([layer.contents() for layer in own])
        joined = [tuple(torch.cat(same) for same in zip(*parts, strict=True)) for parts in zip(*layers, strict=True)]
        return [(keys, values) for keys, values in joined], valid

    def _read_questions(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Cache]:
        """Return the last hidden state (R, D) of each row, the real columns (R, columns), and the filled cache."""
        prompts, device = self.prompts, self.model.device
        ids, valid = left_pad([prompts.questions[row] for row in rows], self.pad_id, device)
        asked = [row for row in rows if prompts.masks[row] is not None]
        # A region refers to the last tile of its image: the thumbnail, or the only tile.
        last = torch.tensor([prompts.tiles[prompts.images[row]][-1] for row in asked], dtype=torch.long, device=device)
        given = [mask.bool() for row in asked if (mask := prompts.masks[row]) is not None]
        masks = torch.stack(given).to(device) if given else torch.zeros(0, self.side, self.side, device=device)
        embeds = self.model.embed_regions(ids, self.image_features, last, masks.bool())
        reserve = self.max_new_tokens + ids.shape[1]
        cache = Cache(layers=[GrowingLayer(reserve) for _ in range(self.model.num_layers)])
        index = torch.tensor([prompts.images[row] for row in rows], device=device)
        for number, (keys, values) in enumerate(self.prefix_layers):
            cache.update(keys[index], values[index], number)
        valid = torch.cat([self.prefix_valid[index], valid], dim=1)
        return self._forward(embeds, valid, cache), valid, cache

    def _forward(self, embeds: Tensor, valid: Tensor, cache: Cache) -> Tensor:
        """Run new columns (R, n, D) behind what the cache holds; return the hidden state (R, D) of the last one.

        ``valid`` (R, columns) bool are the real ones among all columns, the new ones included.
        """
        count, total = embeds.shape[1], valid.shape[1]
        positions = (valid.long().cumsum(1) - 1).clamp_min(0)[:, -count:]
        mask = None
        if count > 1 or not bool(valid.all()):
            seen = torch.arange(total, device=valid.device)[None, :]
            last = torch.arange(total - count, total, device=valid.device)[:, None]
            # A padded column sees itself: a softmax over nothing has no meaning.
            allowed = (valid[:, None, :] & (seen <= last)) | (seen == last)
            mask = additive_mask(allowed[:, None], embeds.dtype)
        return self.model.step_language(embeds, mask, positions, cache)


def _perturbed(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Return logits (V,) whose arg-max is a draw from their softmax (Gumbel-max trick); as they are where greedy."""
    if sampling.temperature == 0:
        return logits
    if sampling.top_p < 1.0:
        # This warper looks at the scores alone.
        logits = TopPLogitsWarper(sampling.top_p)(logits.new_zeros(1, 0, dtype=torch.long), logits[None])[0]
    uniform = torch.rand(len(logits), generator=generator).to(logits.device).clamp_min(1e-20)
    return logits / sampling.temperature - torch.log(-torch.log(uniform))


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left: (R, L) int64 ids and (R, L) bool, true on real tokens."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[*[pad_id] * (length - len(row)), *row] for row in rows], dtype=torch.long)
    valid = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return ids.to(device), valid.to(device)


def prefixes_at_once(length: int, device_type: str) -> int:
    """Return how many image prefixes of ``length`` tokens one forward pass reads on this kind of device."""
    most = CPU_TOKENS // max(1, length) if device_type == "cpu" else IMAGES_AT_ONCE
    return max(1, min(IMAGES_AT_ONCE, most))

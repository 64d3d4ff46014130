"""Many prompts continued at once: an image's prefix is paid once, finished rows leave the batch.

A row of the key-value cache is ``padding, image prefix, padding, question, new tokens``; positions count real tokens
only. Keys and values of a prefix are computed once for each image and copied into the rows of all its regions and
samples. The result is that of transformers' ``generate`` on the whole prompts, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, cast, runtime_checkable

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.logits_process import TopPLogitsWarper

from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA, additive_mask

IMAGES_AT_ONCE = 8
"""Most image prefixes that one forward pass reads."""
CPU_TOKENS = 1024
"""Tokens that keep a CPU's products busy; more at a time would hold memory for no speed."""
_WIDE = (torch.float32, torch.float64)
"""Dtypes in which a matrix and its adapter can be added without a rounding that counts."""


@dataclass(frozen=True)
class Prompt:
    """A question about one of I images, and how the tokens of its answer are chosen.

    Attributes:
        question: token ids that follow the image.
        image: 0..I-1.
        mask: (G, G) bool, the region prompt; None for a question without one.
        temperature: 0 takes the most likely token.
        seed: of the row's own random numbers, so that a sampled text does not depend on the rows beside it.
        top_p: share of probability to sample from; 1.0 is all of it.
    """

    question: Sequence[int]
    image: int
    mask: Tensor | None = None
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0


class Decoder:
    """Continues prompts about the same images; an image's prefix is computed once.

    Use it while the weights stay as they are.

    Args:
        model: in eval mode.
        prompter: tokenizer, image prefixes and ends of turns.
        prompts: all of them.
        tiles: for each of the I images the numbers of its tiles.
        image_features: (T, M, D) projected features of all tiles.
        max_new_tokens: longest continuation.
    """

    def __init__(
        self,
        model: Sa2VA,
        prompter: Prompter,
        prompts: Sequence[Prompt],
        tiles: Sequence[Sequence[int]],
        image_features: Tensor,
        max_new_tokens: int,
    ) -> None:
        self.model, self.prompter, self.prompts, self.tiles = model, prompter, prompts, tiles
        self.image_features, self.max_new_tokens = image_features, max_new_tokens
        self.pad_id = prompter.tokenizer.pad_token_id or 0
        self.side = int(image_features.shape[1] ** 0.5)
        model.sync_new_tokens()
        self.prefix_layers, self.prefix_valid = self._read_prefixes()

    def write_all(self, rows_at_once: int) -> list[list[int]]:
        """Return the new ids of every prompt; rows of like length share a generation, so little goes into padding."""
        order = sorted(range(len(self.prompts)), key=lambda row: len(self.prompts[row].question))
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), rows_at_once):
            rows = order[start : start + rows_at_once]
            found.update(zip(rows, self.write(rows), strict=True))
        return [found[row] for row in range(len(order))]

    @torch.no_grad()
    def write(self, rows: Sequence[int]) -> list[list[int]]:
        """Return the new ids of the prompts of these numbers, up to and with what ended them."""
        hidden, valid, cache = self._read_questions(rows)
        asked = [self.prompts[row] for row in rows]
        is_padded = len({len(group) for group in self.tiles}) > 1 or len({len(one.question) for one in asked}) > 1
        is_sampled = any(prompt.temperature > 0 for prompt in asked)
        generators = [torch.Generator().manual_seed(prompt.seed) for prompt in asked]
        end_id = self.prompter.tokenizer.eos_token_id
        alive = torch.arange(len(rows), device=valid.device)
        written: list[list[int]] = [[] for _ in rows]
        for number in range(self.max_new_tokens):
            logits = self.model.mllm.lm_head(hidden).float()
            for place, row in enumerate(alive.tolist() if is_sampled else ()):
                logits[place] = _perturbed(logits[place], asked[row], generators[row])
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
            hidden = self._forward(embeds, valid, cache, is_padded)
        return written

    @torch.no_grad()
    def _read_prefixes(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return keys and values (I, heads, P, d) of every layer for all image prefixes, and (I, P) real columns.

        A few images are read at a time.
        """
        prefixes = [self.prompter.image_prefix(len(group)) for group in self.tiles]
        ids, valid = left_pad(prefixes, self.pad_id, self.model.device)
        layers, size = [], prefixes_at_once(ids.shape[1], self.model.device.type)
        none = torch.zeros(0, dtype=torch.long, device=ids.device)
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            tiles = [tile for image in self.tiles[part] for tile in image]
            no_masks = torch.zeros(0, self.side, self.side, dtype=torch.bool, device=ids.device)
            embeds = self.model.embed_prompt(ids[part], self.image_features[tiles], none, no_masks)
            cache = self.model.new_cache(0)
            self._forward(embeds, valid[part], cache)
            layers.append([(layer.keys, layer.values) for layer in cast(list[DynamicLayer], cache.layers)])
        joined = [tuple(torch.cat(same) for same in zip(*parts, strict=True)) for parts in zip(*layers, strict=True)]
        return [(keys, values) for keys, values in joined], valid

    def _read_questions(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Cache]:
        """Return the last hidden state (R, D) of each row, the real columns (R, columns), and the filled cache."""
        device, prompts = self.model.device, [self.prompts[row] for row in rows]
        ids, valid = left_pad([prompt.question for prompt in prompts], self.pad_id, device)
        # A region refers to the last tile of its image: the thumbnail, or the only tile.
        asked = [(self.tiles[one.image][-1], one.mask.bool()) for one in prompts if one.mask is not None]
        last = torch.tensor([tile for tile, _ in asked], dtype=torch.long, device=device)
        none = torch.zeros(0, self.side, self.side, dtype=torch.bool)
        masks = torch.stack([mask for _, mask in asked]) if asked else none
        embeds = self.model.embed_regions(ids, self.image_features, last, masks.to(device))
        cache = self.model.new_cache(self.max_new_tokens + ids.shape[1])
        index = torch.tensor([prompt.image for prompt in prompts], device=device)
        for number, (keys, values) in enumerate(self.prefix_layers):
            cache.update(keys[index], values[index], number)
        valid = torch.cat([self.prefix_valid[index], valid], dim=1)
        return self._forward(embeds, valid, cache), valid, cache

    def _forward(self, embeds: Tensor, valid: Tensor, cache: Cache, is_padded: bool = True) -> Tensor:
        """Run new columns (R, n, D) behind what the cache holds; return the hidden state (R, D) of the last one.

        ``valid`` (R, columns) bool are the real ones among all columns, the new ones included. A single new column of
        rows without padding sees every column and needs no mask, so attention may group its heads.
        """
        count, total = embeds.shape[1], valid.shape[1]
        positions = (valid.long().cumsum(1) - 1).clamp_min(0)[:, -count:]
        mask = None
        if count > 1 or is_padded:
            seen = torch.arange(total, device=valid.device)[None, :]
            last = torch.arange(total - count, total, device=valid.device)[:, None]
            # A padded column sees itself: a softmax over nothing has no meaning.
            allowed = (valid[:, None, :] & (seen <= last)) | (seen == last)
            mask = additive_mask(allowed[:, None], embeds.dtype)
        return self.model.step_language(embeds, mask, positions, cache)


def _perturbed(logits: Tensor, prompt: Prompt, generator: torch.Generator) -> Tensor:
    """Return logits (V,) whose arg-max is a draw from their softmax (Gumbel-max trick); as they are where greedy."""
    if prompt.temperature == 0:
        return logits
    if prompt.top_p < 1.0:
        # This warper looks at the scores alone.
        logits = TopPLogitsWarper(prompt.top_p)(logits.new_zeros(1, 0, dtype=torch.long), logits[None])[0]
    uniform = torch.rand(len(logits), generator=generator).to(logits.device).clamp_min(1e-20)
    return logits / prompt.temperature - torch.log(-torch.log(uniform))


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left: (R, L) int64 ids and (R, L) bool, true on real tokens."""
    parts = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(parts, batch_first=True, padding_value=pad_id, padding_side="left")
    valid = pad_sequence([part >= 0 for part in parts], batch_first=True, padding_side="left")
    return ids.to(device), valid.to(device)


def prefixes_at_once(length: int, device_type: str) -> int:
    """Return how many image prefixes of ``length`` tokens one forward pass reads on this kind of device."""
    most = CPU_TOKENS // max(1, length) if device_type == "cpu" else IMAGES_AT_ONCE
    return max(1, min(IMAGES_AT_ONCE, most))


@runtime_checkable
class KeepsMatrix(Protocol):
    """A frozen layer that keeps its matrix elsewhere than in a parameter."""

    dtype: torch.dtype

    @staticmethod
    def merge(layers: Sequence[LoraLinear], undo: ExitStack) -> None:
        """Add the adapters of ``layers``, whose base layers are of this class, to the matrices; ``undo`` restores."""


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Add the adapters to their float32 matrices for the length of a ``with`` block; no graph.

    The frozen matrices themselves are put aside and come back as they were, whatever happens inside or in merging.
    Layers whose matrices have another dtype, or live elsewhere than in a plain tensor, keep their adapters.
    """
    plain: list[LoraLinear] = []
    kept: dict[type[KeepsMatrix], list[LoraLinear]] = {}
    for layer in (module for module in model.modules() if isinstance(module, LoraLinear)):
        if len(layer.active_adapters) != 1 or layer.merged or layer.disable_adapters or layer.lora_variant:
            continue
        base: Any = layer.get_base_layer()
        keeps = isinstance(base, KeepsMatrix)
        weight = None if keeps else getattr(base, "weight", None)
        if keeps and base.dtype in _WIDE:
            kept.setdefault(type(base), []).append(layer)
        elif isinstance(weight, nn.Parameter) and not isinstance(weight, DTensor) and weight.dtype in _WIDE:
            plain.append(layer)
    with ExitStack() as undo:
        undo.callback(torch.clear_autocast_cache)  # it holds casts of matrices that train
        with torch.no_grad():
            for layer in plain:
                matrix: Any = layer.get_base_layer().weight
                undo.callback(setattr, matrix, "data", matrix.data)
                matrix.data = matrix + layer.get_delta_weight(layer.active_adapters[0])
            for cls, layers in kept.items():
                cls.merge(layers, undo)
        torch.clear_autocast_cache()
        for layer in chain(plain, *kept.values()):
            undo.callback(setattr, layer, "_disable_adapters", False)
            layer._disable_adapters = True
        yield

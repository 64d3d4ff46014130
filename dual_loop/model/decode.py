"""Many prompts continued at once: an image's prefix is paid once, finished rows leave the batch.

A row of the key-value cache is ``padding, image prefix, padding, question, new tokens``; positions count real tokens
only. Keys and values of a prefix are computed once for each image and copied into the rows of all its regions and
samples. The result is that of transformers' ``generate`` on the whole prompts, up to rounding.

On a GPU the host only queues work: tokens, masks and sampling noise stay on the device, every tensor of a step keeps
its place (so that a step can be recorded once and played again), and the host looks every few tokens which rows ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import psutil
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer

from dual_loop.model.hardware import GPU_ROWS, round_columns, round_rows, send
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA, additive_mask
from dual_loop.model.sampling import keep_top, uniform_noise

IMAGES_AT_ONCE = 8
"""Most image prefixes that one forward pass reads."""
CPU_TOKENS = 1024
"""Tokens that keep a CPU's products busy; more at a time would hold memory for no speed."""
LOOK_EVERY = 8
"""Tokens after which the host looks at those of a GPU, which it waits for. On a CPU it looks at every one."""
CACHE_SHARE = 1 / 16
"""Share of the device's memory that the rows of one generation may fill."""
_WIDE = (torch.float32, torch.float64)
"""Dtypes in which a matrix and its adapter can be added without a rounding that counts."""


@dataclass(frozen=True)
class Prompt:
    """A question about one of I images, and how the tokens of its answer are chosen.

    Attributes:
        question: token ids that follow the image.
        image: 0..I-1.
        mask: (G, G) bool on the host, the region prompt; None for a question without one.
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


@dataclass
class Window:
    """Which columns of a cache a forward pass writes, (n,) int64, and how many from the first on it sees."""

    columns: Tensor
    shown: int


class StaticLayer(DynamicLayer):
    """Keys and values of one layer, (rows, heads, columns, d), of fixed size; for inference only.

    The stock layer copies all keys and values for each new token. What nobody wrote yet is 0 and masked. Keys are kept
    in the dtype of the values: under autocast attention would cast all of them to it for every token.
    """

    def __init__(self, window: Window, rows: int, columns: int) -> None:
        super().__init__()
        self.window, self.rows, self.columns = window, rows, columns

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write (R, heads, n, d) keys and values of the first R rows; return those shown, (R, heads, shown, d)."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = value_states.dtype, value_states.device, True
            heads, width = key_states.shape[1], key_states.shape[3]
            self.keys, self.values = (value_states.new_zeros(self.rows, heads, self.columns, width) for _ in range(2))
        keys, values = (cast(Tensor, buffer)[: len(key_states)] for buffer in (self.keys, self.values))
        keys.index_copy_(2, self.window.columns, key_states.to(keys.dtype))
        values.index_copy_(2, self.window.columns, value_states)
        return keys[:, :, : self.window.shown], values[:, :, : self.window.shown]


@dataclass
class Rows:
    """The R rows of one generation. A step changes these tensors in place.

    Attributes:
        chosen: (R,) int64, the newest token of each row.
        written: (R, A) int64, all new tokens so far.
        count: (1,) int64, how many these are.
        positions: (R, 1) int64 of the newest token.
        mask: (R, 1, 1, columns) additive.
        cache: keys and values. window: its ``columns`` is where the newest token goes.
        choice: seeds (R,), temperatures (R, 1) and shares ``top_p`` (R, 1), None where all are 1; None where no row is
            sampled.
    """

    chosen: Tensor
    written: Tensor
    count: Tensor
    positions: Tensor
    mask: Tensor
    cache: Cache
    window: Window
    choice: tuple[Tensor, Tensor, Tensor | None] | None

    def keep(self, kept: Tensor) -> None:
        """Keep the rows ``kept`` (int64) alone, in that order."""
        for name in ("chosen", "written", "positions", "mask"):
            setattr(self, name, getattr(self, name)[kept])
        if self.choice is not None:
            seeds, temperature, top_p = self.choice
            self.choice = seeds[kept], temperature[kept], None if top_p is None else top_p[kept]
        self.cache.batch_select_indices(kept)


class Decoder:
    """Continues prompts about the same images; an image's prefix is computed once.

    Use it while the weights stay as they are.

    Args:
        model: in eval mode.
        prompter: tokenizer, image prefixes and ends of turns.
        prompts: all of them.
        images: the projected features of each of the I images, (tiles, M, D); the last tile shows the whole image.
        max_new_tokens: longest continuation.
        frames: of each image that is a clip, the tiles of each of its frames; None where all are single images.
    """

    def __init__(
        self,
        model: Sa2VA,
        prompter: Prompter,
        prompts: Sequence[Prompt],
        images: Sequence[Tensor],
        max_new_tokens: int,
        frames: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.model, self.prompter, self.prompts = model, prompter, prompts
        self.frames = [(len(tiles),) for tiles in images] if frames is None else frames
        self.images, self.max_new_tokens = list(images), max_new_tokens
        self.device = model.device
        self.pad_id = prompter.tokenizer.pad_token_id or 0
        self.side = int(self.images[0].shape[1] ** 0.5)
        self.look_every = 1 if self.device.type == "cpu" else LOOK_EVERY
        model.sync_new_tokens()
        self.run_token = model.token_step()
        self.prefix_layers, self.prefix_valid = self._read_prefixes()

    def write_all(self, rows_at_once: int | None = None) -> list[list[int]]:
        """Return the new ids of every prompt; rows of like length share a generation, so little goes into padding.

        ``rows_at_once``: at most so many share one; None leaves it to the device's memory.
        """
        order = sorted(range(len(self.prompts)), key=lambda row: len(self.prompts[row].question))
        size = rows_at_once or self.rows_that_fit(max(len(prompt.question) for prompt in self.prompts))
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            found.update(zip(rows, self.write(rows), strict=True))
        return [found[row] for row in range(len(order))]

    def rows_that_fit(self, question: int) -> int:
        """Return how many rows with questions of so many tokens :data:`CACHE_SHARE` of the device's memory holds.

        It asks for the memory that the device has, not for what is free: a resumed run must split alike.
        """
        is_cpu = self.device.type == "cpu"
        memory = psutil.virtual_memory().total if is_cpu else torch.cuda.mem_get_info(self.device)[1]
        keys = self.prefix_layers[0][0]
        row = row_bytes(self.model, keys.shape[2] + question + self.max_new_tokens, keys.element_size())
        return max(1, min(GPU_ROWS[-1], int(memory * CACHE_SHARE) // row))

    @torch.no_grad()
    def write(self, rows: Sequence[int]) -> list[list[int]]:
        """Return the new ids of the prompts of these numbers, up to and with what ended them."""
        state = self._read_questions(rows)
        first = state.window.shown
        texts: list[list[int]] = [[] for _ in rows]
        owners, is_open = list(range(len(rows))), [True] * len(rows)  # of the state's rows
        run: Callable[[], None] | None = None
        for count in range(1, self.max_new_tokens + 1):
            if count % self.look_every == 0 or count == self.max_new_tokens:
                ids = state.written[: len(owners), :count].tolist()
                for place, row in enumerate(owners):
                    if is_open[place]:
                        length = self.prompter.answer_length(ids[place], len(texts[row]))
                        texts[row], is_open[place] = ids[place][:length], length is None
                if not any(is_open):
                    break
                size = round_rows(sum(is_open), self.device)
                if size < len(state.chosen):
                    kept = [place for place, one in enumerate(is_open) if one]
                    owners, is_open, run = [owners[place] for place in kept], [True] * len(kept), None
                    kept += [0] * (size - len(kept))
                    state.keep(send(torch.tensor(kept), self.device))
            if count < self.max_new_tokens:
                shown = round_columns(first + count, self.device)
                if run is None or shown != state.window.shown:
                    state.window.shown = shown
                    run = self.model.repeated(partial(self._step, state))
                run()
        return texts

    def _step(self, state: Rows) -> None:
        """Run the newest token of every row and choose the next; nothing here waits for the device."""
        embeds = self.model.mllm.get_input_embeddings()(state.chosen)[:, None]
        state.mask.index_fill_(3, state.window.columns, 0.0)
        mask = state.mask[..., : state.window.shown]
        self._choose(self.run_token(embeds, mask, state.positions, state.cache), state)
        state.positions += 1
        state.window.columns += 1

    def _choose(self, hidden: Tensor, state: Rows) -> None:
        """Choose the next token of the first rows from their last hidden states (R, D)."""
        logits = self.model.mllm.lm_head(hidden).float()
        if state.choice is not None:
            seeds, temperature, top_p = state.choice
            if top_p is not None:
                logits = keep_top(logits, top_p[: len(hidden)])
            # The arg-max of perturbed logits is a draw from their softmax (Gumbel-max trick), and greedy at 0.
            uniform = uniform_noise(seeds[: len(hidden)], state.count, logits.shape[1])
            logits = logits - temperature[: len(hidden)] * (-uniform.log()).log()
        state.chosen[: len(hidden)] = logits.argmax(-1)
        state.written.index_copy_(1, state.count, state.chosen[:, None])
        state.count += 1

    @torch.no_grad()
    def _read_prefixes(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return keys and values (I, heads, P, d) of every layer for all image prefixes, and (I, P) real columns.

        A few images are read at a time.
        """
        prefixes = [self.prompter.image_prefix(*tiles) for tiles in self.frames]
        length = round_columns(max(map(len, prefixes)), self.device)
        ids, valid = left_pad(prefixes, self.pad_id, length)
        layers, size = [], prefixes_at_once(length, self.device.type)
        nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0, self.side, self.side, dtype=torch.bool)
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            embeds = self.model.embed_prompt(ids[part], torch.cat(self.images[part]), *nothing)
            cache, window = self._new_cache(len(embeds), length)
            self._read(embeds, valid[part], cache, window)
            layers.append([(layer.keys, layer.values) for layer in cast(list[DynamicLayer], cache.layers)])
        joined = [tuple(torch.cat(same) for same in zip(*parts, strict=True)) for parts in zip(*layers, strict=True)]
        return [(keys, values) for keys, values in joined], valid

    def _read_questions(self, rows: Sequence[int]) -> Rows:
        """Read the questions of these prompts and choose the first token of each."""
        device, prompts = self.device, [self.prompts[row] for row in rows]
        prefix = self.prefix_valid.shape[1]
        longest = max(len(prompt.question) for prompt in prompts)
        ids, valid = left_pad([one.question for one in prompts], self.pad_id, round_columns(longest, device))
        # A region refers to the last tile of its image: the thumbnail, or the only tile.
        last = torch.stack([tiles[-1] for tiles in self.images])
        asked = [(one.image, one.mask.bool()) for one in prompts if one.mask is not None]
        owners = torch.tensor([image for image, _ in asked], dtype=torch.long)
        none = torch.zeros(0, self.side, self.side, dtype=torch.bool)
        masks = torch.stack([mask for _, mask in asked]) if asked else none
        embeds = self.model.embed_prompt(ids, last, owners, masks, has_images=False)
        first, size = prefix + ids.shape[1], round_rows(len(rows), device)
        columns = first + round_columns(self.max_new_tokens, device)
        cache, window = self._new_cache(size, columns)
        window.columns, window.shown = torch.arange(prefix, device=device), prefix
        images = torch.tensor([prompt.image for prompt in prompts])
        index = send(images, device)
        for number, (keys, values) in enumerate(self.prefix_layers):
            cache.update(keys[index], values[index], number)
        valid = torch.cat([self.prefix_valid[images], valid], dim=1)
        hidden = self._read(embeds, valid, cache, window)
        window.columns = torch.full((1,), first, device=device)
        fill = size - len(rows)
        allowed = torch.zeros(size, 1, 1, columns, dtype=torch.bool)
        allowed[: len(rows), 0, 0, :first] = valid
        dtype = cast(Any, cache.layers[0]).dtype
        choice = None
        if any(prompt.temperature > 0 for prompt in prompts):
            filled = [*prompts, *prompts[:1] * fill]
            seeds, temperature, top_p = (
                send(torch.tensor(values), device)
                for values in (
                    [one.seed for one in filled],
                    [[one.temperature] for one in filled],
                    [[one.top_p] for one in filled],
                )
            )
            choice = seeds, temperature, top_p if any(one.top_p < 1.0 for one in prompts) else None
        state = Rows(
            chosen=torch.zeros(size, dtype=torch.long, device=device),
            written=torch.zeros(size, self.max_new_tokens, dtype=torch.long, device=device),
            count=torch.zeros(1, dtype=torch.long, device=device),
            positions=send(torch.cat([valid.sum(1), torch.zeros(fill, dtype=torch.long)])[:, None], device),
            mask=additive_mask(send(allowed, device), dtype),
            cache=cache,
            window=window,
            choice=choice,
        )
        self._choose(hidden, state)
        return state

    def _new_cache(self, rows: int, columns: int) -> tuple[Cache, Window]:
        """Return an empty cache of this size and its window, which shows and writes all columns."""
        window = Window(torch.arange(columns, device=self.device), columns)
        return Cache(layers=[StaticLayer(window, rows, columns) for _ in range(self.model.num_layers)]), window

    def _read(self, embeds: Tensor, valid: Tensor, cache: Cache, window: Window) -> Tensor:
        """Run new columns (R, n, D) behind those that the cache holds; return the last hidden state (R, D).

        ``valid`` (R, columns) bool on the host are the real ones among all columns, the new ones included.
        """
        count, total = embeds.shape[1], valid.shape[1]
        window.columns, window.shown = torch.arange(total - count, total, device=self.device), total
        positions = (valid.long().cumsum(1) - 1).clamp_min(0)[:, -count:]
        real, seen, last = send(valid, self.device), torch.arange(total, device=self.device), window.columns[:, None]
        # A padded column sees itself: a softmax over nothing has no meaning.
        allowed = (real[:, None, :] & (seen <= last)) | (seen == last)
        mask = additive_mask(allowed[:, None], embeds.dtype)
        return self.model.step_language(embeds, mask, send(positions, self.device), cache)


def head_width(config: Any) -> int:
    """Return the values of one attention head, of a language model's configuration."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def row_bytes(model: Sa2VA, columns: int, itemsize: int) -> int:
    """Return the bytes that a row of so many columns takes: keys and values, logits with their noise and its parts."""
    config = model.mllm.model.language_model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_width(config) * itemsize
    return int(columns * token + 8 * 4 * model.mllm.lm_head.out_features)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left, to ``length`` at least: (R, L) int64 ids and (R, L) bool, true on real tokens."""
    parts = [torch.tensor(row, dtype=torch.long) for row in (*rows, [pad_id] * length)]
    ids = pad_sequence(parts, batch_first=True, padding_value=pad_id, padding_side="left")[:-1]
    valid = pad_sequence([part >= 0 for part in parts], batch_first=True, padding_side="left")[:-1]
    return ids, valid


def prefixes_at_once(length: int, device_type: str) -> int:
    """Return how many image prefixes of ``length`` tokens one forward pass reads on this kind of device."""
    most = CPU_TOKENS // max(1, length) if device_type == "cpu" else IMAGES_AT_ONCE
    return max(1, min(IMAGES_AT_ONCE, most))


@runtime_checkable
class KeepsMatrix(Protocol):
    """A frozen layer that keeps its matrix elsewhere than in a parameter."""

    dtype: torch.dtype

    def add_to_matrix(self, delta: Tensor, undo: ExitStack) -> None:
        """Add (out, in) to the matrix; ``undo`` restores it."""


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Add the adapters to their float32 matrices for the length of a ``with`` block; no graph.

    The frozen matrices themselves are put aside and come back as they were, whatever happens inside or in merging.
    Layers whose matrices have another dtype, or live elsewhere than in a plain tensor, keep their adapters.
    """
    with ExitStack() as undo:
        undo.callback(torch.clear_autocast_cache)  # it holds casts of matrices that train
        for layer in model.modules():
            if isinstance(layer, LoraLinear):
                _merge_adapter(layer, undo)
        torch.clear_autocast_cache()
        yield


@torch.no_grad()
def _merge_adapter(layer: LoraLinear, undo: ExitStack) -> None:
    if len(layer.active_adapters) != 1 or layer.merged or layer.disable_adapters or layer.lora_variant:
        return
    base: Any = layer.get_base_layer()
    keeps = isinstance(base, KeepsMatrix)
    matrix: Any = base if keeps else getattr(base, "weight", None)
    is_plain = isinstance(matrix, nn.Parameter) and not isinstance(matrix, DTensor)
    if not (keeps or is_plain) or matrix.dtype not in _WIDE:
        return
    delta = layer.get_delta_weight(layer.active_adapters[0])
    if keeps:
        base.add_to_matrix(delta, undo)
    else:
        undo.callback(setattr, matrix, "data", matrix.data)
        matrix.data = matrix + delta
    undo.callback(setattr, layer, "_disable_adapters", False)
    layer._disable_adapters = True

"""Recomputing the activations of some decoder layers: how many layers, and what a layer keeps otherwise.

A layer that is recomputed keeps its input alone until the backward pass; any other keeps what its operations save for
their gradients, measured here on one layer without computing it. Values and gradients are the same either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from dual_loop.config import Config
from dual_loop.model.grounding import GroundingDecoder, GroundingFeatures


@dataclass(frozen=True)
class LayerMemory:
    """What one decoder layer keeps of one micro-batch for the backward pass, in bytes.

    Attributes:
        kept: everything that its operations save, without parameters and without what all layers share.
        entry: its input alone, which is all that a recomputed layer keeps.
    """

    kept: int
    entry: int


def requested_layers(config: Config, num_layers: int) -> int | None:
    """Return how many layers the configuration wants recomputed; None where it leaves that to the memory there is.

    ``model.gradient_checkpointing = False`` means none, whatever ``speed.checkpoint_layers`` says.
    """
    choice = config.speed.checkpoint_layers
    if not config.model.gradient_checkpointing or choice == "none":
        return 0
    if choice == "auto":
        return None
    return num_layers if choice == "all" else min(int(choice), num_layers)


def checkpoint_first(model: Any, count: int) -> None:
    """Let the first ``count`` decoder layers recompute their activations, and no other.

    The first ones, because the backward pass reaches them last: by then the others have let their activations go, so
    the one that is recomputed adds nothing to the peak.

    Args:
        model: a ``VideoLLaVASAMModel``.
        count: 0 to the number of layers.
    """
    for index, layer in enumerate(model.mllm.model.language_model.layers):
        _switch(layer, index < count)
    tower = model.mllm.model.vision_tower
    trains = any(parameter.requires_grad for parameter in tower.parameters())
    for layer in tower.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            _switch(layer, trains and count > 0)


def _switch(layer: Any, is_on: bool) -> None:
    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    layer.gradient_checkpointing = is_on


def checkpointed_layers(model: Any) -> int:
    """Return how many decoder layers recompute their activations."""
    return sum(bool(layer.gradient_checkpointing) for layer in model.mllm.model.language_model.layers)


def measure_layer(model: Any, rows: int, length: int, autocast: bool) -> LayerMemory:
    """Return what one decoder layer keeps of ``rows`` packed rows of ``length`` tokens.

    The layer runs on CPU tensors without contents (``FakeTensorMode``): they take neither time nor memory, and choose
    the operations of a CPU, whose attention kernel saves queries, keys, values and output, as those of GPUs do.
    Parameters may be on the meta device. Call it before matrices are packed or sharded.

    Args:
        model: a ``VideoLLaVASAMModel``.
        rows, length: of the micro-batch.
        autocast: whether training runs under bf16 autocast.
    """
    language = model.mllm.model.language_model
    layer = language.layers[0]
    with _training(layer), FakeTensorMode(), torch.device("cpu"):
        parameters = {name: _hollow(parameter) for name, parameter in layer.named_parameters()}
        inputs = _layer_inputs(language, rows, length)
        shared = [*parameters.values(), inputs["attention_mask"], *inputs["position_embeddings"]]
        # The input has a history, as in the real model.
        entry = torch.empty(rows, length, language.config.hidden_size, dtype=_dtype(language)).requires_grad_() * 1
        with _counting(shared) as saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            functional_call(layer, parameters, (entry,), inputs)
        return LayerMemory(sum(saved.values()), entry.untyped_storage().nbytes())


def measure_mask_decoder(model: Any, images: int, objects: int, autocast: bool) -> int:
    """Return the bytes that SAM 2's mask decoder keeps of ``objects`` on ``images`` for the backward pass.

    Measured as in :func:`measure_layer`.
    """
    decoding = _Decoding(model.grounding)
    with FakeTensorMode(), torch.device("cpu"):
        state = {name: _hollow(value) for name, value in [*decoding.named_parameters(), *decoding.named_buffers()]}
        kind = next(model.grounding_encoder.parameters()).dtype
        width = model.grounding_encoder.config.prompt_encoder_config.hidden_size
        sizes = [(model.grounding.level_width(k), model.mask_size // 2**k) for k in range(3)]
        levels = [torch.empty(images, channels, side, side, dtype=kind) for channels, side in sizes]
        embeds = torch.empty(objects, width, dtype=kind).requires_grad_() * 1
        index = torch.zeros(objects, dtype=torch.long)
        with _counting(list(state.values())) as saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            functional_call(decoding, state, (embeds, levels, index))
        return sum(saved.values())


class _Decoding(nn.Module):
    """The part of the grounding that has a graph, as a module."""

    def __init__(self, grounding: GroundingDecoder) -> None:
        super().__init__()
        self.sam, self.grounding = grounding.sam, grounding

    def forward(self, embeds: Tensor, levels: list[Tensor], index: Tensor) -> Tensor:
        finished = self.grounding.finish(GroundingFeatures(levels))
        return self.grounding.decode_candidates(self.grounding.sparse_prompts(embeds), finished, index)[0]


@contextmanager
def _training(layer: Any) -> Iterator[None]:
    """Put a layer into training mode without recomputation, and restore both."""
    before = layer.training, layer.gradient_checkpointing
    layer.train()
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.train(before[0])
        layer.gradient_checkpointing = before[1]


def _hollow(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and dtype without contents (inside a ``FakeTensorMode``)."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)


def _dtype(language: Any) -> torch.dtype:
    kind: torch.dtype = language.embed_tokens.weight.dtype
    return kind


def _layer_inputs(language: Any, rows: int, length: int) -> dict[str, Any]:
    """Return the keyword arguments of a decoder layer for packed rows."""
    config, kind = language.config, _dtype(language)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "attention_mask": torch.empty(rows, 1, length, length, dtype=kind),
        "position_ids": torch.empty(rows, length, dtype=torch.long),
        "position_embeddings": tuple(torch.empty(rows, length, head, dtype=kind) for _ in range(2)),
    }


@contextmanager
def _counting(left_out: list[Tensor]) -> Iterator[dict[int, int]]:
    """Collect the bytes of every storage that is saved for a backward pass, once each, but those of ``left_out``."""
    skipped = {_storage_key(tensor) for tensor in left_out}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # the address of a storage that is gone could come again

    def pack(tensor: Tensor) -> Tensor:
        key = _storage_key(tensor)
        if key not in skipped:
            alive.append(tensor)
            saved[key] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

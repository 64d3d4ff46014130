"""What trains and what is frozen: LoRA, parameter groups, and the rows of new tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dual_loop.config import ModelConfig
from dual_loop.errors import ConfigError, explain

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

GROUPS: Mapping[str, tuple[str, ...]] = {
    "lora": (".lora_A.", ".lora_B.", ".lora_magnitude_vector."),
    "mlp1": ("mllm.model.multi_modal_projector.",),
    "mask_decoder": ("grounding_encoder.mask_decoder.",),
    "text_hidden_fcs": ("text_hidden_fcs.",),
    "new_tokens": ("new_token_rows.",),
    "embeddings": ("language_model.embed_tokens.", "mllm.lm_head."),
    "language_model": ("mllm.model.language_model.", "mllm.lm_head."),
    "vision_tower": ("mllm.model.vision_tower.",),
    "sam2_encoder": ("grounding_encoder.vision_encoder.", "grounding_encoder.no_memory_embedding"),
}
"""Parameter groups by parts of the parameter's name. ``language_model`` excludes LoRA and embedding rows."""

IOU_HEADS = ("mask_decoder.iou_prediction_head.", "mask_decoder.pred_obj_score_head.")


def without_mask_gradient(single_mask: bool) -> tuple[str, ...]:
    """Return name parts inside the mask decoder that mask losses never reach.

    They stay frozen: without gradient they would break DDP (heads) or decay to nothing under AdamW (mask tokens that
    are computed and thrown away).
    """
    unused = (1, 2, 3) if single_mask else (0,)
    return (*IOU_HEADS, *(f"mask_decoder.output_hypernetworks_mlps.{index}." for index in unused))


def lora_config(settings: ModelConfig, **further: Any) -> LoraConfig:
    """Return what peft calls the adapters of these settings."""
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        target_modules=list(LORA_TARGETS),
        bias="none",
        **further,
    )


def lora_scale(settings: ModelConfig) -> float:
    """Return what the product B A is multiplied with."""
    return settings.lora_alpha / (math.sqrt(settings.lora_r) if settings.use_rslora else settings.lora_r)


def add_lora(language_model: nn.Module, settings: ModelConfig) -> None:
    """Wrap every linear layer of the language model with LoRA, in place (the head is outside and stays plain).

    Names become ``...q_proj.base_layer.weight`` and ``...q_proj.lora_A.default.weight``, as in Sa2VA's checkpoints.
    """
    inject_adapter_in_model(lora_config(settings), language_model)


@torch.no_grad()
def reset_magnitudes(model: nn.Module) -> None:
    """Give DoRA's magnitudes the norms of the rows as they are now, so that they change nothing yet."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear) and layer.lora_variant:
            base = cast(nn.Linear, layer.get_base_layer())
            row = base.weight.float() + layer.get_delta_weight("default").float()
            layer.lora_magnitude_vector["default"].get_parameter("weight").copy_(row.norm(dim=1))


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run the bare language model for the length of a ``with`` block: the reference of the policy, for no memory.

    What trains besides LoRA (``mlp1``) keeps its live weights. ``enable_adapters`` of peft would also switch off
    ``requires_grad`` and on again, which hooks of DDP need not see; the flag that its layers read is set instead.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def group_of(name: str) -> str | None:
    """Return the group that parameter ``name`` belongs to, None for parts that never train."""
    for group, parts in GROUPS.items():
        if any(part in name for part in parts):
            return group
    return None


def apply_freeze_policy(model: nn.Module, groups: Sequence[str], single_mask: bool) -> None:
    """Let exactly the parameters of ``groups`` train, in float32, and freeze all others.

    Raises:
        ConfigError: a group holds no parameter of this model.
    """
    skip = without_mask_gradient(single_mask)
    seen = set()
    for name, parameter in model.named_parameters():
        group = group_of(name)
        trains = group in groups and not any(part in name for part in skip)
        parameter.requires_grad_(trains)
        if trains:
            seen.add(group)
            # Small updates vanish in bfloat16; what trains is kept in float32 and cast by autocast where it is used.
            parameter.data = parameter.data.float()
    missing = [group for group in groups if group not in seen]
    if missing:
        raise ConfigError(explain("a parameter group to be trained is empty in this model", "model.trainable", missing))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_table(model: nn.Module) -> str:
    """Return the printed table of what trains: a row a group with tensors and values, trained and frozen."""
    rows: dict[str, list[int]] = {}
    total = [0, 0, 0]
    for name, parameter in model.named_parameters():
        trains, size = parameter.requires_grad, parameter.numel()
        for row in (rows.setdefault(group_of(name) or "other (SAM 2 prompt encoder)", [0, 0, 0]), total):
            row[:] = row[0] + trains, row[1] + trains * size, row[2] + (not trains) * size
    lines = [f"{'group':<30}{'tensors':>9}{'trained':>15}{'frozen':>16}"]
    lines += [f"{group:<30}{r[0]:>9,}{r[1]:>15,}{r[2]:>16,}" for group, r in [*rows.items(), ("total", total)]]
    return "\n".join(lines)


class NewTokenRows(nn.Module):
    """Trainable input and output rows of the tokens that were appended to the vocabulary.

    The big tables stay frozen; these rows stand in for theirs. ``write_back`` copies them into the tables, so that
    generation, which reads the tables, sees them too.

    Args:
        first_id: id of the first new token; the new tokens are ``first_id .. first_id + count - 1``.
        embedding: (V, D) input table. head: (V, D) output table.
    """

    def __init__(self, first_id: int, count: int, embedding: nn.Embedding, head: nn.Linear) -> None:
        super().__init__()
        self.first_id = first_id
        rows = slice(first_id, first_id + count)
        self.input_rows = nn.Parameter(embedding.weight.detach()[rows].clone())
        self.output_rows = nn.Parameter(head.weight.detach()[rows].clone())

    def embed(self, input_ids: Tensor, embedded: Tensor) -> Tensor:
        """Replace the embeddings (..., D) of new tokens by the trained rows."""
        index = input_ids - self.first_id
        is_new = (index >= 0) & (index < len(self.input_rows))
        rows = self.input_rows[index.clamp(0, len(self.input_rows) - 1)].to(embedded.dtype)
        return torch.where(is_new[..., None], rows, embedded)

    def logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Replace the logits (P, V) of new tokens by those of the trained rows, given hidden states (P, D)."""
        new = hidden @ self.output_rows.to(hidden.dtype).T
        last = self.first_id + len(self.output_rows)
        return torch.cat([logits[:, : self.first_id], new.to(logits.dtype), logits[:, last:]], dim=1)

    @torch.no_grad()
    def read_tables(self, embedding: nn.Embedding, head: nn.Linear) -> None:
        """Take the rows over from the tables, after weights were loaded that bring tables but no rows."""
        rows = slice(self.first_id, self.first_id + len(self.input_rows))
        self.input_rows.copy_(embedding.weight[rows])
        self.output_rows.copy_(head.weight[rows])

    @torch.no_grad()
    def write_back(self, embedding: nn.Embedding, head: nn.Linear) -> None:
        """Copy the rows into the tables."""
        rows = slice(self.first_id, self.first_id + len(self.input_rows))
        embedding.weight.data[rows] = self.input_rows.to(embedding.weight.dtype)
        head.weight.data[rows] = self.output_rows.to(head.weight.dtype)

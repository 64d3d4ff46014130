"""What a run would be, without running it: what trains, how much memory, which batch. Needs no weights and no data."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from dual_loop.config import Config
from dual_loop.errors import CheckpointError
from dual_loop.model.adapters import GROUPS, trainable_table
from dual_loop.model.build import build_model, build_tokenizer
from dual_loop.model.prompts import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, NEW_TOKENS
from dual_loop.training.devices import share_out_batch
from dual_loop.training.memory import LayerPlan, LayerPlanner
from dual_loop.training.window_parts import as_computed

FORMULA = (
    "frozen x bytes of model.dtype (SAM 2: 4) + trained x (4 value + 4 gradient + 8 Adam + 4 average "
    "+ 4 DDP buckets on several ranks); activations (language): recomputed layers x their input + the other layers x "
    "what one saves, measured without contents on a long row; activations (other): one layer's gradients, the mask "
    "decoder as measured, logits of a chunk, mask losses, frozen features of a window; the caption cache comes on top"
)


class PlaceholderTokenizer:
    """Stands in for a tokenizer that is not on this machine: the size and the ids of the released vocabulary.

    Args:
        vocab_size: number of tokens, the five of Sa2VA included, which come last.
    """

    def __init__(self, vocab_size: int) -> None:
        first_new, context = vocab_size - len(NEW_TOKENS), vocab_size - len(NEW_TOKENS) - 7
        self.vocab_size = vocab_size
        # In InternVL2.5's vocabulary of 151,674 tokens <IMG_CONTEXT> is number 151,667, after <img> and </img>.
        self.ids = {IMAGE_START: context - 2, IMAGE_END: context - 1, IMAGE_CONTEXT: context}
        self.ids.update({token: first_new + index for index, token in enumerate(NEW_TOKENS)})

    def __len__(self) -> int:
        return self.vocab_size

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.ids[token]


def dry_run(config: Config) -> str:
    """Build the model of ``config`` on the meta device and return the report."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = share_out_batch(config, world_size)
    model = build_model(config, meta_tokenizer(config), device="meta", weights_imported=True)
    counts = count_parameters(model)
    memory, plan = plan_memory(model, config)
    train = config.train
    effective = world_size * train.batch_size * train.gradient_accumulation_steps
    lines = [
        trainable_table(model),
        "",
        f"base parameters (vision-language model without LoRA): {counts['base']:,} ({counts['base'] / 1e9:.1f} B)",
        f"LoRA parameters: {counts['lora']:,} ({counts['lora'] / 1e6:.0f} M)",
        f"SAM 2 parameters: {counts['sam2']:,} ({counts['sam2'] / 1e6:.0f} M)",
        "",
        f"memory estimate, a process (GiB): {sum(memory.values()):.1f}",
        *(f"  {name:<28}{value:8.2f}" for name, value in memory.items()),
        f"  formula: {FORMULA}",
        f"  {plan.line()}",
        *(("  state speed.memory_gib to see what auto would choose",) if plan.chosen_by == "default" else ()),
        "",
        f"effective batch: {effective} = {world_size} processes x {train.batch_size} images x "
        f"{train.gradient_accumulation_steps} micro-batches",
    ]
    return "\n".join(lines)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return the numbers of values of the base model, of LoRA and of SAM 2."""
    counts = {"base": 0, "lora": 0, "sam2": 0}
    for name, parameter in model.named_parameters():
        if any(part in name for part in GROUPS["lora"]):
            counts["lora"] += parameter.numel()
        elif name.startswith("mllm."):
            counts["base"] += parameter.numel()
        elif name.startswith("grounding_encoder."):
            counts["sam2"] += parameter.numel()
    return counts


def estimate_memory(model: nn.Module, config: Config, memory_gib: float | None = None) -> dict[str, float]:
    """Return GiB of one process by kind, after :data:`FORMULA`; rough, for choosing a batch size."""
    return plan_memory(model, config, memory_gib)[0]


def plan_memory(
    model: nn.Module, config: Config, memory_gib: float | None = None
) -> tuple[dict[str, float], LayerPlan]:
    """Return :func:`estimate_memory` and the layers that recompute their activations in it.

    Args:
        model: on the meta device.
        memory_gib: what a process may use, where ``speed.checkpoint_layers`` is ``auto``; None takes
            ``speed.memory_gib``, and without that all layers are recomputed.
    """
    sizes = state_bytes(model, int(os.environ.get("WORLD_SIZE", "1")))
    computed = as_computed(config, "cpu" if config.train.device == "cpu" else "cuda")
    planner, memory = LayerPlanner(computed, model), memory_gib or config.speed.memory_gib
    plan = planner.decide(None if memory is None else max(memory * 2**30 - sum(sizes.values()), 0.0))
    sizes["activations (language)"] = planner.language(plan.recomputed)
    sizes["activations (other)"] = planner.other
    return {name: value / 2**30 for name, value in sizes.items() if value}, plan


def state_bytes(model: nn.Module, world_size: int) -> dict[str, float]:
    """Return the bytes of one rank that are there whatever the batch is: weights and what belongs to what trains."""
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "frozen parameters": frozen,
        "trained parameters (fp32)": 4 * trained,
        "gradients (fp32)": 4 * trained,
        "Adam moments (fp32)": 8 * trained,
        "weight average (fp32)": 4 * trained,
        "DDP buckets (fp32)": 4 * trained if world_size > 1 else 0,
    }


def meta_tokenizer(config: Config) -> Any:
    """Load the tokenizer where there is one; else take the vocabulary size that the config names."""
    try:
        return build_tokenizer(config.model, config.train.model_path)
    except CheckpointError:
        if "vocab_size" not in config.model.text:
            raise
        return PlaceholderTokenizer(int(config.model.text["vocab_size"]))

"""What a run would be, without running it: what trains, how much memory, which batch. Needs no weights and no data."""

from __future__ import annotations

import os
from typing import Any

from dual_loop.config import Config
from dual_loop.errors import CheckpointError
from dual_loop.model.adapters import GROUPS, trainable_table
from dual_loop.model.build import build_model, build_tokenizer
from dual_loop.model.prompts import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, NEW_TOKENS
from dual_loop.training.devices import share_out_batch
from dual_loop.training.memory import GIB, estimate_memory

FORMULA = (
    "frozen x bytes of model.dtype (SAM 2: 4) + trained x (4 value + 4 gradient + 8 Adam + 4 average "
    "+ 4 DDP buckets on several ranks + 4 for each listener trained apart); activations (language): recomputed "
    "layers x their input + the other layers x what one saves, measured without contents on a long row; activations "
    "(other): one layer's gradients, the mask decoder as measured, logits of a chunk, mask losses; activations "
    "(features): images of a window and what the frozen encoders made of them; activations (roll-out): what prefixes "
    "and rows of captions, or masks that are scored, take beyond the others"
)


class PlaceholderTokenizer:
    """Stands in for a tokenizer that is not on this machine: the size and the ids of the released vocabulary.

    The five tokens of Sa2VA are included in ``vocab_size`` and come last.
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


def meta_tokenizer(config: Config) -> Any:
    """Load the tokenizer where there is one; else take the vocabulary size that the config names."""
    try:
        return build_tokenizer(config.model, config.train.model_path)
    except CheckpointError:
        if "vocab_size" not in config.model.text:
            raise
        return PlaceholderTokenizer(int(config.model.text["vocab_size"]))


def dry_run(config: Config) -> str:
    """Build the model of ``config`` on the meta device and return the report."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = share_out_batch(config, world_size)
    model = build_model(config, meta_tokenizer(config), device="meta", weights_imported=True)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    lora = sum(size for name, size in sizes.items() if any(part in name for part in GROUPS["lora"]))
    base = sum(size for name, size in sizes.items() if name.startswith("mllm.")) - lora
    sam2 = sum(size for name, size in sizes.items() if name.startswith("grounding_encoder."))
    memory, plan = estimate_memory(config, model)
    train = config.train
    effective = world_size * train.batch_size * train.gradient_accumulation_steps
    lines = [
        trainable_table(model),
        "",
        f"base parameters (vision-language model without LoRA): {base:,} ({base / 1e9:.1f} B)",
        f"LoRA parameters: {lora:,} ({lora / 1e6:.0f} M)",
        f"SAM 2 parameters: {sam2:,} ({sam2 / 1e6:.0f} M)",
        "",
        f"memory estimate, a process (GiB): {memory.total / GIB:.1f}",
        *(f"  {name:<28}{size / GIB:8.2f}" for name, size in memory.rows().items()),
        f"  formula: {FORMULA}",
        f"  {plan.line()}",
        *(("  state speed.memory_gib to see what auto would choose",) if plan.chosen_by == "default" else ()),
        "",
        f"effective batch: {effective} = {world_size} processes x {train.batch_size} images x "
        f"{train.gradient_accumulation_steps} micro-batches",
        *((f"images with a graph at a time: {plan.images}",) if plan.images < train.batch_size else ()),
    ]
    return "\n".join(lines)

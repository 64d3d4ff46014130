"""Every preset's own step under a cap of the memory of its card, DDP's buckets left free."""

from __future__ import annotations

import torch

from dual_loop.config import load_config, resolve_config_path
from dual_loop.model.hardware import why_no_bitsandbytes

from acceptance.found import Asked, Found
from acceptance.step import GIB, TINY, variant
from bench.setup import Setting

CARDS = {f"sa2va_4b_{size}gb": gib for size, gib in ((12, 11.7), (16, 14.6), (24, 23.5), (48, 47.4), (80, 79.1))}
"""GiB that the smallest cards of that size have (RTX 3060, T4, RTX 4090, A6000, H100)."""
CONTEXT = 0.6
"""GiB that CUDA and its libraries take beside the tensors."""


def run(asked: Asked, found: Found) -> None:
    # A rehearsal takes the same small model for all.
    for name, card in [*CARDS.items()][-1 if asked.is_tiny else 0 :]:
        preset = load_config(resolve_config_path("tiny_cpu" if asked.is_tiny else name))
        train = preset.train
        missing = why_no_bitsandbytes("cuda") if train.optimizer != "adamw" else None
        if missing is not None:
            found.note(f"{name} is left out: {missing}")
            continue
        buckets = 4 * trained_values(preset.model.lora_r, asked.is_tiny) / GIB
        cap = card - CONTEXT - buckets
        changes = {"speed.memory_gib": cap, "loop.rollout_batch_size": preset.loop.rollout_batch_size}
        if asked.is_tiny:
            # bfloat16 as the presets are, and so that memory decides here too.
            changes |= {"model.dtype": "bfloat16", "model.gradient_checkpointing": True}
        size = (train.batch_size, train.gradient_accumulation_steps)
        tokens, regions = preset.loop.max_new_tokens, preset.data.regions_per_image
        setting = Setting(TINY if asked.is_tiny else name, *size, tokens, regions, changes=changes, device=asked.device)
        if asked.device == "cuda":
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total))
            if cap * GIB > total:
                found.note(f"{name}: this GPU has {total / GIB:.1f} GiB, less than the cap")
        try:
            take_steps(found, name, cap, setting)
        except torch.OutOfMemoryError as error:
            found.check(f"{name} fits {card} GiB", False, str(error).split(". ")[0])
        finally:
            if asked.device == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0)


def take_steps(found: Found, name: str, cap: float, setting: Setting) -> None:
    with variant(setting) as one:
        one.step()  # the first has no Adam moments yet
        seconds, end = one.step()["seconds"], one.end()
        reserved = torch.cuda.max_memory_reserved() / GIB if one.is_gpu else None
        layers = one.trainer.task.model.mllm.model.language_model.layers
        recomputed = sum(layer.gradient_checkpointing for layer in layers)
    peak = end["peak_mb"] / 1024
    found.row(
        "presets",
        preset=name,
        cap_GiB=cap,
        allocated_GiB=peak,
        reserved_GiB=reserved,
        recomputed_layers=f"{recomputed} of {len(layers)}",
        captions_at_once=setting.changes["loop.rollout_batch_size"],
        seconds=seconds,
        images_a_second=setting.batch * setting.accumulation / seconds,
    )
    found.check(f"{name} fits its card", peak <= cap, f"{peak:.1f} GiB of {cap:.1f}")


def trained_values(rank: int, is_tiny: bool) -> float:
    """Return roughly the values that train, which DDP's buckets hold once more: 1 GiB at rank 128."""
    return 0.0 if is_tiny else GIB / 4 * rank / 128

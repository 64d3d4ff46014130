"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from dual_loop.config import TrainConfig
from dual_loop.model.shards import is_sharded


def build_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], config: TrainConfig, is_fused: bool = True
) -> torch.optim.AdamW:
    """Return AdamW (1711.05101) over ``parameters``, in two groups.

    Matrices (2 dimensions and more) decay by ``config.weight_decay``; biases, norms and other vectors do not. Sa2VA
    decays everything; pulling a norm's scale towards zero regularises nothing, so this package leaves vectors alone.
    ``is_fused`` updates all parameters in one kernel; else one small operation after the other.
    """
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # No kernel takes sharded and whole parameters in one list.
    is_fused = is_fused and not any(is_sharded(parameter) for parameter in parameters.values())
    options: dict[str, Any] = {"fused": True} if is_fused else {"foreach": False}
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=config.learning_rate, betas=config.betas, eps=1e-8, **options)


def learning_rate_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of optimiser step ``step`` (0-based): linear warm-up, then half a cosine.

    The rate is a pure function of the step, so resuming needs no scheduler state. The first step already learns a
    little (1 / warm-up steps of the peak), and the last one is at ``learning_rate * min_lr_ratio`` or just above.
    """
    warmup = math.ceil(total_steps * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate

"""AdamW, the learning-rate schedule, and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dual_loop.config import TrainConfig
from dual_loop.model.shards import is_sharded, place_like


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW (1711.05101) over ``parameters``, in two groups.

    Matrices (2 dimensions and more) decay by ``config.weight_decay``; biases, norms and other vectors do not. Sa2VA
    decays everything; pulling a norm's scale towards zero regularises nothing, so this package leaves vectors alone.
    """
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # One kernel updates all parameters, but none takes sharded and whole ones in one list.
    has_shards = any(is_sharded(parameter) for parameter in parameters.values())
    options: dict[str, bool] = {"foreach": False} if has_shards else {"fused": True}
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=config.learning_rate, betas=config.betas, eps=1e-8, **options)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Continue from the ``state_dict`` of an optimizer whose tensors were saved whole; each parameter takes its shards.

    How the update is computed (``fused``, ``foreach``) belongs to this start, not to the one that saved.
    """
    numbered = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        number: {k: place_like(v, numbered[number]) if getattr(v, "ndim", 0) else v for k, v in values.items()}
        for number, values in state["state"].items()
    }
    how = [{key: group[key] for key in ("fused", "foreach")} for group in optimizer.param_groups]
    groups = [{**group, **kept} for group, kept in zip(state["param_groups"], how, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups, "state": own})


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


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients so that their norm is at most ``max_norm``; return the norm before, over all shards."""
    given = list(parameters)
    gradients = [parameter.grad for parameter in given if parameter.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return float(nn.utils.clip_grad_norm_(given, max_norm))
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    own: Any = nn.utils.get_total_norm(sharded)
    norms = [own.full_tensor(), *([nn.utils.get_total_norm(plain)] if plain else [])]
    total = float(torch.stack([norm.float() for norm in norms]).norm())
    share = max_norm / (total + 1e-6)
    if share < 1:
        for gradient in gradients:
            gradient.mul_(share)
    return total

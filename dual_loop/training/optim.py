"""AdamW, the learning-rate schedule, clipping, and the check that nothing is updated with what is not finite."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from dual_loop.config import TrainConfig
from dual_loop.errors import DualLoopError, explain, listed
from dual_loop.metrics import ratio
from dual_loop.model.hardware import send
from dual_loop.training import ranks
from dual_loop.training.devices import gather_objects
from dual_loop.types import LossTerm


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW (1711.05101) over ``parameters``, in two groups.

    Matrices (2 dimensions and more) decay by ``config.weight_decay``; biases, norms and other vectors do not. Sa2VA
    decays everything; pulling a norm's scale towards zero regularises nothing, so this package leaves vectors alone.
    """
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # One kernel updates all parameters, but none takes sharded and whole ones in one list.
    has_shards = any(isinstance(parameter, DTensor) for parameter in parameters.values())
    options: dict[str, bool] = {"foreach": False} if has_shards else {"fused": True}
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


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``; return the norm before, over all shards.

    It is a scalar that the host does not wait for.
    """
    given = list(parameters)
    gradients = [parameter.grad for parameter in given if parameter.grad is not None]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return torch.as_tensor(nn.utils.clip_grad_norm_(given, max_norm))
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    own: Any = nn.utils.get_total_norm(sharded)
    norms = [own.full_tensor(), *([nn.utils.get_total_norm(plain)] if plain else [])]
    total = torch.stack([norm.float() for norm in norms]).norm()
    share = max_norm / (float(total) + 1e-6)
    if share < 1:
        for gradient in gradients:
            gradient.mul_(share)
    return torch.as_tensor(total)


def gradient_norms(terms: Mapping[str, LossTerm], parameters: Collection[nn.Parameter]) -> dict[str, float]:
    """Return the gradient's norm of each loss term, of its average over this micro-batch, as two halves of an average.

    Nothing is accumulated and no hook of DDP runs: what a backward pass behind it leaves is the same. It costs a
    backward pass a term, so the trainer asks in audits, of each rank's first micro-batch. A term without items there
    has no norm. Nor has any where layers are sharded, whose backward passes are collectives that leave gradients.
    """
    norms: dict[str, float] = {}
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return norms
    for name, term in terms.items():
        found = torch.autograd.grad(term.mean, list(parameters), retain_graph=True, allow_unused=True)
        norm = nn.utils.get_total_norm([gradient for gradient in found if gradient is not None])
        norms |= ratio(f"grad_norm/{name}", [float(norm)] if float(term.count) > 0 else [])
    return norms


class NonFiniteError(DualLoopError):
    """A loss or gradient is infinite or not a number; no parameter was changed."""


def check_finite(
    accelerator: Accelerator,
    step: int,
    terms: Sequence[Mapping[str, float]],
    region_names: Sequence[Sequence[str]],
    grad_norm: float,
) -> None:
    """Raise on all ranks when any rank saw a value that is not finite. Call before the update.

    ``terms`` are the values of the loss terms, and ``region_names`` the regions, of each micro-batch of this rank.

    Raises:
        NonFiniteError: names the rank, the term and the regions; all regions where only the gradient is wrong.
    """
    own = []
    for index, (values, names) in enumerate(zip(terms, region_names, strict=True)):
        wrong = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            own.append(f"{', '.join(wrong)} in micro-batch {index} ({listed(names)})")
    if not own and not math.isfinite(grad_norm):
        names = [name for group in region_names for name in group]
        own.append(f"gradient norm = {grad_norm}, losses finite, in the regions {listed(names)}")
    is_wrong = bool(own)
    if accelerator.num_processes > 1:
        flag = send(torch.tensor(float(is_wrong)), accelerator.device)
        with ranks.exchange():
            torch.distributed.all_reduce(flag)
        is_wrong = bool(flag.item())
    if not is_wrong:
        return
    everywhere = enumerate(gather_objects(accelerator, own))
    what, where = "a loss or gradient is not finite; nothing was updated", f"optimiser step {step}"
    seen = "; ".join(f"rank {rank}: {message}" for rank, messages in everywhere for message in messages)
    fix = "look at the regions named; lower --learning_rate, check --max_grad_norm, or resume with --mixed_precision no"
    raise NonFiniteError(explain(what, where, seen, "finite numbers", fix))

"""AdamW, the learning-rate schedule, clipping, and the check that nothing is updated with what is not finite."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dual_loop.config import TrainConfig
from dual_loop.errors import DualLoopError, explain, listed
from dual_loop.metrics import ratio
from dual_loop.model.adapters import group_of
from dual_loop.model.hardware import send
from dual_loop.model.shards import place_like
from dual_loop.training import ranks
from dual_loop.training.devices import gather_objects
from dual_loop.types import LossTerm

GROUP_RATES = {
    "lora": "lr_lora",
    "mlp1": "lr_projector",
    "text_hidden_fcs": "lr_projector",
    "mask_decoder": "lr_decoder",
}
"""The setting that a group of ``model.adapters`` takes its peak learning rate from, where that is set."""


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW (1711.05101; moments in eight bits: 2110.02861), in a group for each peak rate and decay.

    Matrices (2 dimensions and more) decay by ``config.weight_decay``; biases, norms and other vectors do not. Sa2VA
    decays everything; pulling a norm's scale towards zero regularises nothing, so this package leaves vectors alone.
    """
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name in by_dimensions(parameters):
        own = getattr(config, GROUP_RATES.get(group_of(name) or "", "learning_rate"))
        peak = config.learning_rate if own is None else own
        decay = config.weight_decay if parameters[name].ndim >= 2 else 0.0
        groups.setdefault((peak, decay), []).append((name, parameters[name]))
    own_groups = [{"params": own, "peak": peak, "weight_decay": decay} for (peak, decay), own in groups.items()]
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": 1e-8}
    if config.optimizer == "adamw8bit":
        import bitsandbytes  # an extra

        packed: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(own_groups, **options)
        return packed
    # One kernel updates all parameters, but none takes sharded and whole ones in one list.
    has_shards = any(isinstance(parameter, DTensor) for parameter in parameters.values())
    options |= {"foreach": False} if has_shards else {"fused": True}
    return torch.optim.AdamW(own_groups, **options)


def by_dimensions(parameters: Mapping[str, Any]) -> list[str]:
    """Return the names of matrices, then those of vectors."""
    return sorted(parameters, key=lambda name: parameters[name].ndim < 2)


def load_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> None:
    """Continue from the ``state_dict`` of an optimizer whose tensors were saved whole; each parameter takes its shards.

    Groups, their rates, and how the update is computed belong to this start, not to the one that saved.
    """
    saved = [name for group in state["param_groups"] for name in group.get("param_names", ())]
    saved = saved or by_dimensions(parameters)  # a checkpoint of before groups had names
    own = optimizer.state_dict()
    numbers = {
        name: number
        for group in own["param_groups"]
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    states = {
        numbers[saved[number]]: {
            k: place_like(v, parameters[saved[number]]) if getattr(v, "ndim", 0) else v for k, v in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**own, "state": states})


def rate_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return what peak learning rates are multiplied with at optimiser step ``step`` (0-based), 0..1.

    It is a pure function of the step, so resuming needs no scheduler state. It rises in a line over the first
    ``warmup_ratio`` of the steps, of which the first already learns a little, and falls to ``min_lr_ratio``, which a
    step behind the last would have: as half a cosine, in a line, or (``wsd``: 2404.06395, in the linear form of
    2405.18392) in a line over the last ``decay_ratio`` of the steps, at the peak until then.
    """
    first = math.ceil(total_steps * config.warmup_ratio)
    if step < first:
        return (step + 1) / first
    if config.lr_schedule == "constant":
        return 1.0
    if config.lr_schedule == "wsd":
        first = max(first, total_steps - math.ceil(total_steps * config.decay_ratio))
    progress = min(1.0, max(0.0, (step - first) / max(1, total_steps - first)))
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.lr_schedule == "cosine" else 1.0 - progress
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left


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

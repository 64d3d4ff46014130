"""The moving average of the trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch.distributed.tensor import DTensor

from dual_loop.errors import CheckpointError, explain
from dual_loop.model.shards import place_like
from dual_loop.model.stored_weights import StoredWeights

_MAX_NAMES_SHOWN = 5


class AverageState(TypedDict):
    """What a checkpoint keeps of a weight average: its updates, and float32 tensors by name."""

    num_updates: int
    averages: Mapping[str, torch.Tensor]


class ExponentialMovingAverage(StoredWeights):
    """Keeps float32 averages of parameters (mean teacher, 1703.01780).

    After update number t (counted from 0) ``average = d * average + (1 - d) * live`` with
    ``d = min(decay, (1 + t) / (10 + t))``: without this warm-up the starting weights would dominate for the first
    ``1 / (1 - decay)`` steps. Averages are float32 whatever the parameters are, because a bfloat16 average at decay
    0.999 would not move at all.

    Args:
        named_parameters: names to parameters, on their final device; those without ``requires_grad`` are left out,
            since frozen weights equal their own average.
        decay: 0..1; 0 makes the average a copy of the live weights.

    Raises:
        ValueError: the decay is out of range, or nothing is trainable.
    """

    values: dict[str, torch.Tensor]

    def __init__(self, named_parameters: Mapping[str, torch.nn.Parameter], decay: float = 0.999) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(explain("the decay of the weight average is out of range", seen=decay, expected="0..1"))
        self.decay, self.num_updates = decay, 0
        self.parameters = {name: p for name, p in named_parameters.items() if p.requires_grad}
        if not self.parameters:
            seen = f"{len(named_parameters)} parameters, none of them trainable"
            fix = "build the average after the freeze policy, or check model.trainable"
            raise ValueError(explain("there is nothing to average", seen=seen, fix=fix))
        self.values = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}
        # No foreach kernel takes sharded tensors beside whole ones.
        self.is_fused = not any(isinstance(average, DTensor) for average in self.values.values())

    @property
    def current_decay(self) -> float:
        """The decay that the next update will use."""
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the live weights. Call once an optimiser step, never once a micro-batch.

        Raises:
            RuntimeError: called inside ``weights()``, where the model holds the averages themselves.
        """
        if self.is_lent:
            raise RuntimeError("the weight average was updated while the model held the averages; leave weights()")
        decay, averages = self.current_decay, list(self.values.values())
        live = [parameter.detach().to(torch.float32) for parameter in self.parameters.values()]
        if decay == 0:
            for average, value in zip(averages, live, strict=True):
                average.copy_(value)  # lerp would keep a NaN of the old average
        elif self.is_fused:
            torch._foreach_lerp_(averages, live, 1 - decay)
        else:
            for average, value in zip(averages, live, strict=True):
                average.lerp_(value, 1 - decay)
        self.num_updates += 1

    def state_dict(self) -> AverageState:
        """Return the state; the tensors are not copied."""
        return {"num_updates": self.num_updates, "averages": dict(self.values)}

    @torch.no_grad()
    def load_state_dict(self, state: AverageState) -> None:
        """Restore what :meth:`state_dict` returned; the decay stays that of this object.

        Raises:
            CheckpointError: names, shapes or dtypes differ from the model's trainable parameters. Nothing is changed
                then.
        """
        if set(state) != {"num_updates", "averages"}:
            what = "the state of the weight average is malformed"
            raise CheckpointError(explain(what, seen=sorted(state), expected="num_updates, averages"))
        averages = state["averages"]
        missing, unexpected = sorted(self.values.keys() - averages), sorted(averages.keys() - self.values)
        wrong = [
            f"{name}: {tuple(averages[name].shape)} {averages[name].dtype}, not {tuple(own.shape)} torch.float32"
            for name, own in self.values.items()
            if name in averages and (averages[name].shape != own.shape or averages[name].dtype != torch.float32)
        ]
        if missing or unexpected or wrong:
            what = "the saved weight average does not fit the trainable parameters"
            seen = f"missing {_show(missing)}, unexpected {_show(unexpected)}, wrong {_show(wrong)}"
            fix = "resume with the model settings of the saved run (model.trainable, model.lora_r)"
            raise CheckpointError(explain(what, "", seen, f"{len(self.values)} float32 tensors", fix))
        for name, own in self.values.items():
            own.copy_(place_like(averages[name], own))
        self.num_updates = state["num_updates"]


def _show(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES_SHOWN])
    return f"{len(names)} ({shown}{', ...' if len(names) > _MAX_NAMES_SHOWN else ''})" if names else "0"

"""The moving average of the trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor

from dual_loop.errors import explain
from dual_loop.model.stored_weights import StoredWeights


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

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the live weights. Call once an optimiser step, never once a micro-batch.

        Raises:
            RuntimeError: called inside ``weights()``, where the model holds the averages themselves.
        """
        if self.is_lent:
            raise RuntimeError("the weight average was updated while the model held the averages; leave weights()")
        decay, averages = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)), list(self.values.values())
        live = [parameter.detach().to(torch.float32) for parameter in self.parameters.values()]
        if self.is_fused and decay > 0:
            torch._foreach_lerp_(averages, live, 1 - decay)
        else:
            for average, value in zip(averages, live, strict=True):
                # At decay 0, lerp would keep a NaN of the old average.
                average.copy_(average.lerp(value, 1 - decay) if decay > 0 else value)
        self.num_updates += 1

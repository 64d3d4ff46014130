"""Weights that are swapped inside bf16 autocast: exactly those of a context of its own, entering and leaving."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dual_loop.model.sa2va import evaluating
from dual_loop.model.stored_weights import weights

from acceptance.found import Asked, Found
from acceptance.small import build, small_setting


@torch.no_grad()
def run(asked: Asked, found: Found) -> None:
    _, trainer = build(small_setting(asked, {"train.mixed_precision": "bf16"}))
    task, device, autocast = trainer.task, trainer.accelerator.device, trainer.accelerator.autocast
    torch.backends.cudnn.deterministic = True
    # Three models that differ: the starting weights, the live ones, and their average.
    for parameter in trainer.parameters.values():
        parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    for value in trainer.ema.values.values():
        value.add_(0.1 * value.std(correction=0) * torch.randn_like(value))
    batch = next(iter(trainer.data.batches(0))).to(device)
    seen = task.see(batch)

    def answers() -> list[Any]:
        """The captions of a batch, and the masks and losses of its rows."""
        with evaluating(task.model):
            captions = task.captioner.write([seen], [batch])
            output = task(packed)
        return [
            [one.token_ids for one in captions[0]],
            output.masks.mask_logits,
            *(t.total for t in output.terms.values()),
        ]

    def same(first: list[Any], second: list[Any]) -> bool:
        return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(first, second, strict=True))

    with autocast():
        [packed] = task.prepare([batch])
    for name, stored in (("weight average", trainer.ema), ("starting weights", task.starting)):
        with autocast():
            before = answers()
            with weights(stored):
                inside = answers()
            after = answers()
        with weights(stored), autocast():
            own = answers()
        found.check(f"{name}: they answer as in a context of their own", same(inside, own), "bitwise")
        found.check(f"{name}: the live model answers as before", same(before, after), "bitwise")
        found.check(f"{name}: they answer unlike the live model", not same(inside, before), "masks differ")
    torch.backends.cudnn.deterministic = False

"""One optimiser step of the tiny model through the real trainer, with all that it computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dual_loop.config import Config
from dual_loop.model.adapters import trainable_parameters
from dual_loop.training.stop import StopRequest

from acceptance.found import Asked
from acceptance.worker import release
from bench.setup import Setting, build_config, build_trainer

BASE = {"model.initial_weights": "tiny", "train.max_grad_norm": 0, "train.mixed_precision": "no"}
SMALLEST = 1e-2
"""Of the norm of the whole gradient: a smaller one is compared on this scale. Float32 knows it no better: gradients of
attention keys are what is left of sums that cancel, and those of their biases are zero but for rounding."""


@dataclasses.dataclass
class Taken:
    """What a step computed: token ids of all captions, sums of the loss terms, gradients on the CPU by name."""

    tokens: list[list[int]] = dataclasses.field(default_factory=list)
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    gradients: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def small_setting(asked: Asked, changes: Mapping[str, Any], device: str | None = None) -> Setting:
    """Four images of two regions in two micro-batches; the tiny weights of the package, float32 unless changed."""
    return Setting("tiny", 2, 2, 8, 2, changes={**BASE, **changes}, device=device or asked.device)


def build(setting: Setting, is_captioned: bool = False) -> tuple[Config, Any]:
    """Return configuration and trainer; ``is_captioned``: regions bring a text, so nothing is written in step 1."""
    release()
    config = build_config(setting, "default")
    trainer = build_trainer(config, setting)
    if is_captioned:
        texts = (("the red circle",),) * setting.regions
        trainer.data.made = [dataclasses.replace(sample, captions=texts) for sample in trainer.data.made]
    return config, trainer


def take_step(setting: Setting, is_captioned: bool = False) -> Taken:
    """Take one step of a new model up to its update."""
    _, trainer = build(setting, is_captioned)
    taken, prepare = Taken(), trainer.task.prepare

    def prepared(*args: Any) -> Any:
        packed = prepare(*args)
        for caption in (caption for rows in packed for caption in rows.captions):
            taken.tokens += [list(caption.token_ids), *(list(one.token_ids) for one in caption.samples)]
        return packed

    def add_terms(module: Any, args: Any, output: Any) -> None:
        for name, term in output.terms.items():
            taken.losses[name] = taken.losses.get(name, 0.0) + float(term.total.detach())

    def keep_gradients() -> None:
        parameters = trainable_parameters(trainer.task.model)
        taken.gradients = {name: p.grad.to("cpu", copy=True) for name, p in parameters.items() if p.grad is not None}

    trainer.task.prepare, trainer.optimizer.step = prepared, keep_gradients
    trainer.task.register_forward_hook(add_terms)
    trainer.task.train()
    trainer.step(trainer.open_windows(), StopRequest())
    return taken


def loss_difference(seen: Taken, expected: Taken) -> float:
    """Return the largest difference of a loss term, relative to it; infinite where other terms are there."""
    if seen.losses.keys() != expected.losses.keys():
        return float("inf")
    return max(abs(seen.losses[name] - value) / max(abs(value), 1e-8) for name, value in expected.losses.items())


def gradient_difference(seen: Taken, expected: Taken) -> tuple[float, str]:
    """Return the largest norm of a parameter's difference, relative to that of its gradient, and its name."""
    if seen.gradients.keys() != expected.gradients.keys():
        return float("inf"), ", ".join(sorted(seen.gradients.keys() ^ expected.gradients.keys())[:3])
    whole = sum(float(gradient.double().square().sum()) for gradient in expected.gradients.values()) ** 0.5
    return max(
        (float((seen.gradients[name] - value).norm()) / max(float(value.norm()), SMALLEST * whole), name)
        for name, value in expected.gradients.items()
    )


def whole_difference(seen: Taken, expected: Taken) -> float:
    """Return the norm of the difference of all gradients together, relative to the gradient's."""
    if seen.gradients.keys() != expected.gradients.keys():
        return float("inf")
    parts = [(seen.gradients[name] - value, value) for name, value in expected.gradients.items()]
    difference, whole = (torch.stack([pair[k].norm() for pair in parts]).norm() for k in range(2))
    return float(difference / whole)

"""Parameters that change inside bfloat16 autocast are seen at once, whatever changes them.

Autocast keeps the bfloat16 copy of a trained parameter until its context ends. Every place that puts other weights into
the model runs twice: with these copies kept, and with a copy made anew for every product. Every logit and every mask,
before the weights change, while they are others, and after they came back, must be the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import Tensor

from dual_loop.config import Config, LossConfig
from dual_loop.evaluation.measure import RegionMeter
from dual_loop.loop.task import DualLoopTask
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.stored_weights import weights
from dual_loop.types import Batch

from loop_settings import half_average, masks_only, setting
from small_model import scene_samples, small_batch, small_model

Run = Callable[[DualLoopTask, Batch], object]


def listening(listener: str) -> Config:
    config = setting("grpo")
    return dataclasses.replace(config, reward=dataclasses.replace(config.reward, listener=listener))


def heard_apart() -> Config:
    config = setting()
    return dataclasses.replace(config, train=dataclasses.replace(config.train, audit_listener="apart"))


def start_on_disk() -> Config:
    config = setting()
    return dataclasses.replace(config, speed=dataclasses.replace(config.speed, start_on_disk=True))


def trained_matrices() -> Config:
    config = setting()
    trainable = (*config.model.trainable, "language_model")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, trainable=trainable))


def step(task: DualLoopTask, batch: Batch) -> None:
    task.prepare([batch])


def audited_step(task: DualLoopTask, batch: Batch) -> None:
    task.prepare([batch], audit=True)


def measure_after_training(task: DualLoopTask, batch: Batch) -> None:
    """As ``train_dual_loop.Evaluator.after``: the average is measured, and the other weights listen."""
    parts, frozen = (task.model, task.prompter, task.config), partial(weights, task.starting)
    independent = partial(weights, task.independent) if task.independent else None
    with weights(task.average):
        meter = RegionMeter(*parts, frozen_listener=frozen, independent_listener=independent)
        meter.measure(scene_samples(1), "val")


def stop_inside(task: DualLoopTask, batch: Batch) -> None:
    with suppress(KeyError), weights(task.average):
        task.prepare([batch])
        raise KeyError


PLACES: dict[str, tuple[Config, Run]] = {
    "probe": (setting(), audited_step),
    "probe, start on disk": (start_on_disk(), audited_step),
    "probe, independent": (heard_apart(), audited_step),
    "reward, frozen": (listening("frozen"), step),
    "reward, average": (listening("average"), step),
    "reward, independent": (listening("apart"), step),
    "distillation": (setting(loss=LossConfig(num_points=0, distill_weight=0.5)), step),
    "evaluation": (setting(), measure_after_training),
    "evaluation, independent": (heard_apart(), measure_after_training),
    "exception": (setting(), stop_inside),
    "merged adapters": (trained_matrices(), step),
}


@torch.no_grad()
def moved_task(config: Config) -> DualLoopTask:
    """A task whose live weights, average, starting weights and those of a listener all differ."""
    model, prompter, _ = small_model(config)
    apart = trainable_parameters(small_model(config, seed=1)[0])
    task = DualLoopTask(model, prompter, config, half_average(model), listeners={"apart": apart})
    for _ in range(2):
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.2 * torch.randn_like(parameter) * parameter.std(correction=0))
        task.average.update()
    return task


def outputs(place: str, keeps_copies: bool) -> list[Tensor]:
    """Return all logits of tokens and all masks of one autocast context around the place."""
    config, run = PLACES[place]
    task, found = moved_task(config), []
    decode = task.model.grounding.decode_prompts

    def recorded(*arguments):
        masks = decode(*arguments)
        found.append(masks.mask_logits.detach().clone())
        return masks

    task.model.grounding.decode_prompts = recorded
    task.model.mllm.lm_head.register_forward_hook(lambda *call: found.append(call[-1].detach().clone()))
    batch = small_batch(config, masks_only(1))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps_copies):
        (packed,) = task.prepare([batch])
        task(packed)
        run(task, batch)
        task(packed)
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("place", PLACES)
def test_every_output_is_that_of_the_weights_of_this_moment(place, monkeypatch):
    fresh = outputs(place, keeps_copies=False)
    assert same(outputs(place, keeps_copies=True), fresh)
    # The comparison can tell: with the copies left alone, the outputs are those of other weights.
    with monkeypatch.context() as patched:
        patched.setattr(torch, "clear_autocast_cache", lambda: None)
        stale = outputs(place, keeps_copies=True)
    torch.clear_autocast_cache()
    assert not same(stale, fresh)

"""Shared by the tests of the loop: settings of its signals, tasks around the small model, captions that are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

import pytest
import torch
from torch import Tensor

from dual_loop.config import Config, LossConfig, RewardConfig
from dual_loop.loop.task import DualLoopTask
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.decode import Decoder
from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.model.prompts import NEW_TOKENS, REGION_END, REGION_START
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import RegionSample

from small_model import pair_samples, scene_samples, small_batch, small_config, small_model

MASK_TERMS = ("mask_loss", "dice_loss")
GATES_OFF = RewardConfig(gates=(), cycle_weight=1.0, contrast_weight=1.0)


def setting(gradient: str = "none", loss: LossConfig | None = None, **policy: object) -> Config:
    """New-token rows train, so that the rows of <vp> and </vp> belong to the captioner alone."""
    config = small_config(train_embeddings="new_tokens")
    loop = dataclasses.replace(config.loop, max_new_tokens=4, max_rejected_fraction=1.0)
    policy = {"mask_truncated": False, "captions_per_region": 3, **policy}
    chosen = dataclasses.replace(config.policy, caption_gradient=gradient, **policy)
    return dataclasses.replace(config, loop=loop, policy=chosen, reward=GATES_OFF, loss=loss or config.loss)


def build(config: Config) -> tuple[Sa2VA, DualLoopTask]:
    model, prompter, _ = small_model(config)
    return model, DualLoopTask(model, prompter, config)


def half_average(model: Sa2VA) -> ExponentialMovingAverage:
    return ExponentialMovingAverage(trainable_parameters(model), 0.5)


def masks_only(count: int = 2) -> list[RegionSample]:
    return [*scene_samples(count, source="sa1b", captions=False), *pair_samples(1)]


def captioner_rows(model: Sa2VA) -> Tensor:
    """Return how much gradient the rows of <vp> and </vp> have."""
    gradient = model.new_token_rows.input_rows.grad
    index = [NEW_TOKENS.index(token) for token in (REGION_START, REGION_END)]
    return torch.zeros(2) if gradient is None else gradient[index].abs().sum(1)


def gradients(
    config: Config, groups: Sequence[list[RegionSample]], terms: Collection[str] | None = None
) -> tuple[Sa2VA, dict[str, float]]:
    """Run one optimiser step's backward passes, one micro-batch a group; return the model and the summed counts."""
    model, task = build(config)
    window = task.prepare([small_batch(config, group) for group in groups], progress=0.5)
    counts = {name: sum(packed.counts[name] for packed in window) for name in window[0].counts}
    for packed in window:
        output = task(packed).terms
        chosen = [name for name in output if terms is None or name in terms]
        sum(output[name].total / max(counts[name], 1.0) for name in chosen).backward()
    return model, counts


def write_ids(monkeypatch: pytest.MonkeyPatch, ids_of: Callable[..., list[int]]) -> None:
    """Let every captioner write ``ids_of(request)``; a request has ``region`` and ``draw`` (-1 is greedy)."""
    monkeypatch.setattr(Decoder, "write_all", lambda self, rows_at_once: [ids_of(one) for one in self.prompts])

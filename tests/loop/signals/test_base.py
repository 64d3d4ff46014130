"""Which signals a setting makes, what they ask step 1 for, and that a signal as it stands teaches nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dual_loop.config import PolicyConfig, RewardConfig
from dual_loop.loop.signals import build_signals
from dual_loop.loop.signals.base import Signal
from dual_loop.loop.signals.gumbel import GumbelCaptions
from dual_loop.loop.signals.policy import CaptionPolicy, against_greedy, against_group, against_scaled_group
from dual_loop.loop.task import DualLoopTask
from dual_loop.types import RankComm

from loop_settings import masks_only
from small_model import small_batch, small_config, small_model

pytestmark = pytest.mark.usefixtures("precision")


@pytest.fixture(scope="module")
def parts():
    return small_model()


class Asked(Exception):
    """Carries what step 1 was asked for."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", (True, 0, False, False)),
        ("scst", (True, 4, True, False)),
        ("grpo", (True, 4, True, False)),
        ("gumbel", (False, 1, False, True)),
        ("gumbel+scst", (True, 4, True, True)),
        ("gumbel+grpo", (False, 4, True, True)),
    ],
)
def test_what_each_asks_for(parts, monkeypatch, name, expected):
    model, prompter, config = parts
    config = dataclasses.replace(config, policy=PolicyConfig(caption_gradient=name))
    task = DualLoopTask(model, prompter, config)

    def write(seen, batches, *, greedy, num_samples):
        raise Asked(greedy, num_samples)

    monkeypatch.setattr(task.captioner, "write", write)
    with pytest.raises(Asked) as asked:
        task.prepare([small_batch(config, masks_only(1))])
    kinds = [type(signal) for signal in task.signals]
    assert (*asked.value.args, CaptionPolicy in kinds, GumbelCaptions in kinds) == expected


def test_a_reward_beside_the_cycle_brings_its_own_learner(parts):
    def built(reward: RewardConfig):
        config = dataclasses.replace(small_config(), policy=PolicyConfig(), reward=reward)
        return build_signals(parts[0], parts[1], config, None, RankComm())

    assert built(RewardConfig()) == []
    (signal,) = built(RewardConfig(caption_weight=0.1))
    assert isinstance(signal, CaptionPolicy)
    assert signal.center is against_greedy


@pytest.mark.parametrize(
    ("name", "scale", "center"),
    [
        ("scst", "none", against_greedy),
        ("scst", "group", against_greedy),
        ("gumbel+scst", "none", against_greedy),
        ("grpo", "none", against_group),
        ("grpo", "group", against_scaled_group),
        ("gumbel+grpo", "none", against_group),
    ],
)
def test_what_each_compares_a_reward_with(parts, name, scale, center):
    config = dataclasses.replace(parts[2], policy=PolicyConfig(caption_gradient=name, advantage_scale=scale))
    built = build_signals(parts[0], parts[1], config, None, RankComm())
    (signal,) = [one for one in built if isinstance(one, CaptionPolicy)]
    assert signal.center is center


def test_a_signal_as_it_stands_changes_nothing(parts):
    model, prompter, config = parts
    task = DualLoopTask(model, prompter, config)
    batch = small_batch(config, masks_only(1))
    (before,) = task.prepare([batch])
    task.signals.append(Signal())
    (after,) = task.prepare([batch])
    assert torch.equal(before.input_ids, after.input_ids)
    assert (before.counts, before.metrics, after.lessons) == (after.counts, after.metrics, {})
    assert task(after).terms.keys() == {"mask_loss", "dice_loss", "llm_loss"}

"""The loop: which signal reaches the captioner, and that a step is the same however its batch is split."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dual_loop.loop.task import DualLoopTask

from loop_settings import MASK_TERMS, build, captioner_rows, gradients, half_average, masks_only, setting
from small_model import pair_samples, scene_samples, small_batch, small_config, small_model

pytestmark = pytest.mark.usefixtures("precision")


def test_split_of_the_batch_does_not_change_the_gradient(precision):
    config = small_config()
    config = dataclasses.replace(
        config, loop=dataclasses.replace(config.loop, max_new_tokens=4, max_rejected_fraction=1.0)
    )
    samples = [*scene_samples(2), *pair_samples(1), *scene_samples(1, source="sa1b", captions=False)]

    def trained(groups):
        model, _ = gradients(config, groups)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    whole, split = trained([samples]), trained([[sample] for sample in samples])
    largest = max(float((whole[n] - split[n]).abs().max()) for n in whole)
    scale = max(float(g.abs().max()) for g in whole.values())
    # Another batch is another shape, whose products may round differently: to 8 bits in bfloat16.
    assert largest <= (2e-5 if precision == "float32" else 2e-2) * scale


def test_the_frozen_tower_runs_once_an_image(monkeypatch):
    config = setting()
    model, task = build(config)
    calls = []
    original = type(model).encode_vision
    monkeypatch.setattr(type(model), "encode_vision", lambda self, x: calls.append(len(x)) or original(self, x))
    (packed,) = task.prepare([small_batch(config, scene_samples(2, captions=False))])
    task(packed)
    assert calls == [2]


def test_without_a_signal_the_mask_loss_never_reaches_the_captioner():
    model, counts = gradients(setting("none"), [masks_only()], MASK_TERMS)
    assert torch.equal(captioner_rows(model), torch.zeros(2))
    assert "policy_loss" not in counts


@pytest.mark.parametrize("gradient", ["none", "scst", "grpo", "gumbel", "gumbel+grpo"])
def test_split_of_a_window_does_not_change_the_gradient(gradient, precision):
    samples = [*masks_only(2), *scene_samples(1)]
    config = setting(gradient)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, align_weight=0.5))
    whole, counts = gradients(config, [samples])
    split, other = gradients(config, [[sample] for sample in samples])
    assert counts == pytest.approx(other)
    both = zip(whole.parameters(), split.parameters(), strict=True)
    pairs = [(a.grad, b.grad) for a, b in both if a.grad is not None]
    scale = max(float(a.abs().max()) for a, _ in pairs)
    tolerance = 2e-4 if precision == "float32" else 2e-2
    assert max(float((a - b).abs().max()) for a, b in pairs) <= tolerance * scale


@pytest.mark.parametrize("listener", ["own", "average", "frozen"])
def test_the_listener_that_is_asked_for_scores(listener):
    config = setting("grpo")
    reward = dataclasses.replace(config.reward, listener=listener, contrast_weight=0.0)
    config = dataclasses.replace(config, reward=reward)
    model, prompter, _ = small_model(config)
    task = DualLoopTask(model, prompter, config, half_average(model))
    batch = small_batch(config, masks_only())
    (before,) = task.prepare([batch])
    with torch.no_grad():
        for parameter in model.text_hidden_fcs.parameters():
            parameter.mul_(-1.0)
    live = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (after,) = task.prepare([batch])
    # Captions do not change, so only the own listener rewards them differently.
    same = after.metrics["reward_cycle/sum"] == pytest.approx(before.metrics["reward_cycle/sum"], abs=1e-6)
    assert same == (listener != "own")
    assert all(torch.equal(live[name], parameter) for name, parameter in model.named_parameters())


def test_counts_and_recent_captions_survive_a_restart():
    config = setting()
    _, task = build(config)
    task.prepare([small_batch(config, masks_only())])
    state = task.run_state()
    assert state["captioner"][0] == len(state["probe"]) > 0
    _, resumed = build(config)
    resumed.load_run_state(state)
    assert resumed.run_state() == state
    _, older = build(config)
    older.load_run_state({"captioner": state["captioner"], "auditor": {"recent": state["probe"]}})
    assert older.run_state() == state

"""The policy signal: advantages, its losses, the true gradient of the reward, and what earns nothing."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical

from dual_loop.caption_metrics import meteor_exact_stem
from dual_loop.config import Config, RewardConfig
from dual_loop.loop.packing import pack_turns
from dual_loop.loop.signals import policy as policy_module
from dual_loop.loop.signals.base import predicting_positions, spoken_turns
from dual_loop.loop.signals.policy import (
    against_greedy,
    against_group,
    against_scaled_group,
    center_rewards,
    combine_advantages,
    kl_divergence,
    policy_loss,
)
from dual_loop.loop.task import DualLoopTask
from dual_loop.losses import map_chunks
from dual_loop.model.adapters import adapters_disabled
from dual_loop.training.metrics_log import step_metrics

from loop_settings import build, captioner_rows, gradients, masks_only, setting, write_ids
from small_model import scene_samples, small_batch, small_config, small_model

pytestmark = pytest.mark.usefixtures("precision")

ALL = torch.ones(2, 3, dtype=torch.bool)
REWARDS = torch.tensor([[0.2, 0.5, 0.8], [0.4, 0.4, 0.4]])

# ---- advantages ------------------------------------------------------------------------------------------------------


def test_scst_subtracts_the_greedy_reward():
    found = center_rewards(against_greedy, {"cycle": REWARDS}, {"cycle": torch.tensor([0.5, 0.4])}, ALL)
    torch.testing.assert_close(found.values["cycle"], torch.tensor([[-0.3, 0.0, 0.3], [0.0, 0.0, 0.0]]))
    assert (found.num_groups, found.num_zero_variance) == (2, 1)


def test_grpo_sums_to_zero_and_leaves_truncated_ones_out():
    usable = torch.tensor([[True, True, False], [True, True, True]])
    found = center_rewards(against_group, {"cycle": REWARDS}, {}, usable)
    torch.testing.assert_close(found.values["cycle"][0], torch.tensor([-0.15, 0.15, 0.0]))
    assert torch.equal(found.values["cycle"][1], torch.zeros(3))
    assert (found.num_groups, found.num_zero_variance) == (2, 1)
    scaled = center_rewards(against_scaled_group, {"cycle": REWARDS}, {}, ALL).values["cycle"]
    assert float(scaled[0].square().mean()) == pytest.approx(1.0, abs=1e-4)


def test_a_group_of_one_teaches_nothing():
    usable = torch.tensor([[True, False, False], [False, False, False]])
    found = center_rewards(against_group, {"cycle": REWARDS}, {}, usable)
    assert torch.equal(found.values["cycle"], torch.zeros(2, 3))
    assert found.num_groups == 0, "one caption is no group"


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_advantages_sum_to_zero_in_every_group(rows):
    rewards = torch.tensor(rows)
    found = center_rewards(against_group, {"cycle": rewards}, {}, torch.ones_like(rewards, dtype=torch.bool))
    assert float(found.values["cycle"].sum(1).abs().max()) <= 1e-6


@given(st.floats(0, 1, width=32), st.integers(2, 8))
def test_equal_rewards_give_exactly_zero(value, count):
    rewards = torch.full((1, count), value)
    usable = torch.ones_like(rewards, dtype=torch.bool)
    for center in (against_greedy, against_group, against_scaled_group):
        found = center_rewards(center, {"cycle": rewards}, {"cycle": rewards[:, 0]}, usable)
        assert torch.equal(found.values["cycle"], torch.zeros_like(rewards))


def test_what_does_not_apply_takes_no_part():
    rewards = {"cycle": REWARDS, "caption": torch.tensor([[float("nan")] * 3, [0.1, 0.2, 0.3]])}
    found = center_rewards(against_group, rewards, {}, ALL)
    assert torch.equal(found.values["caption"][0], torch.zeros(3))
    assert not found.takes_part["caption"][0].any()
    assert found.num_zero_variance == 0
    assert torch.isfinite(combine_advantages([found], {"cycle": 1.0, "caption": 1.0}, dict)[0]).all()


class FakeRanks:
    """Adds the sums of two ranks that call one after the other."""

    def __init__(self):
        self.given = []

    def __call__(self, sums):
        self.given.append(dict(sums))
        return dict(sums)


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_the_same_on_one_and_on_two_ranks(seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = {name: torch.rand(4, 3, generator=generator) for name in ("cycle", "contrast")}
    weights = {"cycle": 1.0, "contrast": 0.5}
    usable = torch.rand(4, 3, generator=generator) > 0.2
    whole = combine_advantages([center_rewards(against_group, rewards, {}, usable)], weights, dict)[0]
    parts = [
        center_rewards(against_group, {n: r[rows] for n, r in rewards.items()}, {}, usable[rows])
        for rows in (slice(0, 1), slice(1, 4))
    ]
    # Two micro-batches of one rank.
    split = torch.cat(combine_advantages(parts, weights, dict))
    torch.testing.assert_close(split, whole)
    # Two ranks: first each rank's own sums, then both with their total.
    ranks = FakeRanks()
    for part in parts:
        combine_advantages([part], weights, ranks)
    assert len(ranks.given) == 2
    assert ranks.given[0].keys() == ranks.given[1].keys()
    total = {name: sum(given[name] for given in ranks.given) for name in ranks.given[0]}
    both = torch.cat([combine_advantages([part], weights, lambda _: total)[0] for part in parts])
    torch.testing.assert_close(both, whole)


def test_an_objective_that_is_nearly_always_the_same_is_not_blown_up():
    """One odd caption in 128, whose reward differs by 0.05 from the others'."""
    cycle = torch.rand(32, 4, generator=torch.Generator().manual_seed(0))
    length = torch.ones(32, 4)
    length[7, 2] = 0.95
    found = center_rewards(against_group, {"cycle": cycle, "length": length}, {}, torch.ones(32, 4, dtype=torch.bool))
    (combined,) = combine_advantages([found], {"cycle": 1.0, "length": 1.0}, dict)
    (alone,) = combine_advantages([found], {"cycle": 1.0, "length": 0.0}, dict)
    factor = (combined - alone / 2)[7, 2] / found.values["length"][7, 2]
    assert 0 < float(factor) < 5


def test_one_objective_keeps_its_values_and_asks_nobody():
    found = center_rewards(against_group, {"cycle": REWARDS}, {}, ALL)

    def refuse(_):
        raise AssertionError("no exchange is needed")

    torch.testing.assert_close(combine_advantages([found], {"cycle": 2.0}, refuse)[0], 2 * found.values["cycle"])


def test_objectives_are_brought_to_one_size():
    rewards = {"cycle": REWARDS, "contrast": 1000 * REWARDS.flip(1)}
    found = center_rewards(against_group, rewards, {}, ALL)
    (combined,) = combine_advantages([found], {"cycle": 1.0, "contrast": 1.0}, dict)
    torch.testing.assert_close(combined, torch.zeros(2, 3), atol=1e-4, rtol=0)
    # The same objective twice is that objective, at the sum of the weights.
    twice = center_rewards(against_group, {"cycle": REWARDS, "contrast": REWARDS}, {}, ALL)
    (combined,) = combine_advantages([twice], {"cycle": 1.0, "contrast": 0.5}, dict)
    torch.testing.assert_close(combined, 1.5 * twice.values["cycle"])


# ---- the policy gradient is the gradient of the expected reward ------------------------------------------------------

BANDIT = torch.tensor([0.1, 0.7, 0.4], dtype=torch.float64)


def expected_reward(logits: torch.Tensor) -> torch.Tensor:
    return (logits.softmax(0) * BANDIT).sum()


def finite_differences(logits: torch.Tensor) -> torch.Tensor:
    step = 1e-5
    steps = torch.eye(3, dtype=torch.float64) * step
    return torch.stack([(expected_reward(logits + s) - expected_reward(logits - s)) / (2 * step) for s in steps])


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_policy_gradient_of_a_three_token_bandit(baseline):
    """The expectation over tokens is taken by enumeration: each token's gradient, times its probability."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    probabilities = logits.detach().softmax(0)
    total = torch.zeros(3, dtype=torch.float64)
    for token in range(3):
        log_probs = logits.log_softmax(0)[token : token + 1]
        term = policy_loss(log_probs, BANDIT[token : token + 1] - baseline)
        (gradient,) = torch.autograd.grad(term.total, logits)
        total -= probabilities[token] * gradient
    torch.testing.assert_close(total, finite_differences(logits.detach()), atol=1e-8, rtol=1e-4)


def test_group_relative_advantages_on_the_bandit():
    """All pairs of samples: the expectation is the true gradient times (K - 1) / K, since the mean holds the sample."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    probabilities, usable = logits.detach().softmax(0), torch.ones(1, 2, dtype=torch.bool)
    total = torch.zeros(3, dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        rewards = BANDIT[list(pair)][None]
        advantages = center_rewards(against_group, {"cycle": rewards}, {}, usable).values["cycle"][0]
        term = policy_loss(logits.log_softmax(0)[list(pair)], advantages)
        (gradient,) = torch.autograd.grad(term.total / term.count, logits)
        total -= probabilities[list(pair)].prod() * gradient
    torch.testing.assert_close(total, finite_differences(logits.detach()) / 2, atol=1e-8, rtol=1e-4)


# ---- the losses ------------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    term = policy_loss(log_probs, torch.tensor([0.5, -1.0]), 2.0)
    assert float(term.total.detach()) == pytest.approx(2.0 * (0.5 - 2.0))
    assert term.count == 2.0
    term.total.backward()
    assert log_probs.grad.tolist() == [-1.0, 2.0]


def test_nothing_sampled_is_a_zero_with_graph():
    log_probs = torch.zeros(0, requires_grad=True)
    for term in (policy_loss(log_probs, torch.zeros(0)), kl_divergence(log_probs, torch.zeros(0))):
        assert term.count == 0.0
        assert float(term.total.detach()) == 0.0
        assert term.total.requires_grad


@given(st.lists(st.floats(-20, 0, width=32), min_size=1, max_size=5), st.floats(-5, 5, width=32))
def test_divergence_is_never_negative_and_zero_only_where_equal(values, shift):
    own = torch.tensor(values)
    assert float(kl_divergence(own, own.clone()).total) == 0.0
    assert float(kl_divergence(own, own + shift).total) >= -1e-5


def test_divergence_estimates_the_divergence():
    """Expected over the policy's own samples, by enumeration, k3 is the divergence itself."""
    own, other = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    estimate = sum(float(own.exp()[k] * kl_divergence(own[k : k + 1], other[k : k + 1]).total) for k in range(3))
    assert estimate == pytest.approx(float((own.exp() * (own - other)).sum()), abs=1e-6)


def test_a_far_reference_stays_finite():
    assert torch.isfinite(kl_divergence(torch.tensor([-500.0]), torch.tensor([0.0])).total)


# ---- in the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["scst", "grpo", "gumbel+grpo", "gumbel+scst"])
def test_rewards_reach_the_captioner(gradient):
    model, counts = gradients(setting(gradient), [masks_only()], ("policy_loss",))
    assert counts["policy_loss"] > 0
    assert (captioner_rows(model) > 0).all()


def test_log_probabilities_are_those_of_the_tokens_where_they_were_written(monkeypatch):
    """The greedy caption is the most likely token at every place: one position off, and this fails."""
    config = setting("scst", captions_per_region=1)
    model, task = build(config)
    (signal,) = task.signals
    write = task.captioner.write

    def greedy_is_the_sample(*given, **options):
        written = write(*given, **options)
        return [[dataclasses.replace(one, samples=(one.greedy,)) for one in own] for own in written]

    monkeypatch.setattr(task.captioner, "write", greedy_is_the_sample)
    monkeypatch.setattr(
        policy_module, "combine_advantages", lambda groups, *_: [torch.ones_like(groups[0].values["cycle"])]
    )
    (packed,) = task.prepare([small_batch(config, masks_only())])
    found = packed.lessons["policy"]
    with torch.no_grad():
        hidden = model.read(model.embed(packed), packed)
        likely = model.answer_logits(hidden[found.positions[0], found.positions[1]])
        log_probs = signal.log_probs(model, hidden, found)
    assert len(found.targets) == sum(len(one.greedy.token_ids) for one in packed.captions) > 20
    assert torch.equal(likely.argmax(-1), found.targets)
    torch.testing.assert_close(log_probs, likely.float().log_softmax(-1).amax(-1))


def test_the_logits_of_a_chunk_alone_exist_at_once(monkeypatch):
    """Four captions of 128 tokens a region are 10 GB of logits for every copy at 151,679 words."""
    results, sizes = [], []
    for chunk in (1000, 7):
        monkeypatch.setattr(policy_module, "map_chunks", partial(map_chunks, chunk=chunk))
        model, task = build(setting("grpo", kl_weight=0.1))
        (packed,) = task.prepare([small_batch(setting("grpo"), masks_only())])
        make = model.answer_logits
        monkeypatch.setattr(model, "answer_logits", lambda rows, make=make: [sizes.append(len(rows)), make(rows)][1])
        terms = task(packed).terms
        (terms["policy_loss"].total + terms["kl_loss"].total).backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        largest, _ = max(sizes), sizes.clear()
        assert largest > 7 if chunk == 1000 else largest <= max(7, len(packed.answer_ids))
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        # In bfloat16 parts of a product round differently.
        assert (results[1][name] - gradient).norm() <= 0.02 * gradient.norm(), name


def test_sampled_special_tokens_are_punished_not_obeyed(monkeypatch):
    """A sample that holds [SEG] or an image token must not ask the model for a mask or a feature."""
    config = setting("grpo")
    model, prompter, _ = small_model(config)
    task = DualLoopTask(model, prompter, config)
    word = prompter.encode(" red")[0]
    markers = [prompter.seg_id, prompter.image_context_id, word]
    write_ids(monkeypatch, lambda request: [word, markers[max(request.draw, 0)], word, word])
    (packed,) = task.prepare([small_batch(config, masks_only())])
    gates = [[sample.gate for sample in caption.samples] for caption in packed.captions]
    assert all(row == ["special_token", "special_token", None] for row in gates)
    assert all(caption.samples[0].token_ids == (word, prompter.seg_id) for caption in packed.captions)
    assert prompter.seg_id in packed.lessons["policy"].targets.tolist()
    output = task(packed)
    assert len(output.masks.mask_logits) == packed.batch.num_regions
    assert step_metrics(packed, output.masks.mask_logits)["gate/special_token"] >= 2 * packed.batch.num_regions


def test_coordinates_earn_nothing_and_are_counted(monkeypatch):
    config = small_config()
    policy = dataclasses.replace(config.policy, caption_gradient="grpo", captions_per_region=3)
    config = dataclasses.replace(config, policy=policy)
    model, prompter, _ = small_model(config)
    task = DualLoopTask(model, prompter, config)
    codes = ("the object at 12, 40", "(3, 7)", "red circle")

    def ids(text):
        return prompter.encode(text + prompter.template.answer_end)

    write_ids(monkeypatch, lambda request: ids(codes[max(request.draw, 0)]))
    batch = small_batch(config, scene_samples(2, captions=False))
    (packed,) = task.prepare([batch])
    # The greedy caption is among them.
    assert step_metrics(packed, task(packed).masks.mask_logits)["gate/coordinates"] == 3 * batch.num_regions
    gates = [[sample.gate for sample in caption.samples] for caption in packed.captions]
    assert all(row == ["coordinates", "coordinates", None] for row in gates)
    found, taught = packed.lessons["policy"], [caption.samples for caption in packed.captions]
    assert len(found.targets) > 0
    for advantage, target in zip(found.advantages.tolist(), found.targets.tolist(), strict=True):
        honest = any(target in samples[2].token_ids for samples in taught)
        assert advantage <= 0 or honest
    # A captioner that only cheats earns nothing at all, and so learns nothing.
    write_ids(monkeypatch, lambda request: ids(codes[0]))
    (packed,) = task.prepare([batch])
    assert packed.metrics["reward_cycle/sum"] == 0.0
    assert not packed.lessons["policy"].advantages.any()


def caption_reward_alone() -> Config:
    config = setting("auto")
    return dataclasses.replace(config, reward=RewardConfig(gates=(), caption_weight=0.1))


def test_the_policy_loss_shows_what_was_earned_and_nothing_else(monkeypatch):
    """``loss = segmentation - 0.1 * reward``, in value; no cycle reward comes with it."""
    config = caption_reward_alone()
    _, task = build(config)
    batch = small_batch(config, scene_samples(2))
    texts = {-1: "the thing", 0: batch.captions[0], 1: "the thing", 2: "a star"}
    write_ids(monkeypatch, lambda one: task.prompter.encode(texts[one.draw] + task.prompter.template.answer_end))
    (packed,) = task.prepare([batch])
    (term,) = [term for name, term in task(packed).terms.items() if name == "policy_loss"]
    earned = [
        (meteor_exact_stem(one.text, references), len(one.token_ids))
        for references, caption in zip(batch.references, packed.captions, strict=True)
        for one in caption.samples
    ]
    expected = -0.1 * sum(reward * length for reward, length in earned) / sum(length for _, length in earned)
    assert float(term.mean.detach()) == pytest.approx(expected, rel=1e-4)
    assert -0.1 <= expected < 0
    assert {name for name in packed.metrics if name.startswith("reward_")} == {
        "reward_caption/sum",
        "reward_caption/count",
    }
    assert packed.metrics["reward_caption/sum"] == pytest.approx(sum(reward for reward, _ in earned))
    found = packed.lessons["policy"]
    log_probs = torch.zeros(len(found.targets), requires_grad=True)
    policy_loss(log_probs, found.advantages).total.backward()
    assert log_probs.grad.abs().sum() > 0


def test_a_step_in_which_no_region_has_a_reference_has_no_policy_loss():
    model, counts = gradients(caption_reward_alone(), [masks_only()], ("policy_loss",))
    assert counts["policy_loss"] > 0
    assert not captioner_rows(model).any()
    config = caption_reward_alone()
    _, task = build(config)
    (packed,) = task.prepare([small_batch(config, [*masks_only(1), *scene_samples(1)])])
    assert packed.metrics["caption/no_reward"] == sum(caption is None for caption in packed.batch.captions) > 0
    assert float(task(packed).terms["policy_loss"].total.detach()) <= 0


# ---- the divergence from the model without its adapter ---------------------------------------------------------------


def exact_divergence(model, task, batch, captions) -> torch.Tensor:
    """The sum over all generated tokens of KL(p || p_ref), each caption in a row of its own, all logits at once."""
    total = torch.zeros(())
    for region, caption in enumerate(captions):
        for one in caption.samples or caption.written:
            spoken = [(region, one.token_ids)]
            turns = spoken_turns(batch, spoken, task.prompter, task.config.loop.caption_question)
            packed = pack_turns(batch, captions, turns, task.prompter, vision=None, segments=False)
            rows, columns = predicting_positions(turns, spoken)
            own = model.answer_logits(model.read(model.embed(packed), packed)[rows, columns]).float()
            with torch.no_grad(), adapters_disabled(model):
                other = model.answer_logits(model.read(model.embed(packed), packed)[rows, columns]).float()
            total = total + torch.distributions.kl_divergence(Categorical(logits=own), Categorical(logits=other)).sum()
    return total


@pytest.mark.parametrize("gradient", ["none", "gumbel", "scst", "grpo", "gumbel+scst", "gumbel+grpo"])
def test_the_divergence_is_exact_at_every_sampled_token_in_every_mode(precision, gradient):
    config = setting(gradient, kl_weight=0.5, captions_per_region=2)
    model, task = build(config)
    batch = small_batch(config, masks_only(1))
    (packed,) = task.prepare([batch])
    term = task(packed).terms["kl_loss"]
    count = sum(len(one.token_ids) for own in packed.captions for one in (own.samples or own.written))
    assert packed.counts["kl_loss"] == term.count == count > 0
    expected = exact_divergence(model, task, batch, packed.captions)
    tolerance = 1e-3 if precision == "float32" else 0.05
    assert float(term.total.detach()) == pytest.approx(0.5 * float(expected.detach()), rel=tolerance)
    assert float(expected.detach()) > 0
    (2.0 * term.total).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected.backward()
    adapters = [(name, p.grad) for name, p in model.named_parameters() if ".lora_" in name and p.grad is not None]
    assert len(adapters) == 2 * 2 * 7
    for name, gradient_of in adapters:
        assert (found[name] - gradient_of).norm() <= tolerance * gradient_of.norm() + 1e-6, name


def test_a_collapsed_captioner_is_still_held(monkeypatch):
    """All samples are equal, so no caption has an advantage; the divergence counts every token all the same."""
    config = setting("grpo", kl_weight=1.0)
    model, task = build(config)
    ids = task.prompter.encode("red circle" + task.prompter.template.answer_end)
    write_ids(monkeypatch, lambda request: ids)
    batch = small_batch(config, masks_only(1))
    (packed,) = task.prepare([batch])
    terms = task(packed).terms
    assert packed.counts["kl_loss"] == packed.counts["policy_loss"] == 3 * batch.num_regions * len(ids)
    assert float(terms["kl_loss"].total.detach()) > 0
    model.zero_grad()
    terms["policy_loss"].total.backward(retain_graph=True)
    assert not captioner_rows(model).any()
    terms["kl_loss"].total.backward()
    assert (captioner_rows(model) > 0).all()


def test_references_alone_have_no_divergence():
    config = setting("none", kl_weight=1.0)
    _, task = build(config)
    (packed,) = task.prepare([small_batch(config, scene_samples(1))])
    term = task(packed).terms["kl_loss"]
    assert (float(term.total.detach()), term.count, packed.counts["kl_loss"]) == (0.0, 0.0, 0.0)
    assert term.total.requires_grad


def test_entropy_of_the_policy_is_recorded():
    config = setting("grpo", temperature=2.0)
    model, task = build(config)
    (packed,) = task.prepare([small_batch(config, masks_only(1))])
    found = packed.lessons["policy"]
    output = task(packed)
    with torch.no_grad():
        hidden = model.read(model.embed(packed), packed)[found.positions[0], found.positions[1]]
        entropy = Categorical(logits=model.answer_logits(hidden).float() / 2.0).entropy()
    recorded = step_metrics(packed, output.masks.mask_logits)
    assert recorded["policy_entropy/count"] == len(found.targets) > 0
    assert recorded["policy_entropy/sum"] == pytest.approx(float(entropy.sum()), rel=1e-4)

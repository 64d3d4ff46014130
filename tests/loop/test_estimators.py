"""Advantages: what each estimator makes of rewards, and that splits and ranks change nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dual_loop.config import PolicyConfig, RewardConfig
from dual_loop.loop.estimators import build_estimator, combine_advantages
from dual_loop.losses import policy_loss


def estimator(name: str, **options):
    return build_estimator(PolicyConfig(caption_gradient=name, **options))


def test_what_each_asks_for():
    table = {
        "none": (True, 0, False, False),
        "scst": (True, 4, True, False),
        "grpo": (True, 4, True, False),
        "gumbel": (False, 1, False, True),
        "gumbel+scst": (True, 4, True, True),
        "gumbel+grpo": (False, 4, True, True),
    }
    for name, expected in table.items():
        found = estimator(name)
        assert (found.draws.greedy, found.draws.samples, found.is_rewarded, found.is_relaxed) == expected
    assert build_estimator(PolicyConfig(), RewardConfig()).name == "none"
    assert build_estimator(PolicyConfig(), RewardConfig(caption_weight=0.1)).name == "scst"


ALL = torch.ones(2, 3, dtype=torch.bool)
REWARDS = torch.tensor([[0.2, 0.5, 0.8], [0.4, 0.4, 0.4]])


def test_scst_subtracts_the_greedy_reward():
    found = estimator("scst").advantages({"cycle": REWARDS}, {"cycle": torch.tensor([0.5, 0.4])}, ALL)
    torch.testing.assert_close(found.values["cycle"], torch.tensor([[-0.3, 0.0, 0.3], [0.0, 0.0, 0.0]]))
    assert (found.num_groups, found.num_zero_variance) == (2, 1)


def test_grpo_sums_to_zero_and_leaves_truncated_ones_out():
    usable = torch.tensor([[True, True, False], [True, True, True]])
    found = estimator("grpo").advantages({"cycle": REWARDS}, {}, usable)
    torch.testing.assert_close(found.values["cycle"][0], torch.tensor([-0.15, 0.15, 0.0]))
    assert torch.equal(found.values["cycle"][1], torch.zeros(3))
    assert (found.num_groups, found.num_zero_variance) == (2, 1)
    scaled = estimator("grpo", advantage_scale="group").advantages({"cycle": REWARDS}, {}, ALL).values["cycle"]
    assert float(scaled[0].square().mean()) == pytest.approx(1.0, abs=1e-4)


def test_a_group_of_one_teaches_nothing():
    usable = torch.tensor([[True, False, False], [False, False, False]])
    found = estimator("grpo").advantages({"cycle": REWARDS}, {}, usable)
    assert torch.equal(found.values["cycle"], torch.zeros(2, 3))
    assert found.num_groups == 0, "one caption is no group"


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_advantages_sum_to_zero_in_every_group(rows):
    rewards = torch.tensor(rows)
    found = estimator("grpo").advantages({"cycle": rewards}, {}, torch.ones_like(rewards, dtype=torch.bool))
    assert float(found.values["cycle"].sum(1).abs().max()) <= 1e-6


@given(st.floats(0, 1, width=32), st.integers(2, 8))
def test_equal_rewards_give_exactly_zero(value, count):
    rewards = torch.full((1, count), value)
    usable = torch.ones_like(rewards, dtype=torch.bool)
    for name, scale in itertools.product(("grpo", "scst"), ("none", "group")):
        chosen = estimator(name, advantage_scale=scale, captions_per_region=count)
        found = chosen.advantages({"cycle": rewards}, {"cycle": rewards[:, 0]}, usable)
        assert torch.equal(found.values["cycle"], torch.zeros_like(rewards))


def test_what_does_not_apply_takes_no_part():
    rewards = {"cycle": REWARDS, "caption": torch.tensor([[float("nan")] * 3, [0.1, 0.2, 0.3]])}
    found = estimator("grpo").advantages(rewards, {}, ALL)
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
    chosen, usable = estimator("grpo"), torch.rand(4, 3, generator=generator) > 0.2
    whole = combine_advantages([chosen.advantages(rewards, {}, usable)], weights, dict)[0]
    parts = [
        chosen.advantages({n: r[rows] for n, r in rewards.items()}, {}, usable[rows])
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


def test_one_objective_keeps_its_values_and_asks_nobody():
    found = estimator("grpo").advantages({"cycle": REWARDS}, {}, ALL)

    def refuse(_):
        raise AssertionError("no exchange is needed")

    torch.testing.assert_close(combine_advantages([found], {"cycle": 2.0}, refuse)[0], 2 * found.values["cycle"])


def test_objectives_are_brought_to_one_size():
    rewards = {"cycle": REWARDS, "contrast": 1000 * REWARDS.flip(1)}
    found = estimator("grpo").advantages(rewards, {}, ALL)
    (combined,) = combine_advantages([found], {"cycle": 1.0, "contrast": 1.0}, dict)
    torch.testing.assert_close(combined, torch.zeros(2, 3), atol=1e-4, rtol=0)
    # The same objective twice is that objective, at the sum of the weights.
    twice = estimator("grpo").advantages({"cycle": REWARDS, "contrast": REWARDS}, {}, ALL)
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
    probabilities, chosen = logits.detach().softmax(0), estimator("grpo", captions_per_region=2)
    total = torch.zeros(3, dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        rewards = BANDIT[list(pair)][None]
        advantages = chosen.advantages({"cycle": rewards}, {}, torch.ones(1, 2, dtype=torch.bool)).values["cycle"][0]
        term = policy_loss(logits.log_softmax(0)[list(pair)], advantages)
        (gradient,) = torch.autograd.grad(term.total / term.count, logits)
        total -= probabilities[list(pair)].prod() * gradient
    torch.testing.assert_close(total, finite_differences(logits.detach()) / 2, atol=1e-8, rtol=1e-4)

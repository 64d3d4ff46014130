"""Losses of the learning signals: values by hand, zeros where there is nothing to learn, counts, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_loop.losses import distillation_loss, kl_divergence, latent_alignment, policy_loss


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


def test_agreement_with_the_teacher_is_zero_and_its_gradient_too():
    logits = torch.randn(3, 4, 4, requires_grad=True)
    term = distillation_loss(logits, logits.detach().sigmoid(), torch.ones(3), 0.5)
    assert float(term.total.detach()) == pytest.approx(0.0, abs=1e-5)
    term.total.backward()
    assert float(logits.grad.abs().max()) < 1e-6


def test_only_sure_pixels_and_agreed_objects_teach():
    logits = torch.zeros(2, 1, 2, requires_grad=True)
    teacher = torch.tensor([[[0.99, 0.6]], [[0.01, 0.01]]], requires_grad=True)
    term = distillation_loss(logits, teacher, torch.tensor([1.0, 0.0]), 1.0, confidence=0.5)
    assert term.count == 1.0
    term.total.backward()
    assert logits.grad[0, 0, 0] != 0
    assert logits.grad[0, 0, 1] == 0
    assert torch.equal(logits.grad[1], torch.zeros(1, 2))
    assert teacher.grad is None
    # Divergence of Bernoulli(0.99) from Bernoulli(0.5).
    expected = 0.99 * torch.tensor(0.99 / 0.5).log() + 0.01 * torch.tensor(0.01 / 0.5).log()
    assert float(term.total.detach()) == pytest.approx(float(expected), abs=1e-5)


def test_a_teacher_that_is_sure_of_nothing_adds_nothing():
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    term = distillation_loss(logits, torch.full((1, 2, 2), 0.5), torch.ones(1), 1.0, confidence=0.9)
    assert float(term.total.detach()) == 0.0
    assert term.count == 1.0


def test_alignment_weighs_objects():
    embeds = torch.tensor([[1.0, 1.0], [3.0, 3.0]], requires_grad=True)
    term = latent_alignment(embeds, torch.zeros(2, 2), 2.0, torch.tensor([1.0, 0.0]))
    assert float(term.total.detach()) == 2.0
    assert term.count == 1.0
    term.total.backward()
    assert torch.equal(embeds.grad[1], torch.zeros(2))

"""Straight-through captions: discrete forward, a gradient that points the right way, noise with the right law."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_loop.model.soft_captions import (
    conditioned_perturbation,
    soft_embeddings,
    straight_through_weights,
    temperature_at,
)


@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 30.0, 1000.0]))
def test_the_chosen_entry_is_always_the_largest(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(6, 5, generator=generator)
    chosen = torch.randint(0, 5, (6,), generator=generator)
    perturbed = conditioned_perturbation(logits, chosen, torch.rand(6, 5, generator=generator))
    assert torch.isfinite(perturbed).all()
    best = perturbed.gather(1, chosen[:, None])[:, 0]
    assert torch.equal(best, perturbed.amax(1))


def test_extreme_random_numbers_stay_finite():
    logits = torch.tensor([[0.0, -80.0, 80.0]])
    for value in (0.0, 1.0):
        for chosen in range(3):
            found = conditioned_perturbation(logits, torch.tensor([chosen]), torch.full((1, 3), value))
            assert torch.isfinite(found).all()


def test_noise_mixed_over_sampled_tokens_is_plain_gumbel_noise():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.5]).expand(200_000, 3)
    chosen = torch.multinomial(logits[0].softmax(0), len(logits), replacement=True, generator=generator)
    perturbed = conditioned_perturbation(logits, chosen, torch.rand(logits.shape, generator=generator))
    noise = perturbed - logits.log_softmax(-1)
    euler = 0.5772156649
    assert noise.mean(0).tolist() == pytest.approx([euler] * 3, abs=0.02)
    assert noise.var(0).tolist() == pytest.approx([math.pi**2 / 6] * 3, abs=0.05)
    # Independent between entries, as unconditioned noise is.
    assert float(torch.corrcoef(noise.T)[0, 1].abs()) < 0.01


def draw(num: int, vocabulary: int, top_k: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num, vocabulary, generator=generator, requires_grad=True)
    tokens = torch.randint(0, vocabulary, (num,), generator=generator)
    return logits, tokens, torch.rand(num, top_k + 1, generator=generator)


@pytest.mark.parametrize(("vocabulary", "top_k"), [(50, 8), (5, 8), (2, 1)])
def test_forward_is_the_look_up_and_the_table_gets_no_gradient(vocabulary, top_k):
    logits, tokens, uniform = draw(7, vocabulary, top_k)
    table = torch.randn(vocabulary, 4, requires_grad=True)
    ids, weights = straight_through_weights(logits, tokens, uniform, 0.7, top_k)
    values = soft_embeddings(table, ids, weights)
    assert torch.equal(values, table.detach()[tokens])
    values.square().sum().backward()
    assert table.grad is None
    assert float(logits.grad.abs().sum()) > 0


def test_gradient_reaches_the_likeliest_tokens_alone():
    logits, tokens, uniform = draw(3, 40, 4)
    ids, weights = straight_through_weights(logits, tokens, uniform, 1.0, 4)
    (weights * torch.randn(weights.shape)).sum().backward()
    touched = logits.grad != 0
    # Normalising over the chosen support keeps the others out.
    assert torch.equal(touched.sum(1) <= 5, torch.ones(3, dtype=torch.bool))
    for row in range(3):
        others = [int(k) for k in logits.detach()[row].argsort(descending=True) if k != tokens[row]][:4]
        assert set(ids[row].tolist()) == {int(tokens[row]), *others}


def test_points_along_the_exact_gradient():
    """A linear listener on four tokens: the exact gradient of the expected loss is known."""
    generator = torch.Generator().manual_seed(1)
    table, listener = torch.randn(4, 3, generator=generator), torch.randn(3, generator=generator)
    start = torch.tensor([0.2, -0.3, 0.5, 0.0])
    exact_logits = start.clone().requires_grad_()
    (exact_logits.softmax(0) @ table @ listener).backward()
    count = 20_000
    logits = start.clone().requires_grad_()
    tokens = torch.multinomial(start.softmax(0), count, replacement=True, generator=generator)
    uniform = torch.rand(count, 4, generator=generator)
    ids, weights = straight_through_weights(logits.expand(count, 4), tokens, uniform, 1.0, 3)
    (soft_embeddings(table, ids, weights) @ listener).mean().backward()
    assert float(torch.cosine_similarity(logits.grad, exact_logits.grad, dim=0)) > 0.95


def test_wrong_arguments():
    logits, tokens, uniform = draw(2, 9, 3)
    with pytest.raises(ValueError, match="temperature"):
        straight_through_weights(logits, tokens, uniform, 0.0, 3)
    with pytest.raises(ValueError, match="uniform"):
        straight_through_weights(logits, tokens, uniform, 1.0, 6)


def test_temperature_schedule():
    assert [temperature_at(p, 1.0, 0.25) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([1, 1, 0.5, 0.25, 0.25])

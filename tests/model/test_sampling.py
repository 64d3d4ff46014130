"""Draws on the device: which tokens may be drawn, and noise that depends on seed, draw and place alone."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from dual_loop.model.sampling import keep_top, uniform_noise


def test_the_likeliest_tokens_are_those_of_transformers():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    shares = torch.tensor([[0.1], [0.5], [0.9], [0.99], [1.0]])
    for row, share in enumerate(shares[:, 0].tolist()):
        stock = TopPLogitsWarper(share)(torch.zeros(1, 0, dtype=torch.long), logits[row][None])
        torch.testing.assert_close(keep_top(logits, shares)[row][None], stock)


def test_a_deterministic_run_adds_no_floats_in_any_order(monkeypatch: pytest.MonkeyPatch):
    """Under ``train.deterministic`` torch refuses floating cumsum on GPUs."""
    logits = torch.randn(5, 4000, generator=torch.Generator().manual_seed(0)) * 3
    shares = torch.tensor([[0.1], [0.5], [0.9], [0.99], [0.999]])
    expected, cumsum = keep_top(logits, shares), torch.Tensor.cumsum

    def on_a_gpu(values: torch.Tensor, dim: int) -> torch.Tensor:
        if values.is_floating_point() and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return cumsum(values, dim)

    monkeypatch.setattr(torch.Tensor, "cumsum", on_a_gpu)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(keep_top(logits, shares), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_noise_is_uniform_and_depends_on_seed_draw_and_place_alone():
    seeds = torch.tensor([3, 2**62 + 3, 4], dtype=torch.long)
    noise = uniform_noise(seeds, torch.tensor([7]), 50_000)
    assert noise.min() > 0
    assert noise.max() < 1
    assert torch.equal(noise[1:2], uniform_noise(seeds[1:2], torch.tensor([7]), 50_000))
    others = [uniform_noise(seeds, torch.tensor([8]), 50_000), noise.roll(1, 0), noise.roll(1, 1)]
    for other in others:
        # Independent uniforms: the correlation of 50,000 pairs has a standard deviation of 0.0045.
        for one, two in zip(noise, other, strict=True):
            assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 0.025
    for row in noise:
        counts = torch.histc(row, 20, 0, 1)
        assert ((counts - 2500).abs() < 250).all()  # five standard deviations

"""Draws on the device: which tokens may be drawn, and noise that depends on seed, draw and place alone."""

from __future__ import annotations

import torch
from transformers.generation.logits_process import TopPLogitsWarper

from dual_loop.model.sampling import keep_top, uniform_noise


def test_the_likeliest_tokens_are_those_of_transformers():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    shares = torch.tensor([[0.1], [0.5], [0.9], [0.99], [1.0]])
    for row, share in enumerate(shares[:, 0].tolist()):
        stock = TopPLogitsWarper(share)(torch.zeros(1, 0, dtype=torch.long), logits[row][None])
        torch.testing.assert_close(keep_top(logits, shares)[row][None], stock)


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

"""Points of the mask losses: what is read there, which are chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dual_loop.points import mask_sample, point_sample, sample_points

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "sa2va_tiny"


def _objects(num: int, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num, side, side, generator=generator) * 3
    return logits, (torch.rand(num, side, side, generator=generator) > 0.6).to(torch.uint8), torch.arange(num) * 7919


def test_point_functions_accept_no_objects():
    points = sample_points(torch.zeros(0, 8, 8), torch.zeros(0, dtype=torch.int64), 5, 3.0, 0.75)
    assert points.shape == (0, 5, 2)
    assert point_sample(torch.zeros(0, 8, 8), points).shape == (0, 5)


@pytest.mark.usefixtures("precision")
def test_point_sample_reads_pixel_centres_midpoints_and_zeros_outside():
    maps = torch.arange(16.0).reshape(1, 4, 4)
    centre = [(2 + 0.5) / 4, (1 + 0.5) / 4]  # x = column 2, y = row 1 -> 6
    between = [2 / 4, (1 + 0.5) / 4]  # halfway between columns 1 and 2 of row 1 -> 5.5
    corner = [1.0, 1.0]  # a quarter of pixel 15, three quarters of the zeros outside
    outside = [-0.5, 0.5]
    values = point_sample(maps, torch.tensor([[centre, between, corner, outside]]))
    assert values.tolist() == [[6.0, 5.5, 15 / 4, 0.0]]


def test_point_sample_reads_uint8_and_bool_masks():
    points = torch.rand(2, 9, 2)
    _, targets, _ = _objects(2)
    assert torch.equal(point_sample(targets, points), point_sample(targets.bool(), points))


@pytest.mark.usefixtures("precision")
def test_sampled_points_are_the_most_uncertain_then_uniform():
    logits, _, seeds = _objects(2, side=16)
    points = sample_points(logits, seeds, 40, 3.0, 0.75)
    assert points.shape == (2, 40, 2)
    assert points.min() >= 0
    assert points.max() <= 1
    for i in range(2):
        generator = torch.Generator().manual_seed(int(seeds[i]))
        everything = torch.rand(120 + 10, 2, generator=generator)
        uncertainty = point_sample(logits[i : i + 1], everything[None, :120]).abs()[0]
        kept = point_sample(logits[i : i + 1], points[None, i, :30]).abs()[0]
        assert torch.equal(kept, uncertainty.sort().values[:30])
        assert torch.equal(points[i, 30:], everything[120:])


@pytest.mark.usefixtures("precision")
def test_masks_of_any_size_are_read_as_maps_are():
    masks = [torch.rand(count, *size) > 0.5 for count, size in ((2, (6, 9)), (0, (4, 4)), (1, (31, 17)))]
    points = torch.rand(3, 50, 2)
    expected = [point_sample(own.float(), at) for own, at in zip(masks, points.split([2, 0, 1]), strict=True)]
    torch.testing.assert_close(mask_sample(masks, points), torch.cat(expected))


def test_deterministic_reading_gives_the_values_and_the_gradient_of_the_fast_one():
    maps = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = torch.rand(3, 40, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.4 - 0.2
    results = []
    for is_on in (False, True):
        torch.use_deterministic_algorithms(is_on)
        try:
            own = maps.clone().requires_grad_()
            values = point_sample(own, points)
            values.square().sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        results.append((values.detach(), own.grad))
    for seen, expected in zip(*results, strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)


def test_sampled_points_carry_no_gradient():
    logits, _, seeds = _objects(1)
    assert not sample_points(logits.requires_grad_(), seeds, 10, 3.0, 0.75).requires_grad


def test_points_do_not_touch_the_global_random_state():
    logits, _, seeds = _objects(2)
    before = torch.get_rng_state()
    sample_points(logits, seeds, 20, 3.0, 0.75)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden reference folder is not next to the repository")
def test_golden_points_obey_the_sampling_rule():
    """The stored points are sorted by |logit| over the first 9408, which fixes both the reading and the order."""
    from safetensors import safe_open

    with safe_open(str(GOLDEN / "outputs.safetensors"), "pt") as tensors:
        logits = tensors.get_tensor("pred_masks_low_res").flatten(0, 1)
        points = tensors.get_tensor("point_coords")
    uncertainty = point_sample(logits, points[:, :9408]).abs()
    assert (uncertainty.diff(dim=1) >= -1e-4).all()
    ours = sample_points(logits, torch.arange(len(logits)), 12544, 3.0, 0.75)
    assert ours.shape == points.shape
    threshold, their_threshold = (point_sample(logits, p[:, :9408]).abs().amax(1) for p in (ours, points))
    assert torch.allclose(threshold, their_threshold, rtol=0.05)

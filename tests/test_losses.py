"""Losses: hand-computed values, gradients, independence of the batch split, parity with the original reduction."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dual_loop.config import LossConfig
from dual_loop.loop.signals.alignment import latent_alignment
from dual_loop.loop.task import plain_terms
from dual_loop.losses import (
    dice_loss,
    mask_cross_entropy,
    sum_objects,
    token_cross_entropy,
)
from dual_loop.model.sa2va_api import original_mask_losses
from dual_loop.points import point_sample, sample_points
from dual_loop.types import LossTerm

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "sa2va_tiny"
SMALL = LossConfig(num_points=20)
ALL_PIXELS = LossConfig(num_points=0)


def _objects(num: int, side: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num, side, side, generator=generator, dtype=dtype) * 3
    targets = (torch.rand(num, side, side, generator=generator) > 0.6).to(torch.uint8)
    seeds = torch.arange(num) * 7919 + 11
    return logits, targets, seeds


def mask_terms(
    logits: torch.Tensor,
    targets: torch.Tensor,
    seeds: torch.Tensor,
    config: LossConfig,
    weights: torch.Tensor | None = None,
) -> dict[str, LossTerm]:
    """The mask terms of steps 2 and 3, of masks that no model made."""
    weights = torch.ones(len(logits)) if weights is None else weights
    packed: Any = SimpleNamespace(batch=SimpleNamespace(target_masks=targets, full_masks=[], region_seeds=seeds))
    packed.region_weights, packed.counts = weights, {"llm_loss": 0.0}
    packed.answer_positions, packed.answer_ids = torch.zeros(2, 0).long(), torch.zeros(0).long()
    model: Any = SimpleNamespace(token_loss=lambda hidden, labels: hidden.sum())
    masks: Any = SimpleNamespace(mask_logits=logits)
    terms = plain_terms(model, torch.zeros(1, 1, 2), masks, packed, config)
    return {name: terms[name] for name in ("mask_loss", "dice_loss")}


def as_logits(rows: torch.Tensor) -> torch.Tensor:
    """A head that returns what it is given."""
    return rows


# --- values by hand -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("precision")
def test_mask_cross_entropy_sums_the_means_of_the_objects():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), math.log(3.0)]])
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # object 0: log 2; object 1: p = 0.75, (-log 0.75 - log 0.25) / 2
    expected = math.log(2.0) + (-math.log(0.75) - math.log(0.25)) / 2
    term = sum_objects(mask_cross_entropy(logits, targets), 2.0)
    assert term.count == 2
    assert term.total.item() == pytest.approx(2.0 * expected, rel=1e-6)


@pytest.mark.usefixtures("precision")
def test_dice_by_hand():
    logits = torch.tensor([[math.log(3.0), -math.log(3.0), 0.0]])  # p = 0.75, 0.25, 0.5
    term = sum_objects(dice_loss(logits, torch.tensor([[1, 0, 1]]), eps=1.0), 0.5)
    assert term.total.item() == pytest.approx(0.5 * (1 - (2 * 1.25 + 1) / (1.5 + 2 + 1)), rel=1e-6)
    assert term.count == 1


@pytest.mark.usefixtures("precision")
def test_dice_of_empty_against_empty_is_zero_and_against_full_is_near_one():
    very_low = torch.full((1, 4, 4), -50.0)
    assert dice_loss(very_low, torch.zeros(1, 4, 4)).sum().item() == pytest.approx(0.0, abs=1e-6)
    assert dice_loss(very_low, torch.ones(1, 4, 4)).sum().item() == pytest.approx(1 - 1 / 17, rel=1e-6)


def test_object_weights_scale_the_objects_and_become_the_count():
    logits, targets, seeds = _objects(3)
    weights = torch.tensor([0.0, 0.5, 2.0])
    terms = mask_terms(logits, targets, seeds, ALL_PIXELS, weights)
    for name, function, weight in (("mask_loss", mask_cross_entropy, 2.0), ("dice_loss", dice_loss, 0.5)):
        single = [function(logits[i : i + 1], targets[i : i + 1]).sum() * weight for i in range(3)]
        assert terms[name].total.item() == pytest.approx((0.5 * single[1] + 2.0 * single[2]).item(), rel=1e-5)
        assert terms[name].count == 2.5


@pytest.mark.usefixtures("precision")
def test_low_precision_logits_are_computed_in_float32():
    logits, targets, _ = _objects(2, side=64)
    low = logits.bfloat16()
    for function in (mask_cross_entropy, dice_loss):
        values = function(low, targets)
        assert values.dtype == torch.float32
        assert values.tolist() == function(low.float(), targets).tolist()


def test_shape_mismatches_are_refused():
    for function in (mask_cross_entropy, dice_loss):
        with pytest.raises(ValueError, match="differ in shape"):
            function(torch.zeros(2, 4, 4), torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="one weight an object"):
        sum_objects(dice_loss(torch.zeros(2, 4), torch.zeros(2, 4)), 0.5, torch.ones(1))
    with pytest.raises(ValueError, match="one seed an object"):
        sample_points(torch.zeros(2, 4, 4), torch.zeros(1, dtype=torch.int64), 4, 3.0, 0.75)
    with pytest.raises(ValueError, match="out of range"):
        sample_points(torch.zeros(1, 4, 4), torch.zeros(1, dtype=torch.int64), 4, 0.5, 0.75)
    with pytest.raises(ValueError, match="do not fit"):
        point_sample(torch.zeros(2, 4, 4), torch.zeros(1, 3, 2))


# --- no objects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, ALL_PIXELS])
def test_no_objects_give_a_zero_connected_to_the_logits(config: LossConfig):
    source = torch.ones(3, 8, 8, requires_grad=True)
    terms = mask_terms(source[:0], torch.zeros(0, 8, 8), torch.zeros(0, dtype=torch.int64), config)
    assert [(term.total.item(), term.count) for term in terms.values()] == [(0.0, 0.0), (0.0, 0.0)]
    sum(term.total for term in terms.values()).backward()
    assert source.grad is not None
    assert source.grad.abs().sum() == 0


# --- points ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(num=st.integers(2, 5), cut=st.integers(1, 4), num_points=st.sampled_from([0, 1, 17]))
def test_splitting_the_batch_changes_neither_sums_nor_counts(num: int, cut: int, num_points: int):
    cut = min(cut, num - 1)
    config = LossConfig(num_points=num_points)
    logits, targets, seeds = _objects(num, seed=num)
    whole = mask_terms(logits, targets, seeds, config)
    first = mask_terms(logits[:cut], targets[:cut], seeds[:cut], config)
    second = mask_terms(logits[cut:], targets[cut:], seeds[cut:], config)
    for name, term in whole.items():
        assert term.count == first[name].count + second[name].count
        assert term.total.item() == pytest.approx((first[name].total + second[name].total).item(), rel=1e-6)


@pytest.mark.usefixtures("precision")
def test_losses_are_read_at_the_sampled_points_and_given_points_replace_them():
    logits, targets, seeds = _objects(2)
    points = sample_points(logits, seeds, 20, 3.0, 0.75)
    terms = mask_terms(logits, targets, seeds, SMALL)
    expected = mask_cross_entropy(point_sample(logits, points), point_sample(targets, points)).sum() * 2.0
    assert terms["mask_loss"].total.item() == expected.item()
    assert terms["mask_loss"].total.item() != mask_terms(logits, targets, seeds, ALL_PIXELS)["mask_loss"].total.item()
    others = torch.rand(2, 6, 2)
    given = original_mask_losses(logits, targets, SMALL, others)["loss_mask"].item()
    at_others = mask_cross_entropy(point_sample(logits, others), point_sample(targets, others)).mean() * 2.0
    assert given == pytest.approx(at_others.item(), rel=1e-4)
    assert given != pytest.approx(original_mask_losses(logits, targets, SMALL)["loss_mask"].item(), rel=1e-4)


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("precision")
def test_token_cross_entropy_ignores_what_has_no_label():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0], [9.0, -9.0]])
    total = token_cross_entropy(as_logits, logits, torch.tensor([0, 1, -100]))
    assert total.item() == pytest.approx(-math.log(0.75) - math.log(0.5), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_token_cross_entropy_equals_the_plain_loop_and_never_counts_ignored_positions(chunk: int):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.tensor([[1, 2, -100, 4, -100], [-100, -100, 6, -100, 0]])
    predicted = [(0, 0, 2), (0, 2, 4), (1, 1, 6), (1, 3, 0)]  # row, position, label: the first label is not predicted
    expected = sum(-torch.log_softmax(logits[r, p], -1)[label].item() for r, p, label in predicted)
    following = labels[:, 1:].flatten()
    total = token_cross_entropy(as_logits, logits[:, :-1].flatten(0, 1), following, chunk)
    assert total.item() == pytest.approx(expected, rel=1e-6)
    logits[0, 1] = float("nan")
    assert torch.equal(token_cross_entropy(as_logits, logits[:, :-1].flatten(0, 1), following, chunk), total)


def test_the_logits_of_a_chunk_alone_exist_at_once_and_the_gradient_stays():
    generator = torch.Generator().manual_seed(4)
    hidden, head = torch.randn(7, 3, generator=generator), torch.randn(3, 5, generator=generator)
    labels = torch.tensor([0, 1, -100, 3, 4, 0, 2])
    results, sizes = [], []

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows @ matrix

    for chunk in (2, 100):
        rows, matrix = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        token_cross_entropy(logits_of, rows, labels, chunk).backward()
        results.append((rows.grad, matrix.grad))
    assert sizes[:4] == [2, 2, 2, 1]
    assert sorted(sizes[4:]) == [1, 2, 2, 2, 7]  # the backward pass makes them again
    for seen, expected in zip(*results, strict=True):
        torch.testing.assert_close(seen, expected)


def test_no_tokens_give_a_zero_with_graph():
    logits = torch.randn(8, 3, requires_grad=True)
    for rows, labels in ((logits, torch.full((8,), -100)), (logits[:0], torch.zeros(0).long())):
        total = token_cross_entropy(as_logits, rows, labels)
        assert total.item() == 0.0
        logits.grad = None
        total.backward()
        assert logits.grad is not None
        assert logits.grad.abs().sum() == 0


def test_token_losses_refuse_wrong_shapes_and_compute_in_float32():
    with pytest.raises(ValueError, match=r"8.*to match.*6"):
        token_cross_entropy(as_logits, torch.zeros(8, 3), torch.zeros(6, dtype=torch.int64))
    logits = torch.randn(4, 50).bfloat16()
    assert token_cross_entropy(as_logits, logits, torch.arange(4)).dtype == torch.float32


# --- latent alignment -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("precision")
def test_latent_alignment_by_hand_and_without_gradient_to_the_target():
    seg = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 4.0], [3.0, 1.0]], requires_grad=True)
    term = latent_alignment(seg, target)
    assert term.count == 2
    assert term.total.item() == pytest.approx(4 / 2 + 10 / 2)
    term.total.backward()
    assert seg.grad is not None
    assert target.grad is None


# --- gradients against finite differences ---------------------------------------------------------------------------


def _check_gradient(function, values: torch.Tensor) -> None:
    assert torch.autograd.gradcheck(function, (values.detach().requires_grad_(),), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_gradients_of_the_mask_terms():
    logits, targets, _ = _objects(2, side=4, dtype=torch.float64)
    weights = torch.tensor([0.3, 1.7])
    _check_gradient(lambda x: sum_objects(mask_cross_entropy(x, targets), 2.0, weights).total, logits)
    _check_gradient(lambda x: sum_objects(dice_loss(x, targets, 1.0), 0.5, weights).total, logits)


def test_gradients_through_the_points():
    logits, targets, seeds = _objects(2, side=5, dtype=torch.float64)
    points = sample_points(logits, seeds, 12, 3.0, 0.75)

    def total(values: torch.Tensor) -> torch.Tensor:
        logits, at_points = point_sample(values, points), point_sample(targets, points)
        entropy, dice = mask_cross_entropy(logits, at_points), dice_loss(logits, at_points)
        return sum_objects(entropy, SMALL.mask_weight).total + sum_objects(dice, SMALL.dice_weight).total

    _check_gradient(total, logits)
    _check_gradient(lambda x: point_sample(x, points), logits)


def test_gradients_of_tokens_and_latents():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[0, -100, 2, 3], [4, 1, -100, -100]])
    following = labels[:, 1:].flatten()
    _check_gradient(lambda x: token_cross_entropy(as_logits, x[:, :-1].flatten(0, 1), following) * 0.7, logits)
    target = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    _check_gradient(lambda x: latent_alignment(x, target, 0.7).total, torch.randn_like(target))


# --- the original reduction -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("precision")
def test_original_divisors_by_hand():
    logits, targets, _ = _objects(2)
    points = torch.rand(2, 3, 2)
    at_points = point_sample(logits, points), point_sample(targets, points)
    entropy, dice = mask_cross_entropy(*at_points).sum() * 2.0, dice_loss(*at_points).sum() * 0.5
    theirs = original_mask_losses(logits, targets, SMALL, points)
    eps = torch.finfo(torch.float32).eps
    assert theirs["loss_mask"].item() == pytest.approx(entropy.item() * 3 / (6 + 1e-4 + eps), rel=1e-6)
    assert theirs["loss_dice"].item() == pytest.approx(dice.item() / (2 + 1e-4 + eps), rel=1e-6)
    whole = original_mask_losses(logits, targets, SMALL)
    assert whole["loss_dice"].item() == pytest.approx(dice_loss(logits, targets).mean().item() * 0.5, rel=1e-6)


@pytest.mark.usefixtures("precision")
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden reference folder is not next to the repository")
@pytest.mark.parametrize("with_points", [False, True])
def test_parity_with_the_golden_reference(with_points: bool):
    from safetensors import safe_open

    with safe_open(str(GOLDEN / "outputs.safetensors"), "pt") as tensors:
        logits = tensors.get_tensor("pred_masks_low_res").flatten(0, 1)
        targets = tensors.get_tensor("gt_masks_low_res").flatten(0, 1)
        points = tensors.get_tensor("point_coords") if with_points else None
    losses = json.loads((GOLDEN / "outputs.json").read_text())["losses"]
    expected = losses["points" if with_points else "no_points"]
    theirs = original_mask_losses(logits, targets, LossConfig(), points)
    if points is not None:
        logits, targets = point_sample(logits, points), point_sample(targets, points)
    entropy = sum_objects(mask_cross_entropy(logits, targets), LossConfig().mask_weight)
    dice = sum_objects(dice_loss(logits, targets), LossConfig().dice_weight)
    for name, term in (("loss_mask", entropy), ("loss_dice", dice)):
        assert theirs[name].item() == pytest.approx(expected[name], abs=2e-6)
        # The original's offset of 1e-4 on ten objects shrinks its point losses by a factor of 1e-5.
        assert term.mean.item() == pytest.approx(expected[name], abs=1e-5)

"""Soft targets of the weight average: the loss by hand, and a teacher that stays in eval mode without graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dual_loop.config import LossConfig
from dual_loop.loop.signals.distillation import distillation_loss, soft_mask_loss
from dual_loop.loop.task import DualLoopTask

from loop_settings import half_average, masks_only, setting
from small_model import small_batch, small_model

pytestmark = pytest.mark.usefixtures("precision")


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


def test_the_teacher_stays_in_eval_without_gradient_and_gates_by_agreement(monkeypatch):
    config = setting("none", LossConfig(num_points=0, distill_weight=0.5, distill_agreement=0.0))
    model, prompter, _ = small_model(config)
    task = DualLoopTask(model, prompter, config, half_average(model))
    (signal,) = task.signals
    model.train()
    modes = []
    original = type(model).read

    def watched(self, *arguments, **options):
        modes.append((self.training, torch.is_grad_enabled()))
        return original(self, *arguments, **options)

    monkeypatch.setattr(type(model), "read", watched)
    (packed,) = task.prepare([small_batch(config, masks_only())])
    assert modes == [(False, False)]
    assert model.training
    teacher = packed.lessons["distillation"]
    assert not teacher.probabilities.requires_grad
    assert packed.counts["distill_loss"] == float(teacher.weights.sum()) == packed.batch.num_regions
    # The average equals the live weights here: nothing to learn from it, but for dropout's sake in eval mode.
    model.eval()
    term = task(packed).terms["distill_loss"]
    assert float(term.total.detach()) == pytest.approx(0.0, abs=1e-4)
    signal.config = dataclasses.replace(config.loss, distill_agreement=1.0)
    (packed,) = task.prepare([small_batch(config, masks_only())])
    assert packed.counts["distill_loss"] == 0.0


def plain_formula(logits, teacher):
    """0.5 * (2.0 CE + 0.5 dice), the mean over objects, pixel by pixel in float64."""
    student, teacher = logits.double().sigmoid(), teacher.double()
    entropy = -(teacher * student.log() + (1 - teacher) * (1 - student).log()).mean((1, 2))
    overlap = (student * teacher).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (student.sum((1, 2)) + teacher.sum((1, 2)) + 1)
    return float((0.5 * (2.0 * entropy + 0.5 * dice)).mean())


@pytest.mark.parametrize("num_points", [0, 40])
def test_soft_mask_is_the_mask_losses_against_the_teachers_soft_mask(num_points):
    loss = LossConfig(num_points=num_points, distill_weight=0.5, distill_form="soft_mask")
    config = setting("none", loss)
    model, prompter, _ = small_model(config)
    task = DualLoopTask(model, prompter, config, half_average(model))
    with torch.no_grad():  # away from the average, whose masks then agree with neither the student's nor the true ones
        for parameter in model.text_hidden_fcs.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    (packed,) = task.prepare([small_batch(config, masks_only())])
    output = task(packed)
    term = output.terms["distill_loss"]
    assert packed.counts["distill_loss"] == float(term.count) == packed.batch.num_regions, "every object is taught"
    expected = plain_formula(output.masks.mask_logits.detach(), packed.lessons["distillation"].probabilities)
    assert float(term.mean.detach()) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.1
    term.total.backward()
    assert float(model.text_hidden_fcs[0].weight.grad.abs().max()) > 0


def test_soft_mask_weighs_objects_and_leaves_unsure_pixels_out():
    loss = LossConfig(distill_weight=0.5, distill_form="soft_mask", distill_confidence=0.5)
    logits = torch.tensor([[[2.0, -1.0, 0.5]], [[1.0, 1.0, 1.0]], [[3.0, 3.0, 3.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.9, 0.1, 0.6]], [[0.5, 0.4, 0.6]], [[0.9, 0.9, 0.9]]])
    term = soft_mask_loss(logits, teacher, torch.tensor([1.0, 1.0, 0.0]), loss)
    assert float(term.count) == 2.0
    assert float(term.total.detach()) == pytest.approx(plain_formula(logits[:1, :, :2].detach(), teacher[:1, :, :2]))
    term.total.backward()
    assert (logits.grad != 0).tolist() == [[[True, True, False]], [[False] * 3], [[False] * 3]]


def test_every_pixel_teaches_unless_told_otherwise():
    assert LossConfig().distill_confidence == 0.0
    logits = torch.zeros(1, 1, 2, requires_grad=True)
    distillation_loss(logits, torch.tensor([[[0.99, 0.6]]]), torch.ones(1)).total.backward()
    assert (logits.grad != 0).all()


def test_distillation_without_an_average_is_refused():
    config = setting("none", LossConfig(num_points=0, distill_weight=0.5))
    model, prompter, _ = small_model(config)
    with pytest.raises(ValueError, match="weight average"):
        DualLoopTask(model, prompter, config)

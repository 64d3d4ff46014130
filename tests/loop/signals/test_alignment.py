"""Latent alignment: what it weighs, where its points lie, and how far its gradient reaches."""

from __future__ import annotations

import pytest
import torch

from dual_loop.config import LossConfig
from dual_loop.loop.signals.alignment import inner_points, latent_alignment

from loop_settings import gradients, masks_only, setting

pytestmark = pytest.mark.usefixtures("precision")


def test_alignment_weighs_objects():
    embeds = torch.tensor([[1.0, 1.0], [3.0, 3.0]], requires_grad=True)
    term = latent_alignment(embeds, torch.zeros(2, 2), 2.0, torch.tensor([1.0, 0.0]))
    assert float(term.total.detach()) == 2.0
    assert term.count == 1.0
    term.total.backward()
    assert torch.equal(embeds.grad[1], torch.zeros(2))


def test_points_lie_on_the_object_also_where_its_middle_does_not():
    masks = torch.zeros(3, 5, 7)
    masks[0, 1:4, 2:5] = 1  # a square
    masks[1] = 1
    masks[1, 1:4, 1:6] = 0  # a ring
    points = inner_points(masks)
    assert points[0].tolist() == [3.5, 2.5]
    x, y = points[1].long().tolist()
    assert masks[1, y, x] == 1
    assert points[2].tolist() == [3.5, 2.5], "an empty mask is asked for in the middle"


def test_alignment_through_the_projection_leaves_the_language_alone():
    def touched(through):
        config = setting("none", LossConfig(num_points=0, align_weight=1.0, align_through=through))
        model, _ = gradients(config, [masks_only()], ("align_loss",))
        names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        return {"lora": any(".lora_" in name for name in names), "fcs": any("text_hidden_fcs" in n for n in names)}

    assert touched("all") == {"lora": True, "fcs": True}
    assert touched("projection") == {"lora": False, "fcs": True}

"""SAM 2's encoder without what nobody reads: the same levels, masks and gradients as the stock one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dual_loop.accelerate.sam2 import LeanNeck, cast_trunk
from dual_loop.config import SpeedConfig
from dual_loop.model.sa2va import GroundingDecoder

from small_model import scene_samples, small_batch, small_config, small_model


def models(**changes: Any) -> tuple[Any, Any, Any]:
    """The same weights with the stock encoder and with the lean one, and a batch of two images."""
    config = small_config(**changes)
    stock, _, config = small_model(dataclasses.replace(config, speed=SpeedConfig(lean_sam2=False)))
    lean, _, _ = small_model(dataclasses.replace(config, speed=SpeedConfig()))
    lean.load_state_dict(stock.state_dict())
    return stock.double(), lean.double(), small_batch(config, scene_samples(2))


def finished(model: Any, batch: Any) -> list[torch.Tensor]:
    levels: list[torch.Tensor] = model.grounding.finish(model.encode_grounding(batch.g_pixel_values))
    return levels


def test_the_levels_and_the_gradients_of_their_convolutions_are_the_stock_ones() -> None:
    stock, lean, batch = models()
    assert isinstance(lean.grounding_encoder.vision_encoder.neck, LeanNeck)
    results = []
    for model in (stock, lean):
        levels, decoder = finished(model, batch), model.grounding_encoder.mask_decoder
        torch.manual_seed(0)
        torch.stack([(level * torch.randn(level.shape).double()).sum() for level in levels[:2]]).sum().backward()
        gradients = [p.grad for conv in (decoder.conv_s0, decoder.conv_s1) for p in conv.parameters()]
        results.append([level.detach() for level in levels] + gradients)
    for seen, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)
        assert expected.abs().max() > 0


def test_open_levels_come_out_as_narrow_as_the_trunk() -> None:
    stock, lean, batch = models()
    shapes = [[level.shape[1] for level in model.encode_grounding(batch.g_pixel_values)] for model in (stock, lean)]
    assert shapes == [[32, 32, 32], [8, 16, 32]]
    widths = [[model.grounding.level_width(level) for level in range(3)] for model in (stock, lean)]
    assert widths == shapes


def test_a_neck_that_trains_or_adds_from_above_stays_closed() -> None:
    stock, lean, batch = models()
    neck = lean.grounding_encoder.vision_encoder.neck
    assert neck.open_levels == (0, 1)
    neck.lateral(1).weight.requires_grad_(True)
    assert neck.open_levels == (0,)
    neck.lateral(1).weight.requires_grad_(False)
    for model in (stock, lean):
        model.grounding_encoder.vision_encoder.neck.fpn_top_down_levels = [1, 2, 3]
    assert neck.open_levels == (0,)
    for seen, expected in zip(finished(lean, batch), finished(stock, batch), strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [0, 1])
def test_under_autocast_a_level_is_rounded_once_and_its_matrices_are_multiplied_in_float32(level: int) -> None:
    stock, lean, batch = models()
    exact = finished(stock, batch)[level].detach()
    lean.float()
    with torch.autocast("cpu", torch.bfloat16):
        features = lean.encode_grounding(batch.g_pixel_values)
        seen = lean.grounding.finish(features)[level]
    assert features[level].dtype in (torch.bfloat16, torch.float32)  # float32 where the CPU is faster so
    assert (seen.double() - exact).abs().max() <= 0.03 * exact.abs().max()


def test_matrices_that_are_cast_once_give_what_autocast_gives() -> None:
    config = small_config(dtype="bfloat16")
    model, _, _ = small_model(config)
    pixels = small_batch(config, scene_samples(2)).g_pixel_values
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = GroundingDecoder.encode(model.grounding, pixels.float())
        cast_trunk(model, config, torch.device("cpu"))
        trunk = model.grounding_encoder.vision_encoder.backbone
        assert {p.dtype for p in trunk.parameters()} == {torch.float32}
        cast_trunk(model, config, torch.device("cuda"))
        torch.clear_autocast_cache()
        after = GroundingDecoder.encode(model.grounding, pixels.float())
    matrices = [m.weight for m in trunk.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert {matrix.dtype for matrix in matrices} == {torch.bfloat16}
    assert all(torch.equal(*levels) for levels in zip(before, after, strict=True))


def test_a_trunk_that_trains_or_computes_in_float32_is_not_cast() -> None:
    for changes in ({"dtype": "float32"}, {"dtype": "bfloat16", "trainable": ("lora", "sam2_encoder")}):
        model, _, config = small_model(small_config(**changes))
        cast_trunk(model, config, torch.device("cuda"))
        assert {p.dtype for p in model.grounding_encoder.parameters()} == {torch.float32}

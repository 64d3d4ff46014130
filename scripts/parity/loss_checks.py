"""Losses with and without sampled points, and the gradients of their sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dual_loop.model.sa2va import evaluating
from dual_loop.model.sa2va_api import VideoLLaVASAMModel

from .case import Case
from .report import Report, Row
from .weights import original_key

LOSSES, GRADIENTS, NO_GRADIENT = 1e-5, 1e-4, 1e-5
HALF_LOSSES, HALF_GRADIENTS, HALF_GROUPS = 5e-3, 0.3, 0.1
"""In bfloat16 autocast. A gradient is taken at other activations then, and every ReLU that changes sides changes it."""
NEGLIGIBLE = 1e-6  # a norm below this is rounding noise of a gradient that is zero
EVAL_PREFIX = "check_eval_mode_"
VARIANTS = ("no_points", "points")
NORMS, GROUP_NORMS, NONE_LIST = "grad_norm_per_parameter_", "grad_norm_groups_", "parameters_without_grad"


def check_losses(case: Case, model: VideoLLaVASAMModel, report: Report, order: Tensor) -> None:
    """Compare losses and gradients of both variants."""
    report.section("losses and gradients")
    known = {"points_info", *VARIANTS, *(EVAL_PREFIX + variant for variant in VARIANTS)}
    listed: Mapping[str, Any] = case.results.get("losses", {})
    for name in sorted(listed.keys() - known):
        report.failed(f"losses.{name}", "no check is known for this entry")
    points = case.expected("point_coords")
    for variant in VARIANTS:
        if variant not in listed:
            continue
        if variant == "points" and points is None:
            report.failed("losses.points", "outputs.safetensors holds no point_coords")
            continue
        data = {**case.loss_batch(), "object_order": order}
        if variant == "points":
            data["point_coords"] = points
        # Without coordinates 0 means all pixels; with them the number is not looked at.
        model.loss_config = dataclasses.replace(case.config.loss, num_points=0)
        model.train()
        model.zero_grad(set_to_none=True)
        with case.autocast():
            losses = dict(model(data, mode="loss"))
        losses["total"] = sum(losses.values(), torch.zeros(()))
        losses["total"].backward()
        compare_losses(report, variant, losses, listed[variant])
        check_gradients(case, model, report, variant)
        if EVAL_PREFIX + variant in listed:
            with evaluating(model), torch.no_grad(), case.autocast():
                losses = dict(model(data, mode="loss"))
            losses["total"] = sum(losses.values(), torch.zeros(()))
            compare_losses(report, EVAL_PREFIX + variant, losses, listed[EVAL_PREFIX + variant])
    model.zero_grad(set_to_none=True)


def compare_losses(report: Report, variant: str, seen: Mapping[str, Tensor], expected: Mapping[str, float]) -> None:
    """Compare the numbers of one variant."""
    for name, value in expected.items():
        if name in seen:
            both = float(seen[name].detach()), float(value)
            report.number(f"losses.{variant}.{name}", *both, absolute=LOSSES, half=HALF_LOSSES)
        else:
            report.failed(f"losses.{variant}.{name}", "the model returns no such loss")


def check_gradients(case: Case, model: VideoLLaVASAMModel, report: Report, variant: str) -> None:
    """Compare listed gradients, norms by group and by parameter, and who has none."""
    gradients: dict[str, Tensor] = {}
    without = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[original_key(name)] = parameter.grad
        elif parameter.requires_grad:
            without.add(original_key(name))
    if variant == "no_points":
        for name in sorted(n for n in case.outputs if n.startswith("grad.")):
            check_one_gradient(case, report, name, gradients)
        if NONE_LIST in case.results:
            report.same(NONE_LIST, sorted(without), sorted(case.results[NONE_LIST]))
    norms = {key: float(gradient.double().norm()) for key, gradient in gradients.items()}
    norms.update(dict.fromkeys(without, 0.0))
    listed: Mapping[str, float | None] = case.results.get(NORMS + variant, {})
    report.worst(NORMS + variant, [check_norm(report, variant, key, norms, norm) for key, norm in listed.items()])
    for group, norm in case.results.get(GROUP_NORMS + variant, {}).items():
        members = [gradient for key, gradient in gradients.items() if f"{group}." in key]
        if not members:
            report.failed(f"{GROUP_NORMS}{variant}.{group}", "no gradient belongs to this group")
            continue
        total = float(torch.stack([gradient.double().square().sum() for gradient in members]).sum().sqrt())
        report.number(f"{GROUP_NORMS}{variant}.{group}", total, norm, relative=GRADIENTS, half=HALF_GROUPS)


def check_one_gradient(case: Case, report: Report, name: str, gradients: Mapping[str, Tensor]) -> None:
    """Compare one whole gradient, relative to its largest value."""
    expected, key = case.expected(name), name.removeprefix("grad.")
    if expected is None or key not in gradients:
        report.failed(name, "this parameter has no gradient here")
    elif is_noise(key):
        report.close(name, gradients[key], expected, absolute=NO_GRADIENT)
    else:
        report.close(name, gradients[key], expected, relative=GRADIENTS, half=HALF_GRADIENTS)


def check_norm(report: Report, variant: str, key: str, norms: Mapping[str, float], expected: float | None) -> Row:
    """Compare the norm of one parameter's gradient; exactly zero (or none) must be exactly zero."""
    name = f"{NORMS}{variant}.{key}"
    if key not in norms:
        return report.failed(name, "this parameter does not train here")
    if not expected:
        return report.number(name, norms[key], 0.0, absolute=0.0, quiet=True)
    if is_noise(key) or expected < NEGLIGIBLE:
        return report.number(name, norms[key], expected, absolute=NO_GRADIENT, quiet=True)
    return report.number(name, norms[key], expected, relative=GRADIENTS, half=HALF_GRADIENTS, quiet=True)


def is_noise(key: str) -> bool:
    """Tell whether a gradient is zero in exact arithmetic: a key's bias moves all scores of a softmax alike."""
    return key.endswith("k_proj.bias")

"""All levers at once: the same step with and without them, and the plain layers where a library is not known."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dual_loop import accelerate
from dual_loop.accelerate.lora import FusedLora
from dual_loop.accelerate.qwen2 import TrimmedLayer
from dual_loop.accelerate.sam2 import LeanNeck
from dual_loop.config import Config, LoopConfig
from dual_loop.loop.task import DualLoopTask
from dual_loop.model.adapters import trainable_parameters

from small_model import scene_samples, small_batch, small_config, small_model

TESTS = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
HOOKS = ("run_language", "step_language")


def config_of(is_on: bool, dtype: str = "float32") -> Config:
    config = small_config(dtype=dtype, lora_dropout=0.0)
    return dataclasses.replace(config, speed=dataclasses.replace(config.speed, accelerate=is_on))


def step(is_on: bool, dtype: torch.dtype, autocast: bool = False) -> tuple[Any, dict[str, float], dict[str, Any]]:
    """Captions, losses and gradients of a micro-batch of three scenes, from the same weights either way."""
    model, prompter, config = small_model(config_of(is_on))
    with torch.no_grad():
        for module in (model.mllm.model.language_model, model.mllm.model.multi_modal_projector):
            for parameter in module.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(6.0 if not autocast else 1.0)
    model.to(dtype)
    batch = small_batch(config, scene_samples(3, captions=False))
    loop = LoopConfig(max_new_tokens=6, max_rejected_grace=10_000)
    task = DualLoopTask(model, prompter, dataclasses.replace(config, loop=loop))
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        [packed] = task.prepare([batch])
        output = task(packed)
        torch.stack([term.total for term in output.terms.values()]).sum().backward()
    terms = {name: float(term.total.detach()) for name, term in output.terms.items()}
    gradients = {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}
    assert len(gradients) > 20
    return [caption.token_ids for caption in packed.captions], terms, gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-2)])
def test_a_step_is_the_same_with_and_without(dtype: torch.dtype, tolerance: float) -> None:
    seen, expected = step(True, dtype), step(False, dtype)
    assert seen[0] == expected[0]
    assert len({tuple(ids) for ids in expected[0]}) > 2
    assert seen[1] == pytest.approx(expected[1], rel=1e-5)
    assert seen[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        difference = (seen[2][name] - gradient).abs().max()
        assert difference <= tolerance * gradient.abs().max().clamp_min(1e-6), name


def test_under_autocast_a_step_is_the_same_within_the_rounding_of_bfloat16() -> None:
    seen, expected = step(True, torch.float32, autocast=True), step(False, torch.float32, autocast=True)
    assert seen[1].keys() == expected[1].keys()
    assert seen[1] == pytest.approx(expected[1], rel=0.05)
    assert seen[2].keys() == expected[2].keys()
    one, other = (torch.cat([own[name].flatten() for name in expected[2]]) for own in (seen[2], expected[2]))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.99


def test_off_nothing_is_replaced() -> None:
    model, _, _ = small_model(config_of(False))
    assert not any(name in vars(model) for name in HOOKS)
    assert not {"encode", "finish", "level_width"} & vars(model.grounding).keys()
    assert not model.after_loading
    assert not any(isinstance(module, (FusedLora, TrimmedLayer, LeanNeck)) for module in model.modules())
    assert model.finish(torch.device("cpu")) == []


def test_a_copy_of_the_model_runs_on_its_own_weights() -> None:
    model, _, _ = small_model(config_of(True, dtype="bfloat16"))
    other = copy.deepcopy(model)
    assert all(getattr(other, name).__self__ is other for name in HOOKS)
    assert other.grounding.encode.__self__ is other.grounding
    assert other.grounding.sam is other.grounding_encoder


@pytest.mark.parametrize(
    ("library", "seen", "kept", "gone"),
    [
        ("transformers", "5.99.1", {FusedLora}, {TrimmedLayer, LeanNeck}),
        ("peft", "0.99.0.dev0", {TrimmedLayer, LeanNeck}, {FusedLora}),
    ],
)
def test_an_unknown_version_falls_back_with_one_warning_and_the_same_result(
    library: str,
    seen: str,
    kept: set[type],
    gone: set[type],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    known = accelerate.version
    monkeypatch.setattr(accelerate, "version", lambda name: seen if name == library else known(name))
    with caplog.at_level(logging.WARNING, logger="dual_loop"):
        model, _, _ = small_model(config_of(True))
    [record] = caplog.records
    first, last = {"transformers": ("5.20", "5.23"), "peft": ("0.21", "0.21")}[library]
    names = ["qwen2", "sam2", "cpu"] if library == "transformers" else ["lora"]
    assert all(part in record.getMessage() for part in (f"{library} {seen}", f"{first} to {last}", *names))
    classes = {type(module) for module in model.modules()}
    assert kept <= classes
    assert not gone & classes
    fallen_back, plain = step(True, torch.float64), step(False, torch.float64)
    assert fallen_back[0] == plain[0]
    assert fallen_back[1] == pytest.approx(plain[1], rel=1e-5)


def test_tested_versions_are_what_is_installed_and_what_packages_may_be() -> None:
    text = (TESTS.parent / "pyproject.toml").read_text(encoding="utf-8")
    for lever in accelerate.LEVERS:
        assert not accelerate._unknown_versions(lever)
        for library, (first, last) in lever.tested.items():
            major, minor = last.split(".")
            if library != "liger-kernel":
                assert f'"{library}>={first},<{major}.{int(minor) + 1}"' in text


def test_the_package_can_be_deleted() -> None:
    """In a process that cannot import it, a model is built and runs."""
    program = """
import sys
sys.modules["dual_loop.accelerate"] = None  # importing it raises ImportError
import dataclasses
import dual_loop.train_dual_loop, dual_loop.serve.predictor, dual_loop.preflight.machine
from small_model import small_config, small_model
config = small_config()
model, _, _ = small_model(dataclasses.replace(config, speed=dataclasses.replace(config.speed, accelerate=False)))
import torch
mask = torch.ones(1, 3, dtype=torch.bool)
assert model.run_language(torch.zeros(1, 3, 32), mask, None).shape == (1, 3, 32)
try:
    small_model(config)
except ImportError:
    print("gone")
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=TESTS, capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "gone"

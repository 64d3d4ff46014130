"""Compiled decoder layers: the losses and gradients of the plain ones, and one graph for rows of any length."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dual_loop.config import SpeedConfig
from dual_loop.loop.task import DualLoopTask

from small_model import scene_samples, small_batch, small_config, small_model

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture, share and differentiate graphs, and run them as they are: to generate code for them takes a minute."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda layer, **options: compile_module(layer, backend="aot_eager", **options)
    )


def gradients(compiled: bool, count: int, model: Any = None) -> tuple[dict[str, torch.Tensor], Any]:
    config = dataclasses.replace(small_config(), speed=SpeedConfig(compile=compiled))
    if model is None:
        model, _, _ = small_model(config)
        lines = model.finish(torch.device("cpu"))
        assert any("Compiling 2 decoder layers" in line for line in lines) == compiled
    _, prompter, _ = small_model(config)
    task = DualLoopTask(model.train(), prompter, config)
    model.zero_grad()
    (packed,) = task.prepare([small_batch(config, scene_samples(count))])
    torch.stack([term.total for term in task(packed).terms.values()]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, model


def test_compiled_layers_compute_the_same_and_share_a_graph() -> None:
    expected, _ = gradients(False, 2)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seen, model = gradients(True, 2)
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=1e-3, atol=1e-5)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert made > 0
    gradients(True, 3, model)  # other rows, of other lengths
    gradients(True, 1, model)
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert again <= made + 2, "every new length is compiled anew"

"""AdamW groups, the learning-rate schedule, and values that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from dual_loop.config import TrainConfig
from dual_loop.model.adapters import trainable_parameters
from dual_loop.training.optim import (
    NonFiniteError,
    build_optimizer,
    check_finite,
    gradient_norms,
    learning_rate_at,
)
from dual_loop.types import LossTerm

from loop_settings import build, masks_only, setting
from small_model import small_batch

NAN, INF = float("nan"), float("inf")


def test_only_matrices_decay() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(dict(layer.named_parameters()), TrainConfig(weight_decay=0.5, learning_rate=0.1))
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(layer.bias, before["bias"])
    torch.testing.assert_close(layer.weight, before["weight"] * (1 - 0.1 * 0.5))


def test_a_model_of_matrices_alone_has_one_group() -> None:
    parameters = {"w": torch.nn.Parameter(torch.ones(2, 2))}
    assert len(build_optimizer(parameters, TrainConfig()).param_groups) == 1


def test_schedule_by_hand() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_ratio=0.2, min_lr_ratio=0.1)
    rates = [learning_rate_at(step, 10, config) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 8))
    assert rates[6] == pytest.approx(expected)
    assert learning_rate_at(10, 10, config) == pytest.approx(0.1)


@given(
    total=st.integers(1, 500),
    warmup=st.floats(0, 1),
    floor=st.floats(0, 1),
    step=st.integers(0, 600),
)
def test_rate_stays_between_zero_and_peak(total: int, warmup: float, floor: float, step: int) -> None:
    config = TrainConfig(learning_rate=2.0, warmup_ratio=warmup, min_lr_ratio=floor)
    assert 0 <= learning_rate_at(step, total, config) <= 2.0 + 1e-12
    assert learning_rate_at(0, total, config) > 0


def test_finite_values_pass() -> None:
    check_finite(Accelerator(cpu=True), 1, [{"mask_loss": 1.0}], [["a"]], 2.0)


def test_the_term_the_micro_batch_and_its_regions_are_named() -> None:
    terms = [{"mask_loss": 1.0}, {"mask_loss": NAN, "llm_loss": INF}]
    with pytest.raises(NonFiniteError) as caught:
        check_finite(Accelerator(cpu=True), 7, terms, [["sav/a#0"], ["sa1b/b#1"]], NAN)
    message = str(caught.value)
    assert "step 7" in message
    assert "rank 0: mask_loss = nan, llm_loss = inf in micro-batch 1 (sa1b/b#1)" in message
    assert "sav/a#0" not in message


def test_a_wrong_gradient_alone_names_all_regions() -> None:
    with pytest.raises(NonFiniteError, match=r"gradient norm = inf.*r0, r1.*and 2 more"):
        check_finite(Accelerator(cpu=True), 1, [{}, {}], [["r0"], [f"r{i}" for i in range(1, 10)]], INF)


@pytest.mark.parametrize("gradient", ["none", "gumbel+grpo"])
@pytest.mark.usefixtures("precision")
def test_norms_of_terms_are_those_of_their_gradients_and_change_none(gradient: str) -> None:
    config = setting(gradient, kl_weight=0.1)
    model, task = build(config)
    batch, parameters = small_batch(config, masks_only(1)), trainable_parameters(model)

    def step(with_norms: bool) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        (packed,) = task.prepare([batch])
        terms = task(packed).terms
        found = gradient_norms(terms, parameters.values()) if with_norms else {}
        assert all(parameter.grad is None for parameter in parameters.values())
        torch.stack([term.mean for term in terms.values()]).sum().backward()
        left = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        model.zero_grad()
        return found, left

    (_, plain), (norms, audited) = step(False), step(True)
    assert plain.keys() == audited.keys()
    for name, gradient_of in plain.items():
        # Two threads add up rows of embeddings in any order.
        assert (audited[name] - gradient_of).norm() <= 1e-6 * gradient_of.norm(), name
    (packed,) = task.prepare([batch])
    for name in task(packed).terms:
        mean = task(packed).terms[name].mean
        mean.backward()
        gradients = [p.grad.flatten() for p in parameters.values() if p.grad is not None]
        expected = float(torch.cat(gradients).norm()) if packed.counts[name] else 0.0
        assert norms[f"grad_norm/{name}/sum"] == pytest.approx(expected, rel=1e-4)
        assert norms[f"grad_norm/{name}/count"] == float(packed.counts[name] > 0)
        model.zero_grad()


def test_a_term_without_items_has_no_norm() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    terms = {"a": LossTerm(parameter.sum() * 6, 2.0), "b": LossTerm(parameter.sum() * 0, torch.tensor(0.0))}
    norms = gradient_norms(terms, [parameter, torch.nn.Parameter(torch.ones(1))])
    assert norms["grad_norm/a/sum"] == pytest.approx(3 * 2**0.5)
    assert (norms["grad_norm/b/sum"], norms["grad_norm/b/count"]) == (0.0, 0.0)

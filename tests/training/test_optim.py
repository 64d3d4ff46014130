"""AdamW groups, the learning-rate schedule, and values that are not finite."""

from __future__ import annotations

import io
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
    load_optimizer,
    rate_factor,
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


def test_groups_have_their_rates() -> None:
    model, _ = build(setting())
    own = trainable_parameters(model)
    config = TrainConfig(learning_rate=1e-3, lr_lora=2e-3, lr_projector=3e-3, lr_decoder=4e-3, weight_decay=0.5)
    optimizer = build_optimizer(own, config)
    peaks = {name: group["peak"] for group in optimizer.param_groups for name in group["param_names"]}
    assert peaks.keys() == own.keys()
    expected = {"lora_": 2e-3, "multi_modal_projector": 3e-3, "text_hidden_fcs": 3e-3, "mask_decoder": 4e-3}
    assert peaks == {name: next((rate for part, rate in expected.items() if part in name), 1e-3) for name in own}
    decays = {n: group["weight_decay"] for group in optimizer.param_groups for n in group["param_names"]}
    assert decays == {name: 0.5 if own[name].ndim >= 2 else 0.0 for name in own}
    assert len(build_optimizer(own, TrainConfig()).param_groups) == 2


CLOSED_FORMS = {
    "cosine": lambda step: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 16)),
    "linear": lambda step: 0.1 + 0.9 * (1 - (step - 4) / 16),
    "constant": lambda step: 1.0,
    "wsd": lambda step: 1.0 if step < 14 else 0.1 + 0.9 * (1 - (step - 14) / 6),
}


@pytest.mark.parametrize("schedule", CLOSED_FORMS)
def test_twenty_steps_of_a_schedule(schedule: str) -> None:
    config = TrainConfig(lr_schedule=schedule, warmup_ratio=0.2, min_lr_ratio=0.1, decay_ratio=0.3)
    factors = [rate_factor(step, 20, config) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == pytest.approx([CLOSED_FORMS[schedule](step) for step in range(4, 20)], abs=1e-12)


@given(
    schedule=st.sampled_from(list(CLOSED_FORMS)),
    total=st.integers(1, 500),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    floor=st.floats(0, 1),
    step=st.integers(0, 600),
)
def test_a_rate_stays_between_zero_and_its_peak(
    schedule: str, total: int, warmup: float, decay: float, floor: float, step: int
) -> None:
    config = TrainConfig(lr_schedule=schedule, warmup_ratio=warmup, decay_ratio=decay, min_lr_ratio=floor)
    assert 0 <= rate_factor(step, total, config) <= 1 + 1e-12
    assert rate_factor(0, total, config) > 0


@pytest.mark.parametrize("has_names", [True, False])
def test_a_resumed_optimizer_takes_groups_and_rates_of_this_start_and_keeps_moments(has_names: bool) -> None:
    # In another order than their dimensions; names of a matrix and a vector that get rates of their own.
    lora, bias, fcs = "mllm.q_proj.lora_A.weight", "other.bias", "text_hidden_fcs.0.weight"
    weights = {bias: torch.ones(2), lora: torch.ones(2, 2), fcs: torch.ones(3, 2)}
    own = {name: torch.nn.Parameter(value) for name, value in weights.items()}
    first = build_optimizer(own, TrainConfig(learning_rate=0.1, betas=(0.8, 0.9)))
    for parameter in own.values():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    for number, name in enumerate(own):
        first.state[own[name]]["exp_avg"].fill_(number)
    state = first.state_dict()
    if not has_names:
        for group in state["param_groups"]:
            del group["param_names"], group["peak"]
    config = TrainConfig(learning_rate=0.2, lr_lora=0.4, weight_decay=0.3, betas=(0.7, 0.95))
    second = build_optimizer(own, config)
    load_optimizer(second, state, own)
    assert [float(second.state[own[name]]["exp_avg"].mean()) for name in own] == [0, 1, 2]
    assert {float(second.state[parameter]["step"]) for parameter in own.values()} == {1}
    groups = {tuple(group["param_names"]): group for group in second.param_groups}
    assert {names: group["peak"] for names, group in groups.items()} == {(lora,): 0.4, (fcs,): 0.2, (bias,): 0.2}
    assert {names: group["weight_decay"] for names, group in groups.items()} == {(lora,): 0.3, (fcs,): 0.3, (bias,): 0}
    assert {group["betas"] for group in second.param_groups} == {(0.7, 0.95)}


def test_moments_in_eight_bits_are_resumed_bit_for_bit() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra quantize)")
    config = TrainConfig(optimizer="adamw8bit", learning_rate=0.01)
    start = {"large": torch.randn(80, 80), "small": torch.randn(3)}

    def steps(optimizer: torch.optim.Optimizer, own: dict[str, torch.nn.Parameter], numbers: range) -> None:
        for number in numbers:
            for parameter in own.values():
                parameter.grad = parameter.detach() * 0.1 + torch.sin(torch.arange(parameter.numel()) + number).view_as(
                    parameter
                )
            optimizer.step()

    straight = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = build_optimizer(straight, config)
    steps(optimizer, straight, range(3))
    state = {name: parameter.detach().clone() for name, parameter in straight.items()}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    steps(optimizer, straight, range(3, 6))
    resumed = {name: torch.nn.Parameter(value) for name, value in state.items()}
    second = build_optimizer(resumed, config)
    load_optimizer(second, torch.load(file, weights_only=True), resumed)
    assert second.state[resumed["large"]]["state1"].dtype == torch.uint8
    steps(second, resumed, range(3, 6))
    assert all(torch.equal(straight[name], resumed[name]) for name in start)


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

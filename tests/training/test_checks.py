"""Non-finite values and memory that runs out stop a run, with their reasons."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from dual_loop.errors import EnvironmentProblem
from dual_loop.training.checks import NonFiniteError, check_finite, memory_errors_explained

NAN, INF = float("nan"), float("inf")


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


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate")]
)
def test_out_of_memory_says_which_flags_to_change(error: Exception) -> None:
    with pytest.raises(EnvironmentProblem) as caught, memory_errors_explained(3):
        raise error
    for word in ("--batch_size", "--regions_per_image", "model.gradient_checkpointing=True", "loop.max_new_tokens"):
        assert word in str(caught.value)
    assert "loop.rollout_batch_size" in str(caught.value)


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_errors_explained(3):
        raise RuntimeError("shape")

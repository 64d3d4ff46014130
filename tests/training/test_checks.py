"""The guards: non-finite values, memory, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from dual_loop.errors import EnvironmentProblem
from dual_loop.training import checks
from dual_loop.training.checks import (
    NonFiniteError,
    StopRequest,
    check_finite,
    find_non_finite,
    memory_errors_explained,
)

NAN, INF = float("nan"), float("inf")


def test_finite_values_pass() -> None:
    assert find_non_finite([{"mask_loss": 1.0}], [["a"]]) == []
    check_finite(Accelerator(cpu=True), 1, [], 2.0, ["a"])


def test_the_term_the_micro_batch_and_its_regions_are_named() -> None:
    problems = find_non_finite([{"mask_loss": 1.0}, {"mask_loss": NAN, "llm_loss": INF}], [["sav/a#0"], ["sa1b/b#1"]])
    with pytest.raises(NonFiniteError) as caught:
        check_finite(Accelerator(cpu=True), 7, problems, NAN, ["sav/a#0", "sa1b/b#1"])
    message = str(caught.value)
    assert "step 7" in message
    assert "rank 0: mask_loss = nan, llm_loss = inf in micro-batch 1 (sa1b/b#1)" in message
    assert "sav/a#0" not in message


def test_a_wrong_gradient_alone_names_all_regions() -> None:
    with pytest.raises(NonFiniteError, match=r"gradient norm = inf.*r0, r1.*and 2 more"):
        check_finite(Accelerator(cpu=True), 1, [], INF, [f"r{i}" for i in range(10)])


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal_name == number.name
        os.kill(os.getpid(), number)  # at once: the launcher repeats what the terminal said
    assert signal.getsignal(number) is before


def test_a_second_signal_leaves_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from dual_loop.training import checks\n"
        "checks.SAME_WISH_SECONDS = 0.05\n"
        "with checks.StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM


def test_gathering_in_one_process_keeps_the_value() -> None:
    assert checks.gather_objects(Accelerator(cpu=True), ["x"]) == [["x"]]

"""What the processor says of itself, and what Liger would lack."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dual_loop.model import hardware


@pytest.mark.parametrize(
    ("machine", "capabilities", "kernels", "native"),
    [
        ("x86_64", {"avx512_bf16": True}, False, True),
        ("AMD64", {"amx_bf16": True}, False, True),
        ("x86_64", {}, True, False),
        ("aarch64", {}, True, True),
        ("aarch64", {"avx512_bf16": True}, False, False),
    ],
)
def test_bfloat16_is_native_by_the_processors_own_word(
    machine: str, capabilities: dict[str, bool], kernels: bool, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    monkeypatch.setattr(hardware, "has_bfloat16_kernels", lambda: kernels)
    assert hardware.has_native_bfloat16() is native


def test_liger_wants_its_packages_and_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else object())
    assert hardware.why_no_liger("cuda") == "the package triton is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "not on a cpu" in str(hardware.why_no_liger("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert hardware.why_no_liger("cpu") is None


def test_sizes_of_a_gpu_are_few_and_those_of_a_cpu_exact():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [hardware.round_rows(count, gpu) for count in (1, 8, 9, 33, 160, 161)] == [8, 8, 32, 64, 160, 161]
    assert [hardware.round_columns(count, gpu) for count in (0, 1, 64, 65)] == [0, 64, 64, 128]
    assert (hardware.round_rows(9, cpu), hardware.round_columns(65, cpu)) == (9, 65)

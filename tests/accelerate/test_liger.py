"""Liger behind its flag: which head takes the fused loss, the same numbers, and a clear refusal without it.

What is said of Liger's own kernels here is said of Triton's interpreter on a CPU; nothing is measured on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dual_loop.accelerate import liger
from dual_loop.accelerate.liger import fused_token_cross_entropy
from dual_loop.errors import EnvironmentProblem
from dual_loop.model.hardware import why_no_liger

from small_model import small_config, small_model

TESTS = Path(__file__).resolve().parent.parent
HAS_LIGER = all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))

OWN_KERNELS = """
import torch
from dual_loop.accelerate.liger import apply_liger
from small_model import small_model
from test_liger import config_of, language_step

plain, _, _ = small_model(config_of("none"))
patched, _, _ = small_model(config_of("none"))
line = apply_liger(patched, "cpu", kernels=("rope",))
assert line.endswith("cross-entropy fused with the head"), line
assert "Liger" in type(patched.token_loss.args[0]).__name__
total, gradients = language_step(patched)
# The rotary embedding is replaced for the whole process, so the plain model has it too.
expected_total, expected = language_step(plain)
torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=1e-5)
for name, gradient in expected.items():
    scale = float(gradient.abs().max())
    assert float((gradients[name] - gradient).abs().max()) <= 1e-4 * max(scale, 1e-6), name
from liger_kernel.transformers.rope import liger_rotary_pos_emb
from transformers.models.qwen2 import modeling_qwen2
assert modeling_qwen2.apply_rotary_pos_emb is liger_rotary_pos_emb
torch.save(total.detach(), "total.pt")
print("kernels agree")
"""


def config_of(train_embeddings: str) -> Any:
    return small_config(train_embeddings=train_embeddings, lora_dropout=0.0)


def language_step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The token loss of packed rows with positions of their own, and the gradients of all that trains."""
    generator = torch.Generator().manual_seed(3)
    width = model.mllm.config.text_config.hidden_size
    embeds = torch.randn(2, 9, width, generator=generator)
    labels = torch.randint(0, 50, (2, 9), generator=generator)
    labels[:, :4] = -100
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]])
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    model.train()
    carries = labels[:, 1:] != -100
    total = model.token_loss(model.run_language(embeds, mask, positions)[:, :-1][carries], labels[:, 1:][carries])
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 20
    return total, gradients


def stand_in(matrix: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The signature of ``LigerFusedLinearCrossEntropyLoss(reduction="sum")`` on plain operations."""
    return F.cross_entropy(hidden @ matrix.t(), labels, ignore_index=-100, reduction="sum")


def test_a_stand_in_of_ligers_signature_gives_the_same_loss_and_gradients() -> None:
    model, _, _ = small_model(config_of("none"))
    expected_total, expected = language_step(model)
    model.zero_grad()
    calls = []

    def counted(*args: torch.Tensor) -> torch.Tensor:
        calls.append([tuple(arg.shape) for arg in args])
        return stand_in(*args)

    assert liger.use_fused_loss(model, counted) is None
    total, gradients = language_step(model)
    vocabulary, width = model.mllm.lm_head.weight.shape
    assert calls == [[(vocabulary, width), (10, width), (10,)]]
    torch.testing.assert_close(total, expected_total, rtol=1e-6, atol=0.0)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_head_with_trained_rows_keeps_its_own_loss() -> None:
    model, _, _ = small_model(config_of("new_tokens"))
    assert "new tokens" in str(liger.use_fused_loss(model, stand_in))
    assert "token_loss" not in vars(model)
    model, _, _ = small_model(config_of("none"))
    model.mllm.lm_head = torch.nn.Sequential(model.mllm.lm_head)
    assert "Sequential" in str(liger.use_fused_loss(model, stand_in))


def test_no_token_gives_a_zero_with_graph_and_never_asks_the_kernel() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    total = fused_token_cross_entropy(lambda *_: pytest.fail("asked"), torch.zeros(9, 4), hidden, torch.zeros(0).long())
    assert float(total.detach()) == 0.0
    total.backward()
    assert hidden.grad is not None


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = small_model(config_of("none"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"liger_kernel is not installed.*dual-loop\[liger\]"):
        liger.apply_liger(model, "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(EnvironmentProblem, match="run on GPUs"):
        liger.apply_liger(model, "cpu")
    assert why_no_liger("cuda") is None


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIGER, reason="liger-kernel and triton are not installed (extra liger)")
def test_ligers_own_loss_and_rotary_kernels_agree_in_tritons_interpreter(tmp_path: Path) -> None:
    paths = [str(TESTS), str(TESTS / "accelerate"), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", OWN_KERNELS]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "kernels agree" in run.stdout
    # Against a process that never saw Liger: the rotary embedding too.
    model, _, _ = small_model(config_of("none"))
    total, _ = language_step(model)
    torch.testing.assert_close(
        torch.load(tmp_path / "total.pt", weights_only=True), total.detach(), rtol=1e-5, atol=1e-5
    )

"""The dry run: parameter counts, effective batch, memory."""

from __future__ import annotations

import re

import pytest

from dual_loop.config import load_config, resolve_config_path
from dual_loop.errors import CheckpointError
from dual_loop.preflight.dry_run import PlaceholderTokenizer, dry_run


def _report(monkeypatch: pytest.MonkeyPatch, name: str, world_size: int, **overrides: object) -> str:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    return dry_run(load_config(resolve_config_path(name), {key.replace("__", "."): v for key, v in overrides.items()}))


@pytest.mark.slow
def test_the_real_size_has_the_published_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    report = _report(monkeypatch, "sa2va_4b_full", 8)
    assert "(3.7 B)" in report
    lora = re.search(r"LoRA parameters: ([\d,]+)", report)
    assert lora is not None
    assert 235e6 < int(lora.group(1).replace(",", "")) < 245e6
    assert "effective batch: 64 = 8 processes x 2 images x 4 micro-batches" in report
    assert "DDP buckets" in report
    assert "formula" in report


def _gib(report: str, name: str) -> float:
    found = re.search(re.escape(name) + r"\s+([\d.]+)\n", report)
    assert found is not None, name
    return float(found.group(1))


@pytest.mark.slow
def test_memory_follows_the_batch_and_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    activations = [
        _gib(_report(monkeypatch, "sa2va_4b_full", 1, **overrides), "activations (language)")
        for overrides in ({}, {"train__batch_size": 8}, {"model__gradient_checkpointing": False})
    ]
    assert activations[1] == pytest.approx(4 * activations[0], rel=0.05)
    assert activations[2] > 2 * activations[0]


def test_placeholder_has_the_released_ids() -> None:
    tokenizer = PlaceholderTokenizer(151679)
    assert len(tokenizer) == 151679
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == 151667
    assert tokenizer.convert_tokens_to_ids("[SEG]") == 151674
    assert tokenizer.convert_tokens_to_ids("</vp>") == 151678


def test_without_tokenizer_and_vocabulary_size_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        _report(monkeypatch, "tiny_cpu", 1, model__tokenizer="nowhere")

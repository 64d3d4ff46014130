"""The machine: precision, memory, disk."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dual_loop.config import CONFIG_DIR, Config, load_config, resolve_config_path
from dual_loop.preflight import machine
from dual_loop.preflight.findings import OK, PROBLEM, WARNING


def config_of(**changes: object) -> Config:
    config = load_config(resolve_config_path("tiny_cpu"))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def test_bf16_that_would_be_emulated_stops_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_native_bfloat16", lambda: False)
    config = config_of(mixed_precision="bf16", device="cpu")
    [finding] = machine.check_precision(config)
    assert finding.level == PROBLEM
    assert "--mixed_precision no" in finding.fix
    allowed = config_of(mixed_precision="bf16", device="cpu", allow_emulated_bf16=True)
    assert [f.level for f in machine.check_precision(allowed)] == [WARNING]
    assert [f.level for f in machine.check_precision(config_of(device="cpu"))] == [OK]


def test_no_space_and_no_write_access(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = torch.nn.Linear(1000, 1000)
    config = config_of(output_dir=str(tmp_path / "a" / "b"))
    assert [f.level for f in machine.check_output(config, model)] == [OK, OK]
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    levels = [finding.level for finding in machine.check_output(config, model)]
    assert levels == [OK, PROBLEM]
    (tmp_path / "file").write_text("x")
    [finding] = machine.check_output(config_of(output_dir=str(tmp_path / "file" / "run")))
    assert finding.level == PROBLEM


def test_memory_names_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(CONFIG_DIR / "sa2va_4b_full.py", {"train.device": "cpu"})
    monkeypatch.setattr(machine, "free_memory", lambda *_: 23 * machine.GIB)
    large = torch.nn.Linear(2000, 2000, device="meta")
    monkeypatch.setattr(machine, "estimate_memory", lambda *_: (SimpleNamespace(total=60 * machine.GIB), None))
    [finding] = machine.check_memory(config, large)
    assert finding.level == WARNING
    assert finding.fix == "--config sa2va_4b_24gb"
    monkeypatch.setattr(machine, "estimate_memory", lambda *_: (SimpleNamespace(total=10 * machine.GIB), None))
    [finding] = machine.check_memory(config, large)
    assert finding.level == OK

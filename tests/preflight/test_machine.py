"""The machine: precision, memory, disk."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dual_loop.config import CONFIG_DIR, Config, load_config, resolve_config_path
from dual_loop.errors import EnvironmentProblem
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


def test_fp16_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    half = dataclasses.replace(config_of().model, dtype="float16")
    for config in (config_of(mixed_precision="fp16"), dataclasses.replace(config_of(), model=half)):
        monkeypatch.setattr(machine, "device_type", lambda config: "cpu")
        [finding] = machine.check_precision(config)
        assert (finding.level, "there is none" in finding.what) == (PROBLEM, True)
        monkeypatch.setattr(machine, "device_type", lambda config: "cuda")
        assert [finding.level for finding in machine.check_precision(config)] == [OK]


@pytest.mark.parametrize("flags", [{"model.quantize": "nf4"}, {"train.optimizer": "adamw8bit"}])
def test_packed_numbers_are_refused_on_a_cpu_with_the_reason(flags: dict[str, str], tmp_path: Path) -> None:
    config = load_config(resolve_config_path("tiny_cpu"), {**flags, "train.output_dir": str(tmp_path / "run")})
    with pytest.raises(
        EnvironmentProblem, match=f"{next(iter(flags.values()))}: bitsandbytes saves a GPU's memory, and"
    ):
        machine.require_ready(config)


def test_packed_numbers_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_type", lambda config: "cuda")
    config = load_config(resolve_config_path("sa2va_4b_12gb"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = [finding for finding in machine.check_kernels(config) if finding.level == PROBLEM]
    assert ["is not installed" in finding.what for finding in found] == [True, True]
    assert ['"dual-loop[quantize]"' in finding.fix for finding in found] == [True, True]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert not [finding for finding in machine.check_kernels(config) if finding.level == PROBLEM]


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


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_the_memory_of_every_visible_gpu_is_compared(monkeypatch: pytest.MonkeyPatch, two_gpus: None) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda _, device: (70, 5)[device.index] * machine.GIB)
    monkeypatch.setattr(machine, "estimate_memory", lambda *_: (SimpleNamespace(total=20 * machine.GIB), None))
    first, second = machine.check_memory(config_of(device="auto"), torch.nn.Linear(1, 1))
    assert (first.level, second.level) == (OK, WARNING)
    assert "70.0 GiB free on GPU 0" in first.what
    assert "5.0 GiB free on GPU 1" in second.what


def test_processes_talk_over_what_ranks_will_use(monkeypatch: pytest.MonkeyPatch, two_gpus: None) -> None:
    started = []

    def start(command: list[str], **_: object) -> SimpleNamespace:
        started.append((command[3:5], command[6]))
        return SimpleNamespace(returncode=0, communicate=lambda timeout: ("", ""))

    monkeypatch.setattr(machine.subprocess, "Popen", start)
    [finding] = machine.check_all_reduce(config_of(device="auto"))
    assert started == [(["0", "2"], "nccl"), (["1", "2"], "nccl")]
    assert (finding.level, finding.what) == (OK, "2 process(es) added a number over nccl")
    [finding] = machine.check_all_reduce(config_of(device="cpu"))
    assert finding.what == "2 process(es) added a number over gloo"


@pytest.mark.slow
def test_two_processes_add_a_number_here() -> None:
    [finding] = machine.check_all_reduce(config_of(device="cpu"))
    assert (finding.level, finding.what) == (OK, "2 process(es) added a number over gloo")


def test_a_device_of_another_kind_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert [f for f in machine.check_device(config_of(device="auto")) if f.level == PROBLEM and "mps" in f.what]
    assert not [f for f in machine.check_device(config_of(device="cpu")) if f.level == PROBLEM]


def test_a_folder_of_other_things_is_no_run_folder(tmp_path):
    def levels():
        return [(f.level, f.what) for f in machine.check_output(config_of(output_dir=str(tmp_path)))][1:]

    (tmp_path / "train.log").write_text("")
    (tmp_path / ".hidden").write_text("")
    (tmp_path / "run.lock").write_text("of another rank")
    assert levels() == []
    model = {"model_type": "sa2va", "architectures": ["Sa2VAChatModel"]}
    (tmp_path / "config.json").write_text(json.dumps(model))
    (tmp_path / "model.safetensors").write_text("")
    [(level, what)] = levels()
    assert level == PROBLEM
    assert "config.json, model.safetensors" in what
    (tmp_path / "config.json").write_text(json.dumps(Config().to_dict()))
    assert levels() == [], "a run of ours"
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert levels()

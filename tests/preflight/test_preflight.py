"""What the checks before a training find, one by one."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dual_loop.config import CONFIG_DIR, Config, load_config, resolve_config_path
from dual_loop.errors import EnvironmentProblem
from dual_loop.preflight import data_checks, machine, model_checks
from dual_loop.preflight.findings import OK, PROBLEM, WARNING, Finding, as_dict, as_text
from dual_loop.preflight.preview import preview_page
from dual_loop.testing.demo_data import write_demo_data


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preflight") / "demo"
    write_demo_data(root, 6, 9, num_val=4)
    return root


def flags(demo: Path) -> list[str]:
    folders = {"--sa1b_dir": "sa1b", "--sav_dir": "sav", "--openimage_dir": "openimages", "--refcoco_dir": "ref_seg"}
    given = [part for flag, name in folders.items() for part in (flag, str(demo / name))]
    return [*given, "--cfg-options", f"data.index_dir={demo.parent / 'index'}"]


def config_of(**changes: object) -> Config:
    config = load_config(resolve_config_path("tiny_cpu"))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def test_findings_as_text_and_json() -> None:
    findings = [Finding(OK, "a", "fine"), Finding(PROBLEM, "b", "broken", "mend it"), Finding(WARNING, "a", "odd")]
    assert as_text(findings) == "a\n  ✓ fine\n  ! odd\nb\n  ✗ broken; to do: mend it"
    assert as_dict(findings)["counts"] == {"ok": 1, "note": 0, "warning": 1, "problem": 1}


def test_captions_are_asked_for_where_a_reward_needs_them(demo: Path) -> None:
    config = load_config(resolve_config_path("tiny_cpu"), {"reward.caption_weight": 0.1, "data.sa1b_dir": "x"})
    [finding] = data_checks.check_captions(config)
    assert finding.level == PROBLEM
    assert "--refcoco_dir" in finding.fix
    with pytest.raises(EnvironmentProblem, match="caption reward is on"):
        machine.require_ready(config)


def test_bf16_that_would_be_emulated_stops_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_bf16", lambda device_type: False)
    config = config_of(mixed_precision="bf16", device="cpu")
    [finding] = machine.check_precision(config)
    assert finding.level == PROBLEM
    assert "--mixed_precision no" in finding.fix
    allowed = config_of(mixed_precision="bf16", device="cpu", allow_emulated_bf16=True)
    assert [f.level for f in machine.check_precision(allowed)] == [WARNING]
    assert [f.level for f in machine.check_precision(config_of(device="cpu"))] == [OK]


def test_no_space_and_no_write_access(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

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
    import torch

    config = load_config(CONFIG_DIR / "sa2va_4b_full.py", {"train.device": "cpu"})
    monkeypatch.setattr(machine, "_ram", lambda: (24 * machine.GIB, 23 * machine.GIB))
    large = torch.nn.Linear(2000, 2000, device="meta")
    monkeypatch.setattr(machine, "estimate_memory", lambda *_: (SimpleNamespace(total=60 * machine.GIB), None))
    [finding] = machine.check_memory(config, large)
    assert finding.level == WARNING
    assert finding.fix == "--config sa2va_4b_24gb"
    monkeypatch.setattr(machine, "estimate_memory", lambda *_: (SimpleNamespace(total=10 * machine.GIB), None))
    [finding] = machine.check_memory(config, large)
    assert finding.level == OK


def test_weights_and_tokens(tmp_path: Path) -> None:
    assert [f.level for f in model_checks.check_tokens(config_of())] == [OK]
    assert [f.level for f in model_checks.check_weights(config_of())] == [OK]
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    [finding] = model_checks.check_weights(config_of(pretrained_pth=str(tmp_path / "bad.pth")))
    assert finding.level == PROBLEM
    config = config_of()
    nowhere = dataclasses.replace(config, model=dataclasses.replace(config.model, tokenizer=str(tmp_path / "none")))
    [finding] = model_checks.check_tokens(nowhere)
    assert finding.level == PROBLEM


def test_the_preview_shows_what_is_skipped(demo: Path, tmp_path: Path) -> None:
    from dual_loop.data.sa1b import Sa1b
    from dual_loop.model.build import geometry

    folder = tmp_path / "sa1b"
    shutil.copytree(demo / "sa1b", folder)
    sorted(folder.rglob("*.json"))[0].write_text("{")
    source = Sa1b(folder, index_dir=tmp_path / "index")
    page = preview_page([source], 6, geometry(config_of()), 0)
    assert "is skipped (broken_json)" in page


def test_expected_counts_of_the_release() -> None:
    class Fake:
        pass

    from dual_loop.data.refcoco import RefCoco

    source = RefCoco.__new__(RefCoco)
    source.split_counts = lambda: {"refcoco": {"val": (1500, 3811), "testA": (1, 2)}}  # type: ignore[method-assign]
    first, second = data_checks.expected_counts(source)
    assert (first.level, second.level) == (OK, "note")
    assert "as released" in first.what
    assert "the release has 1,975" in second.what
    assert list(data_checks.expected_counts(Fake())) == []  # type: ignore[arg-type]


def test_reading_measures_what_is_there(demo: Path) -> None:
    from dual_loop.data.sa1b import Sa1b
    from dual_loop.model.build import geometry

    source = Sa1b(demo / "sa1b", regions_per_image=9, index_dir=demo.parent / "index")
    report = data_checks.read_source(source, None, geometry(config_of()))
    assert (report.entries, report.read, report.good) == (6, 6, 6)
    assert sum(report.regions) == len(report.areas) == len(report.captions)
    assert all(0 < area < 1 for area in report.areas)
    assert np.all(np.array(report.captions) == 0)

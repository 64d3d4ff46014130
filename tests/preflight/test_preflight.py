"""doctor and data check, stats, preview: what they find, how they exit, and what comes before every training."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dual_loop.cli import main
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


@pytest.mark.slow
def test_doctor_on_a_run_that_can_start(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["doctor", "--json", "--device", "cpu", "--output_dir", str(tmp_path / "run"), *flags(demo)]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["counts"]["problem"] == 0
    told = {finding["area"] for finding in result["findings"]}
    expected = {"versions", "device", "data", "leakage", "captions", "tokens", "weights", "memory", "run folder"}
    assert expected | {"what trains", "processes", "one batch", "config"} <= told
    batches = [finding["what"] for finding in result["findings"] if finding["area"] == "one batch"]
    assert [text.split(":")[0] for text in batches] == ["sav", "sa1b", "openimages", "refcoco"]
    assert not (tmp_path / "run").exists(), "a doctor leaves nothing behind"


def test_doctor_names_every_broken_root_at_once(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "sa1b"
    shutil.copytree(demo / "sa1b", broken)
    for path in broken.rglob("*.json"):
        path.write_text("{")
    (tmp_path / "empty").mkdir()
    arguments = ["--sa1b_dir", str(broken), "--sav_dir", str(tmp_path / "empty"), "--quick"]
    arguments += ["--refcoco_dir", str(tmp_path / "nowhere"), "--cfg-options", f"data.index_dir={tmp_path / 'index'}"]
    assert main(["doctor", *arguments]) == 1
    text = capsys.readouterr().out
    assert "broken_json 6" in text
    assert "holds no frame pair" in text
    assert "no such folder" in text
    assert "problem(s) would stop this run" in text


def test_doctor_reports_a_wrong_config_as_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--cfg-options", "loop.max_new_token=3"]) == 1
    assert "did you mean loop.max_new_tokens" in capsys.readouterr().out


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


def test_data_check_counts_reasons_and_exits_by_them(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", *flags(demo)]) == 0
    assert "no problem was found" in capsys.readouterr().out
    broken = tmp_path / "sa1b"
    shutil.copytree(demo / "sa1b", broken)
    victim = sorted(broken.rglob("*.jpg"))[0]
    victim.write_bytes(victim.read_bytes()[:200])
    options = ["--cfg-options", f"data.index_dir={tmp_path / 'index'}"]
    assert main(["data", "check", "--json", "--sa1b_dir", str(broken), *options]) == 1
    result = json.loads(capsys.readouterr().out)
    [finding] = [f for f in result["findings"] if f["level"] == "problem"]
    assert "5 of 6 read are good (truncated_file 1)" in finding["what"]


def test_data_check_refuses_a_renamed_held_out_image(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An SA-1B-style set with a RefCOCO val image under another name, smaller and compressed again."""
    from dual_loop.data.leakage import held_out_of

    data = load_config(resolve_config_path("tiny_cpu"), {"data.refcoco_dir": str(demo / "ref_seg")}).data
    victim = next(i for i in held_out_of(data).values() if i.split == "refcoco val")
    folder = tmp_path / "sa1b"
    shutil.copytree(demo / "sa1b", folder)
    target = sorted(folder.rglob("*.jpg"))[0]
    size = Image.open(target).size
    assert victim.path is not None
    Image.open(victim.path).resize(size).save(target, quality=55)
    base = ["data", "check", "--sa1b_dir", str(folder), "--refcoco_dir", str(demo / "ref_seg")]
    options = ["--cfg-options", f"data.index_dir={tmp_path / 'index'}"]
    assert main([*base, "--json", *options]) == 1
    result = json.loads(capsys.readouterr().out)
    [leak] = result["leaks"]
    assert leak["entry"].endswith(target.stem)
    assert f"COCO image {victim.coco_id} of refcoco val (found by sight)" in leak["message"]
    assert main([*base, "--ids_only", *options]) == 0, "its name tells nothing"


def test_stats_and_preview(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", "--json", *flags(demo)]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["sa1b"]["entries"] == 6
    assert stats["refcoco"]["captioned regions"].split(" of ")[0] != "0"
    assert stats["sav"]["captioned regions"] == "0 of 6"
    out = tmp_path / "page.html"
    assert main(["data", "preview", "--samples", "2", "--out", str(out), *flags(demo)]) == 0
    page = out.read_text()
    assert page.count("<figure>") == 8
    assert page.count("data:image/jpeg") == 24
    assert "frame pair" in page
    assert "step 1 writes it" in page


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

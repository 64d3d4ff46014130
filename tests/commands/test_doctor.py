"""``dual-loop doctor``: what it finds and how it exits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dual_loop.cli import main


@pytest.mark.slow
def test_doctor_on_a_run_that_can_start(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["doctor", "--json", "--device", "cpu", "--output_dir", str(tmp_path / "run"), *flags]
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

"""The experiment's own parts: arms are valid configurations, the table is right, finished runs are not run again."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from dual_loop.config import add_training_flags, load_config, overrides_from, resolve_config_path

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from experiments import label_scarce, table  # noqa: E402
from experiments.arms import ARMS  # noqa: E402

from warm_python import warm_python  # noqa: E402


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_valid_configuration(arm, tmp_path):
    parser = argparse.ArgumentParser()
    add_training_flags(parser)
    args = parser.parse_args(label_scarce.arm_arguments(arm, 3, tmp_path, 7))
    config = load_config(resolve_config_path(args.config), overrides_from(args))
    assert (config.train.max_steps, config.train.seed, config.train.batch_size) == (7, 3, 8)
    assert (config.data.sa1b_dir is None) == (ARMS[arm].data != "masks")


def summary(giou: float, flags=(), steps: int = 5) -> dict:
    figures = dict.fromkeys(table.FIGURES, 0.5)
    measured = {"before": figures, "after": {**figures, "gIoU": giou}}
    return {"steps": steps, "seconds": 10.0, "flags": list(flags), **measured}


def write(out: Path, name: str, content: dict) -> None:
    folder = out / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "summary.json").write_text(json.dumps(content))
    (folder / "versions.json").write_text(json.dumps({"git_commit": "abcdef0123456789", "packages": {"torch": "2"}}))


def test_table_from_summaries(tmp_path):
    for seed, value in enumerate((0.40, 0.42, 0.44)):
        write(tmp_path, f"A_s{seed}", summary(value))
    write(tmp_path, "Z_s0", summary(0.52))
    write(tmp_path, "B_s0", summary(0.50, ["private_code: ..."]))
    (tmp_path / "E_s0").mkdir()
    (tmp_path / "E_s0" / "config.json").write_text("{}")
    text = label_scarce.write_table(tmp_path)
    rows = {row["arm"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert rows["A"]["gIoU"] == pytest.approx([0.42, 4.303 * 0.02 / 3**0.5])
    assert rows["B"]["gap"] == pytest.approx(0.8)
    assert (rows["A"]["gap"], rows["Z"]["gap"]) == (0.0, 1.0)
    assert rows["E"]["failed"] == [0]
    assert "FAILED: seed 0" in text
    assert "42.0 ± 5.0" in text
    assert "80%" in text
    assert "private_code" in text
    assert "abcdef012345" in text


def test_finished_runs_are_not_run_again(tmp_path):
    write(tmp_path, "A_s0", summary(0.4))
    assert label_scarce.is_done(tmp_path / "A_s0", 5)
    assert not label_scarce.is_done(tmp_path / "A_s0", 6)
    assert not label_scarce.is_done(tmp_path / "B_s0", 5)
    stopped = summary(0.4)
    del stopped["after"]
    write(tmp_path, "C_s0", stopped)
    assert not label_scarce.is_done(tmp_path / "C_s0", 5)


@pytest.mark.slow
def test_two_arms_end_to_end(tmp_path, monkeypatch, capsys):
    sizes = ["--steps", "2", "--captioned", "3", "--scenes", "4", "--val", "3", "--jobs", "1"]
    monkeypatch.setattr(sys, "executable", warm_python())  # of the runs that it starts
    monkeypatch.setattr(sys, "argv", ["label_scarce.py", str(tmp_path), "--arms", "A", "D2", *sizes])
    assert label_scarce.main() == 0
    first = capsys.readouterr().out
    assert "A_s0: done" in first
    assert "D2_s0: done" in first
    assert "| D2 | B + grpo | 1 |" in first
    assert label_scarce.main() == 0
    assert "done" not in capsys.readouterr().out.replace(str(tmp_path), "")

"""What a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dual_loop.errors import CheckpointError, ConfigError
from dual_loop.training.run_folder import RunFolder, flatten, truncate_metrics, versions


def _open(path: Path, resuming: bool = False, step: int = 0) -> RunFolder:
    folder = RunFolder(path)
    folder.create({"train": {"seed": 1}}, {"device": "cpu"}, resuming)
    folder.open_logs(step)
    return folder


def test_a_new_folder_gets_config_versions_and_records(tmp_path: Path) -> None:
    folder = _open(tmp_path / "run")
    folder.log({"step": 1, "loss": 2.0, "seconds": {"data": 0.5}, "cycle_iou": None})
    folder.close()
    assert json.loads((tmp_path / "run/config.json").read_text()) == {"train": {"seed": 1}}
    assert json.loads((tmp_path / "run/versions.json").read_text())["device"] == "cpu"
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["loss"] == 2.0
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.value for event in events.Scalars("seconds/data")] == [0.5]


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("unrelated")
    _open(tmp_path).close()
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="--resume auto"):
        _open(tmp_path)
    _open(tmp_path, resuming=True).close()


def test_resuming_drops_the_records_that_will_be_done_again(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    for step in range(1, 6):
        folder.log({"step": step, "loss": float(step)})
    folder.close()
    again = _open(tmp_path, resuming=True, step=3)
    again.log({"step": 4, "loss": 40.0})
    again.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["loss"] == 40.0


def test_an_unfinished_last_line_is_dropped_but_one_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    truncate_metrics(path, 5)
    assert path.read_text() == '{"step": 1}\n'
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match="line 1"):
        truncate_metrics(path, 5)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", writes=False)
    folder.create({}, {}, False)
    folder.open_logs(0)
    folder.log({"step": 1})
    folder.write_summary({})
    folder.close()
    assert not (tmp_path / "run").exists()


def test_evaluations_come_back(tmp_path: Path) -> None:
    folder = _open(tmp_path)
    assert folder.read_evaluation("before") is None
    folder.write_evaluation("before", {"gIoU": 0.5, "ious": [0.5]})
    assert folder.read_evaluation("before") == {"gIoU": 0.5, "ious": [0.5]}
    folder.close()


def test_flatten_keeps_numbers_alone() -> None:
    assert flatten({"a": 1, "b": {"c": 2.5, "d": None}, "e": "x", "f": True}) == {"a": 1.0, "b/c": 2.5}


def test_versions_name_torch() -> None:
    assert versions()["packages"]["torch"][0].isdigit()

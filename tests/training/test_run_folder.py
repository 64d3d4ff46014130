"""What a run leaves behind."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from dual_loop.checkpoint.store import save_run_checkpoint
from dual_loop.errors import CheckpointError, ConfigError, EnvironmentProblem
from dual_loop.training.run_folder import RunFolder, fill_parameters, find_checkpoint, truncate_metrics, versions


def _create(path: Path, resuming: bool = False) -> RunFolder:
    folder = RunFolder(path)
    folder.create({"train": {"seed": 1}}, {"device": "cpu"}, resuming)
    return folder


def test_a_new_folder_gets_config_and_versions(tmp_path: Path) -> None:
    _create(tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text()) == {"train": {"seed": 1}}
    assert json.loads((tmp_path / "run/versions.json").read_text())["device"] == "cpu"


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("unrelated")
    _create(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="--resume auto"):
        _create(tmp_path)
    _create(tmp_path, resuming=True)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", writes=False)
    folder.create({}, {}, False)
    folder.write("summary", {})
    assert not (tmp_path / "run").exists()


def test_documents_come_back(tmp_path: Path) -> None:
    folder = _create(tmp_path)
    assert folder.read("evaluation_before") is None
    folder.write("evaluation_before", {"gIoU": 0.5, "ious": [0.5]})
    assert folder.read("evaluation_before") == {"gIoU": 0.5, "ious": [0.5]}
    (tmp_path / "evaluation_before.json").write_text('{"gIoU": 0.')
    with pytest.raises(CheckpointError, match="evaluation_before"):
        folder.read("evaluation_before")


def test_versions_name_torch() -> None:
    assert versions()["packages"]["torch"][0].isdigit()


def test_an_unfinished_last_line_is_dropped_but_one_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    truncate_metrics(path, 5)
    assert path.read_text() == '{"step": 1}\n'
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match="line 1"):
        truncate_metrics(path, 5)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "dtype"])
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(fault: str) -> None:
    own = {"a": torch.zeros(2), "b": torch.zeros(3)}
    saved = {"a": torch.ones(2), "b": torch.ones(3)}
    if fault == "missing":
        del saved["b"]
    else:
        name, value = {"unexpected": ("c", torch.ones(1)), "shape": ("b", torch.ones(5))}.get(fault, ("b", None))
        saved[name] = torch.ones(3).bfloat16() if value is None else value
    with pytest.raises(CheckpointError, match="does not fit"):
        fill_parameters(own, saved)
    assert not own["a"].any()


def test_saved_tensors_are_copied() -> None:
    own = {"a": torch.zeros(2)}
    fill_parameters(own, {"a": torch.ones(2)})
    assert own["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints/step_00000003", "checkpoints/.replaced-step_00000003"])
def test_auto_never_starts_again_over_what_a_run_left(tmp_path: Path, left: str) -> None:
    assert find_checkpoint("auto", tmp_path) is None
    if left.endswith(".jsonl"):
        (tmp_path / left).write_text('{"step": 1}\n')
    else:
        (tmp_path / left).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"(?s)no whole checkpoint to resume from.*to do: .*--output_dir"):
        find_checkpoint("auto", tmp_path)


def test_auto_names_what_it_passes_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"a": torch.zeros(2)}
    kept = {"model_tensors": tensors, "ema_tensors": None, "optimizer_state": {}, "state": {}, "rng_states": {}}
    first, second = (save_run_checkpoint(tmp_path, step, **kept) for step in (1, 2))
    data = (second / "model.safetensors").read_bytes()
    (second / "model.safetensors").write_bytes(data[:-1] + b"x")
    assert find_checkpoint("auto", tmp_path) == first
    assert "taking step_00000001" in caplog.text
    assert "step_00000002/model.safetensors" in caplog.text
    assert "SHA-256" in caplog.text


def test_records_cut_within_a_character_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"step": 1}\n{"step": 2, "name": "é'.encode()[:-1])
    truncate_metrics(path, 5)
    assert path.read_text() == '{"step": 1}\n'
    path.write_bytes(b'{"step": 1}\n' + bytes(64))  # blocks that a power cut left empty
    truncate_metrics(path, 5)
    assert path.read_text() == '{"step": 1}\n'
    path.write_bytes(b'{"step": \xff1}\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match="line 1"):
        truncate_metrics(path, 5)


@pytest.mark.parametrize("name", ["config", "summary"])
@pytest.mark.parametrize(("number", "fix"), [(errno.ENOSPC, "free some"), (errno.EROFS, "file system that can be")])
def test_a_document_that_cannot_be_written_is_explained_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, fix: str
) -> None:
    folder = _create(tmp_path)
    folder.write(name, {"a": 1})

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(EnvironmentProblem, match=rf"{name}\.json cannot be written; where: .*{name}\.json.*{fix}"):
        folder.write(name, {"a": 2})
    assert folder.read(name) == {"a": 1}

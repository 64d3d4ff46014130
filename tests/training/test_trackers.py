"""What trackers hold is what ``metrics.jsonl`` holds, also of a run that was resumed; each is read back its own way."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dual_loop.errors import EnvironmentProblem
from dual_loop.training.metrics_log import MetricsLog, StepRecord

Numbers = dict[tuple[str, int], float]
SETTINGS = {"train": {"learning_rate": 1e-5, "eval_dir": None}, "model": {"text": {}}}


def tensorboard(folder: Path) -> Numbers:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {(name, e.step): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}


def wandb(folder: Path) -> Numbers:
    from wandb.proto import wandb_internal_pb2

    found: Numbers = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            found |= {(k, int(items["_step"])): value for k, value in items.items() if not k.startswith("_")}
    return found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format behind 7 bytes of wandb's own."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no header fits into what is left of a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def trackio(folder: Path) -> Numbers:
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("dual_loop", folder.name)
    return {
        (name, one["step"]): value for one in logs for name, value in one.items() if name not in ("step", "timestamp")
    }


def mlflow(folder: Path) -> Numbers:
    from mlflow import MlflowClient

    client = MlflowClient()
    run = client.get_run(json.loads((folder / "trackers.json").read_text())["mlflow"])
    assert run.data.params["train/learning_rate"] == "1e-05"
    return {
        (name, m.step): m.value for name in run.data.metrics for m in client.get_metric_history(run.info.run_id, name)
    }


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return tmp_path / "run"


def record(step: int, loss: float) -> StepRecord:
    losses = {"mask_loss": loss, "dice_loss": 0.25, "llm_loss": 0.5, "align_loss": 0.125}
    values = {"cycle_iou": None if step == 2 else 0.5, "regions": 8.0}
    return StepRecord(step, 1, losses, 1.5, 1e-5, 1, {"total": 2.0}, values, {"caption/rejected": step})


def follow(folder: Path, name: str, done: int, steps: Sequence[int]) -> None:
    PartialState(cpu=True)
    log = MetricsLog(folder, report_to=(name, "none"))
    log.open(done, SETTINGS)
    for step in steps:
        log.write(record(step, step / 8))
    log.close()


@pytest.mark.parametrize("read", [tensorboard, wandb, trackio, mlflow], ids=lambda read: read.__name__)
def test_a_tracker_holds_the_records(read: Callable[[Path], Numbers], offline: Path) -> None:
    name = read.__name__
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (extra trackers)")
    offline.mkdir()
    for done, steps in ((0, (1, 2)), (2, (3,))):  # as a run that is resumed: wandb opens one once in a process
        from warm_python import warm_python  # not to be found by the script that this file is too

        command = [warm_python(), __file__, str(offline), name, str(done), *map(str, steps)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert child.returncode == 0, child.stderr[-3000:]
    expected: Numbers = {}
    for line in (offline / "metrics.jsonl").read_text().splitlines():
        document = json.loads(line)
        flat = {f"{a}/{b}": v for a, own in document.items() if isinstance(own, dict) for b, v in own.items()}
        flat |= {key: v for key, v in document.items() if not isinstance(v, dict) and v is not None and key != "step"}
        expected |= {(key, document["step"]): v for key, v in flat.items()}
    assert len(expected) > 30
    found = read(offline)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState(cpu=True)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(EnvironmentProblem, match=r"wandb cannot be started; where: --report_to.*pip install wandb"):
        MetricsLog(tmp_path, report_to=("wandb",)).open(0)


def test_nothing_is_reported_where_none_is_asked(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, report_to=("none",))
    log.open(0)
    log.write(record(1, 1.0))
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


if __name__ == "__main__":
    follow(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), [int(step) for step in sys.argv[4:]])

"""The soak: every kind of fault strikes, and a run that differs or ends otherwise is found. A stand-in trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import soak

STAND_IN = """
import hashlib, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

run, steps, fault = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
lock, stopping = run / "run.lock", []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))

def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZT"
    except OSError:
        return False

run.mkdir(exist_ok=True)
if lock.exists() and Path(f"/proc/{lock.read_text()}").exists():
    sys.exit(2)
lock.write_text(str(os.getpid()))
whole, records = 0, []
for path in sorted(run.glob("checkpoints/step_*"), reverse=True):
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir() if p.name != "manifest"}
    try:
        if json.loads((path / "manifest").read_text()) == files:
            whole, records = int(path.name[5:]), json.loads((path / "state").read_text())
            break
    except ValueError:
        pass
if whole and fault == "forgets":
    records[-1]["loss"] += 1
worker = subprocess.Popen(["sleep", "100"])
try:
    for step in range(whole + 1, steps + 1):
        time.sleep(0.02)
        if not is_alive(worker.pid):
            sys.exit(1 if fault == "crashes" else 2)
        records.append(dict.fromkeys(["step", "loss", "grad_norm", "lr", "tokens", "cycle_iou"], step))
        folder, final = run / "checkpoints/.tmp", run / f"checkpoints/step_{step:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, size in (("model.safetensors", 4_100_000), ("ema.safetensors", 10)):
            (folder / name).write_bytes(bytes([step]) * size)
        (folder / "state").write_text(json.dumps(records))
        hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
        (folder / "manifest").write_text(json.dumps(hashes))
        folder.rename(final)
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\\n" for record in records))
        for old in sorted(run.glob("checkpoints/step_*"))[:-3]:
            shutil.rmtree(old)
        if stopping:
            break
except OSError:
    sys.exit(2)
finally:
    worker.kill()
"""


def soaked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> tuple[int, str]:
    """Run the whole script over a trainer with ``fault``; return its exit status and what it printed."""
    program = folder / "stand_in.py"
    program.write_text(STAND_IN)

    def start(work: Path, run: Path, steps: int, *more: str) -> subprocess.Popen[bytes]:
        with run.with_suffix(".log").open("ab") as log:
            command = [sys.executable, "-S", "-E", str(program), str(run), str(steps), fault]
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    monkeypatch.setattr(soak, "start", start)
    monkeypatch.setattr(soak, "write_demo_data", lambda *_, **__: None)
    monkeypatch.setattr(soak, "SUSPENDED_SECONDS", 0.1)
    monkeypatch.setattr(soak, "STEP_SECONDS", 0.05)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--faults", "8", "--steps", "12"])
    return soak.main(), capsys.readouterr().out


def test_every_kind_of_fault_strikes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = soaked(tmp_path, monkeypatch, capsys, "")
    assert status == 0, text
    table = dict(line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|"))
    assert table == {fault.__name__: "1" for fault in soak.FAULTS}


@pytest.mark.parametrize(("fault", "said"), [("forgets", "differs from the straight run"), ("crashes", "ended with 1")])
def test_what_is_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str, said: str
) -> None:
    monkeypatch.setattr(soak, "FAULTS", (soak.kill_worker if fault == "crashes" else soak.kill,))
    status, text = soaked(tmp_path, monkeypatch, capsys, fault)
    assert status == 1
    assert said in text

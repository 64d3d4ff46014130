"""Two starts, a requeue after kill -9, and locks of other hosts."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dual_loop.errors import ConfigError
from dual_loop.training import run_lock
from dual_loop.training.run_lock import LOCK_NAME, Holder, holding

HOLD = """
import sys, time
from dual_loop.training.run_lock import holding
with holding(sys.argv[1], False):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "SILENT_SECONDS", 1.0)


@pytest.fixture
def other(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def elsewhere(folder: Path) -> Path:
    """Write the lock of a process on another host."""
    path = folder / LOCK_NAME
    holder = Holder("node7", "node7 boot", os.getpid(), 1.0, "theirs")
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    return path


@pytest.mark.parametrize("waits", [False, True])
def test_a_second_start_is_refused_with_the_name_of_the_first(tmp_path: Path, other, waits: bool) -> None:
    with (
        pytest.raises(ConfigError, match=f"another run writes this folder.*process {other.pid} on"),
        holding(tmp_path, waits),
    ):
        pass
    assert os.listdir(tmp_path) == [LOCK_NAME]


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_requeue_after_kill_9_goes_on_at_once(tmp_path: Path, other, is_reaped: bool, capfd) -> None:
    other.send_signal(signal.SIGKILL)
    if is_reaped:
        other.wait()
    else:
        while Path(f"/proc/{other.pid}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
    begun = time.monotonic()
    with holding(tmp_path, False):
        assert time.monotonic() - begun < 0.5
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []
    assert f"process {other.pid}" in capfd.readouterr().err


def test_a_requeued_run_waits_for_the_one_that_is_ending(tmp_path: Path, other) -> None:
    threading.Timer(0.3, other.kill).start()
    with holding(tmp_path, True):
        pass


def test_a_process_that_got_the_number_of_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    holder = Holder("here", run_lock._place(), os.getpid(), 1.0, "theirs")  # this process started later
    (tmp_path / LOCK_NAME).write_text(json.dumps(dataclasses.asdict(holder)))
    with holding(tmp_path, False):
        pass


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("content", [None, b"", b"\xff{"])
def test_a_stale_lock_of_another_host_is_taken_after_its_silence(tmp_path: Path, waits: bool, content) -> None:
    path = elsewhere(tmp_path)
    if content is not None:
        path.write_bytes(content)
    begun = time.monotonic()
    with holding(tmp_path, waits):
        assert 1.0 < time.monotonic() - begun < 5


@pytest.mark.parametrize("waits", [False, True])
def test_a_lock_that_another_host_touches_is_respected(tmp_path: Path, waits: bool) -> None:
    path, closing = elsewhere(tmp_path), threading.Event()

    def touch() -> None:
        while not closing.wait(0.05):
            os.utime(path)

    threading.Thread(target=touch).start()
    try:
        with pytest.raises(ConfigError, match=r"process .* on node7"), holding(tmp_path, waits):
            pass
    finally:
        closing.set()


def test_of_many_starts_over_a_stale_lock_one_holds_it(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    inside, most, refused = [], [], []

    def start() -> None:
        try:
            with holding(tmp_path, False):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.5)
                inside.pop()
        except ConfigError:
            refused.append(1)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) + len(refused) == 8


def test_a_holder_whose_lock_was_taken_ends(tmp_path: Path) -> None:
    code = f"from dual_loop.training import run_lock; run_lock.BEAT_SECONDS = 0.1\n{HOLD}"
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    (tmp_path / "theirs").mkdir()
    os.replace(elsewhere(tmp_path / "theirs"), tmp_path / LOCK_NAME)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "another process took over" in errors


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    for is_used in (False, True):
        with holding(tmp_path / "run", False):
            if is_used:
                (tmp_path / "run/config.json").touch()
        assert os.listdir(tmp_path) == (["run"] if is_used else [])

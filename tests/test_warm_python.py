"""The programs that stand in for a new Python: what is handed over, how they end, and that they end together."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from warm_python import warm_bin, warm_python

pytestmark = pytest.mark.slow
SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def test_arguments_folder_environment_files_and_status_are_those_of_a_process(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv, os.getcwd(), os.environ['X'], input()); sys.exit(sys.path[1] == 'p')"
    command = [warm_python(), "-c", code, "a b"]
    options = {"cwd": tmp_path, "env": {"X": "1", "PYTHONPATH": "p"}, "input": "in", "capture_output": True}
    done = subprocess.run(command, text=True, check=False, **options)
    assert (done.stdout, done.stderr, done.returncode) == (f"['-c', 'a b'] {tmp_path} 1 in\n", "", 1)
    (tmp_path / "script.py").write_text("import beside")
    (tmp_path / "beside.py").write_text("1 / 0")
    done = subprocess.run([warm_python(), str(tmp_path / "script.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_both_processes(number: signal.Signals) -> None:
    with subprocess.Popen([warm_python(), "-c", SLEEP], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        forked = int(process.stdout.readline())
        assert forked != process.pid
        ended = os.pidfd_open(forked)  # a number alone stays taken until the server has asked for the status
        process.send_signal(number)
        assert process.wait(timeout=30) == -number
        assert select.select([ended], [], [], 30)[0], "the forked process runs on"
    os.close(ended)


def test_what_a_warm_process_starts_is_warm_and_warnings_are_ignored_when_told() -> None:
    inner = "import sys, warnings; warnings.warn('heard'); print('torch' in sys.modules)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-W', 'ignore', '-c', {inner!r}], check=True)"
    done = subprocess.run([warm_python(), "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_torchrun_starts_warm_ranks() -> None:
    code = "import os, sys; print(os.environ['RANK'], 'torch' in sys.modules)"
    command = [f"{warm_bin()}/torchrun", "--standalone", "--nproc_per_node", "2", "--no-python"]
    done = subprocess.run([*command, warm_python(), "-c", code], capture_output=True, text=True, check=False)
    assert sorted(done.stdout.splitlines()) == ["0 True", "1 True"], done.stderr

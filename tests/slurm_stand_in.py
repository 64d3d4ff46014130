"""Stand-ins for the commands of SLURM that scripts/slurm.sh calls, for a job of two machines that are both this one.

``srun`` starts one task a machine and ends both when one fails (--kill-on-bad-exit). A signal that comes to it goes to
the tasks and not to what these start, as with ``proctrack/cgroup``; with ``REACH=all`` to all of them, as elsewhere.
``scontrol`` gives the names in ``HOSTS`` and writes down what is put back into the queue.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SRUN = """
import os, signal, subprocess, sys, time

with open(os.environ["CALLS"], "a") as calls:
    print("srun", *sys.argv[1:], file=calls)
tasks = []


def pass_on(number, frame):
    for task in tasks:
        if os.environ.get("REACH") == "all":
            os.killpg(task.pid, number)
        else:
            task.send_signal(number)


signal.signal(signal.SIGUSR1, pass_on)
for node in ("0", "1"):
    environment = {**os.environ, "SLURM_NODEID": node}
    tasks.append(subprocess.Popen(sys.argv[2:], env=environment, start_new_session=True))
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        for task in tasks:
            task.terminate()
    time.sleep(0.05)
sys.exit(max(abs(task.returncode) for task in tasks))
"""

SCONTROL = """
import os, sys

if sys.argv[1:3] == ["show", "hostnames"]:
    print(*os.environ["HOSTS"].split(), sep="\\n")
else:
    with open(os.environ["CALLS"], "a") as calls:
        print("scontrol", *sys.argv[1:], file=calls)
"""


def put_stand_ins(folder: Path) -> str:
    """Write the commands into ``folder`` and return a PATH that finds them first."""
    folder.mkdir()
    for name, code in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(f"#!{sys.executable}\n{code.lstrip()}")
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def job(submitted_from: Path, job_id: int, hosts: str = "one two") -> dict[str, str]:
    """Return what SLURM sets in the environment of a job of two machines, and the names for ``scontrol``."""
    return {
        **{"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": hosts, "SLURM_JOB_ID": str(job_id), "HOSTS": hosts},
        "SLURM_SUBMIT_DIR": str(submitted_from),
    }

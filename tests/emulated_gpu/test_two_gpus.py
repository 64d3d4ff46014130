"""Two ranks with an emulated GPU each: a rank makes no tensor on the GPU of the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_build import build_device

SCRIPT = Path(__file__).with_name("emulated_run.py")
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
MEASURE = (
    "--device cuda --data sa1b --sa1b_dir {demo}/sa1b --output_dir {out}/found --cfg-options loop.max_new_tokens=4"
)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("command", ["evaluate --tasks referring loop", "audit"])
def test_a_rank_stays_on_its_own_gpu(command: str, demo: Path, tmp_path: Path) -> None:
    library, reason = build_device()
    if library is None:
        pytest.skip(reason)
    # One command a process: torch leaves the addresses of a group in the store, where a second one reads them.
    (tmp_path / "plan.json").write_text(
        json.dumps({"run": f"{command} {MEASURE}".format(demo=demo, out=tmp_path).split()})
    )
    done = subprocess.run(
        [sys.executable, *LAUNCHER, str(SCRIPT), str(tmp_path / "plan.json"), str(tmp_path / "rank.json")],
        env={**os.environ, "EMULATED_GPUS": "2", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        answer = json.loads((tmp_path / f"rank{rank}.json").read_text())["run"]
        assert answer["status"] == 0, answer["output"][-3000:]
        assert set(answer["devices"]) == {f"cuda:{rank}"}, answer["devices"]

"""Two ranks with an emulated GPU each: a rank makes no tensor on the GPU of the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from emulated_build import build_device

HERE = Path(__file__).parent
MEASURE = (
    "--device cuda --data sa1b --sa1b_dir {demo}/sa1b --output_dir {out}/found --cfg-options loop.max_new_tokens=4"
)
PLAN = {"evaluate": f"evaluate --tasks referring loop {MEASURE}", "audit": f"audit {MEASURE}"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def answers(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank answered; both commands run in one process of it."""
    library, reason = build_device()
    if library is None:
        pytest.skip(reason)
    tmp_path = tmp_path_factory.mktemp("two_gpus")
    plan = {name: line.format(demo=demo, out=tmp_path / name).split() for name, line in PLAN.items()}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(HERE / "emulated_run.py"), str(tmp_path / "plan.json")]
    ranks = [
        subprocess.Popen(
            [*command, str(tmp_path / f"{rank}.json")],
            env={
                **os.environ,
                **together,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "EMULATED_GPUS": "2",
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in "01"
    ]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", PLAN)
def test_a_rank_stays_on_its_own_gpu(name: str, answers: list[dict[str, Any]]) -> None:
    for rank in range(2):
        answer = answers[rank][name]
        assert answer["status"] == 0, answer["output"][-3000:]
        assert set(answer["devices"]) == {f"cuda:{rank}"}, answer["devices"]

"""The programs of the developers on CUDA semantics."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_build import build_device
from gpu_acceptance import main as accept

from bench.phases import PHASES

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> dict:
    """A variant that was built and took its steps on the emulated GPU."""
    library, reason = build_device()
    if library is None:
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("emulated") / "out.json"
    program = HERE / "emulated_bench.py"
    subprocess.run([sys.executable, str(program), str(out)], check=True, timeout=300)
    return json.loads(out.read_text())


def test_a_gpu_builds_the_model_itself(emulated):
    assert emulated["copies"] < 20  # buffers; there are hundreds of parameters
    assert emulated["devices"] == ["cuda"]


def test_a_gpu_is_waited_for_before_the_clock_is_read(emulated):
    """The step and each of its phases: the queue is empty when the time is taken."""
    step = emulated["step"]
    assert emulated["waits"] == 2
    assert sum(step["phases"].values()) == pytest.approx(step["seconds"], rel=0.05)


def test_a_gpu_tells_its_own_memory_by_phase(emulated):
    """The emulated GPU says 1 MiB whenever it is asked."""
    assert emulated["end"]["peak_mb"] == 1.0
    counted = emulated["counted"]
    assert counted["allocated"].keys() == counted["reserved"].keys() == set(PHASES)
    assert counted["allocated"]["language forward"] == counted["reserved"]["backward"] == 2**20
    assert set(emulated["step"]) & {"allocated", "reserved"} == set()


@pytest.mark.slow
def test_the_acceptance_run_rehearses_on_cuda_semantics(tmp_path):
    library, reason = build_device()
    if library is None:
        pytest.skip(reason)
    arguments = ["--out", str(tmp_path), "--tiny", "--sections", "machine,swaps,step,decoding,presets"]
    status = accept(arguments, (sys.executable, "-W", "ignore", str(HERE / "emulated_acceptance.py")))
    report = (tmp_path / "gpu.md").read_text()
    assert status == 0, report
    assert "emulated GPU" in report
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {section["status"] for section in sections.values()} == {"done"}
    assert all(row["allocated GiB"] > 0 for row in sections["step"]["tables"]["phases, 4 tokens"] if row["seconds"])

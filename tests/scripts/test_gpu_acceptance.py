"""The acceptance run: it tells what fails, outlives what breaks, keeps what was measured, and its checks can fail."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from emulated_gpu.emulated_build import build_device
from gpu_acceptance import SECTIONS, WORKER, main

from dual_loop.model import decode, stored_weights

from acceptance import swaps
from acceptance.found import Asked, Found
from acceptance.small import Taken, gradient_difference, loss_difference, whole_difference
from warm_python import warm_python

FAKE = """
import json, os, sys, time
for line in sys.stdin:
    name = json.loads(line)["section"]
    found = {"tables": {"numbers": [{"pid": os.getpid()}]}, "checks": [], "notes": [], "error": None}
    print(json.dumps({"found": found}), flush=True)
    if name == "swaps":
        os._exit(3)
    if name == "step":
        time.sleep(60)
    if name == "equality":
        found["checks"].append({"name": "losses", "passed": False, "seen": "0.1"})
    if name == "presets":
        found["error"] = "RuntimeError: no such kernel"
    print(json.dumps({"done": found}), flush=True)
"""


def accept(folder: Path, sections: str, minutes: float = 8.0) -> tuple[int, dict[str, dict], str]:
    """Run sections that pretend to be ones; return status, sections and report."""
    command = (sys.executable, "-c", FAKE)
    status = main(["--out", str(folder), "--minutes", str(minutes), "--sections", sections], command)
    results = json.loads((folder / "gpu.json").read_text())
    return status, results["sections"], (folder / "gpu.md").read_text()


def test_all_is_well(tmp_path):
    status, sections, report = accept(tmp_path, "machine,ranks")
    assert status == 0
    assert [one["status"] for one in sections.values()] == ["done", "done"]
    assert "## Versions and floors" in report
    assert len({one["tables"]["numbers"][0]["pid"] for one in sections.values()}) == 1  # one process for both


@pytest.mark.parametrize(("broken", "shown"), [("equality", "FAILED: losses: 0.1"), ("presets", "no such kernel")])
def test_what_does_not_hold_fails_the_run(tmp_path, broken, shown):
    status, sections, report = accept(tmp_path, f"{broken},ranks")
    assert status == 1
    assert shown in report
    assert sections["ranks"]["status"] == "done"


def test_a_process_that_dies_takes_no_other_section_with_it(tmp_path):
    status, sections, report = accept(tmp_path, "machine,swaps,ranks")
    assert status == 1
    assert [one["status"] for one in sections.values()] == ["done", "died", "done"]
    assert "status 3" in report
    first, last = (sections[name]["tables"]["numbers"][0]["pid"] for name in ("machine", "ranks"))
    assert first != last


def test_a_section_that_outlasts_its_share_is_cut_and_what_it_measured_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(SECTIONS, "step", ("Step", 3))
    start = time.monotonic()
    status, sections, _ = accept(tmp_path, "step,ranks")
    assert time.monotonic() - start < 30
    assert status == 0
    assert [one["status"] for one in sections.values()] == ["cut", "done"]
    assert sections["step"]["tables"]["numbers"]


def test_sections_without_time_are_said_to_be_skipped(tmp_path):
    status, sections, report = accept(tmp_path, "machine,ranks", minutes=0.1)
    assert status == 0
    assert "skipped" in report
    assert [one["status"] for one in sections.values()] == ["skipped", "skipped"]


def test_an_unknown_section_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--sections", "machine,speed"])
    assert "unknown sections speed" in capsys.readouterr().err


def test_differences_are_seen():
    first = Taken([[1]], {"mask_loss": 2.0}, {"a": torch.ones(3), "b": torch.zeros(3)})
    assert loss_difference(first, first) == gradient_difference(first, first)[0] == 0.0
    other = Taken([[1]], {"mask_loss": 2.001}, {"a": torch.tensor([1.0, 1.0, 1.001]), "b": torch.zeros(3)})
    assert loss_difference(other, first) == pytest.approx(5e-4)
    assert gradient_difference(other, first) == (pytest.approx(5.8e-4, rel=0.01), "a")
    assert whole_difference(other, first) == pytest.approx(5.8e-4, rel=0.01)
    assert loss_difference(Taken([], {}, {}), first) == gradient_difference(Taken(), first)[0] == float("inf")
    rounding = Taken([[1]], {}, {"a": torch.ones(3), "b": torch.full((3,), 1e-10)})
    assert gradient_difference(rounding, first)[0] < 1e-5  # a gradient that is zero but for rounding


class Forgetful:
    """torch, without the call that makes swapped weights seen."""

    def __getattr__(self, name: str) -> object:
        return (lambda: None) if name == "clear_autocast_cache" else getattr(torch, name)


@pytest.mark.slow
def test_swapped_weights_that_autocast_does_not_see_are_found(tmp_path, monkeypatch):
    asked = Asked("swaps", "cpu", True, time.monotonic() + 300, str(tmp_path))
    found = Found()
    swaps.run(asked, found)
    assert [one["passed"] for one in found.checks] == [True] * 6, found.checks
    for module in (stored_weights, decode):  # not in torch itself, whose own contexts end with it
        monkeypatch.setattr(module, "torch", Forgetful())
    blind = Found()
    swaps.run(asked, blind)
    assert not all(one["passed"] for one in blind.checks)


@pytest.mark.slow
def test_the_run_rehearses_on_a_cpu(tmp_path):
    # The emulated GPU rehearses the others, where it can be built.
    others = "" if build_device()[0] else "machine,step,decoding,presets,"
    sections = f"{others}plain,resume,ranks"
    status = main(
        ["--out", str(tmp_path), "--device", "cpu", "--tiny", "--sections", sections], (warm_python(), *WORKER[1:])
    )
    report = (tmp_path / "gpu.md").read_text()
    assert status == 0, report
    results = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {one["status"] for one in results.values()} == {"done"}, report
    assert all(SECTIONS[name][0] in report for name in sections.split(","))
    assert sum(len(one["checks"]) for one in results.values()) >= (12 if others else 6)

"""The data: what reading measures, the sizes of the release, captions that a reward needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dual_loop.config import load_config, resolve_config_path
from dual_loop.data.refcoco import RefCoco
from dual_loop.data.sa1b import Sa1b
from dual_loop.errors import EnvironmentProblem
from dual_loop.model.build import geometry
from dual_loop.preflight import data_checks, machine
from dual_loop.preflight.findings import OK, PROBLEM


def test_reading_measures_what_is_there(demo: Path) -> None:
    source = Sa1b(demo / "sa1b", regions_per_image=9, index_dir=demo.parent / "index")
    report = data_checks.read_source(source, None, geometry(load_config(resolve_config_path("tiny_cpu"))))
    assert (report.entries, report.read, report.good) == (6, 6, 6)
    assert sum(report.regions) == len(report.areas) == len(report.captions)
    assert all(0 < area < 1 for area in report.areas)
    assert np.all(np.array(report.captions) == 0)


def test_expected_counts_of_the_release() -> None:
    class Fake:
        pass

    source = RefCoco.__new__(RefCoco)
    source.split_counts = lambda: {"refcoco": {"val": (1500, 3811), "testA": (1, 2)}}  # type: ignore[method-assign]
    first, second = data_checks.expected_counts(source)
    assert (first.level, second.level) == (OK, "note")
    assert "as released" in first.what
    assert "the release has 1,975" in second.what
    assert list(data_checks.expected_counts(Fake())) == []  # type: ignore[arg-type]


def test_captions_are_asked_for_where_a_reward_needs_them(demo: Path) -> None:
    config = load_config(resolve_config_path("tiny_cpu"), {"reward.caption_weight": 0.1, "data.sa1b_dir": "x"})
    [finding] = data_checks.check_captions(config)
    assert finding.level == PROBLEM
    assert "--refcoco_dir" in finding.fix
    with pytest.raises(EnvironmentProblem, match="caption reward is on"):
        machine.require_ready(config)

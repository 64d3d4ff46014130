"""The data: what reading measures, the sizes of the release, captions that a reward needs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dual_loop.config import load_config, resolve_config_path
from dual_loop.data.refcoco import RefCoco
from dual_loop.data.sa1b import Sa1b
from dual_loop.errors import EnvironmentProblem
from dual_loop.model.build import geometry
from dual_loop.preflight import data_checks, machine
from dual_loop.preflight.findings import OK, PROBLEM, WARNING


def test_reading_measures_what_is_there(demo: Path) -> None:
    source = Sa1b(demo / "sa1b", regions_per_image=9, index_dir=demo.parent / "index")
    report = data_checks.read_source(source, None, geometry(load_config(resolve_config_path("tiny_cpu"))))
    assert (report.entries, report.read, report.good) == (6, 6, 6)
    assert sum(report.regions) == len(report.areas) == len(report.captions)
    assert all(0 < area < 1 for area in report.areas)
    assert np.all(np.array(report.captions) == 0)


def test_every_annotation_of_real_coco_files_is_accounted_for(shared_coco: Path, tmp_path: Path) -> None:
    settings = {"data.masks_dir": str(shared_coco / "instances.json"), "data.index_dir": str(tmp_path / "index")}
    config = load_config(resolve_config_path("tiny_cpu"), settings)
    [source], _ = data_checks.open_sources(config.data)
    report = data_checks.read_source(source, None, geometry(config), regions=data_checks.ALL)
    assert (report.read, report.good) == (80, 80)
    [(crowds, left_out)] = source.left_out.items()
    assert (crowds.split()[0], left_out) == ("crowds", 8)
    assert sum(report.regions) + report.passed_over.total() + left_out == 739
    assert set(report.passed_over) == {"target_vanished"}
    assert source.regions_per_image == config.data.regions_per_image
    texts = [finding.what for finding in data_checks.check_sources([source], 3, config)]
    assert "masks: 80 images, 731 regions, 0 of them with captions (COCO)" in texts
    assert "masks: left out 8 crowds (iscrowd; data.masks_crowds takes them)" in texts


def test_a_caption_with_a_marker_is_found(tmp_path: Path) -> None:
    for number in range(20):
        for folder, value in (("images", 90), ("masks", 255)):
            path = tmp_path / "mine" / folder / f"i{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((40, 60), value, np.uint8)).save(path)
    captions = {f"i{number}": "<p>a square</p>" if number == 7 else "a square" for number in range(20)}
    (tmp_path / "mine/captions.json").write_text(json.dumps(captions))
    settings = {"data.masks_dir": str(tmp_path / "mine"), "data.index_dir": str(tmp_path / "index")}
    config = load_config(resolve_config_path("tiny_cpu"), settings)
    sources, _ = data_checks.open_sources(config.data)
    found = "\n".join(finding.what for finding in data_checks.check_sources(sources, None, config))
    assert "19 of 20 read are good (special_token 1)" in found
    assert "i7" in found
    [finding] = data_checks.check_captions(config, sources)
    assert finding.level == OK
    (tmp_path / "mine/captions.json").write_text("{}")
    [finding] = data_checks.check_captions(config, data_checks.open_sources(config.data)[0])
    assert finding.level == WARNING
    assert "no data set has captions" in finding.what


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

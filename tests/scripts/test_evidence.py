"""The evidence: runs are valid configurations, captions of every kind are written, intervals and tables are right."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dual_loop.config import add_training_flags, load_config, overrides_from, resolve_config_path
from dual_loop.data.masks_dir import MasksDir

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from experiments import crossed, evidence, plans  # noqa: E402

RUNS = {run.arm: run for run in plans.runs_of(list(plans.TABLES))}


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
def test_every_run_is_a_valid_configuration(run: plans.Run, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_training_flags(parser)
    args = parser.parse_args(evidence.training_arguments(run, tmp_path))
    config = load_config(resolve_config_path(args.config), overrides_from(args))
    assert (config.train.max_steps, config.train.seed, config.train.learning_rate) == (run.steps, run.seed, run.rate)
    assert (config.data.masks_dir is None) == (run.captions == "none" and not run.everything)
    assert config.data.refcoco_max_samples == run.captioned


def test_captions_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SCENES", "CAPTIONED", "START_SCENES"):
        monkeypatch.setattr(evidence, name, 6)
    folder = evidence.write_scenes(tmp_path, 3, 0.0)
    texts = {}
    for kind in ("written", "true", "constant", "shuffled", "start"):
        source = MasksDir(evidence.write_masks(folder, kind), regions_per_image=9)
        samples = [source.load(index, np.random.default_rng(0)) for index in range(len(source))]
        assert len(samples) == 6
        texts[kind] = [text for sample in samples for text in sample.captions]
    assert set(texts["written"]) == {()}
    assert set(texts["constant"]) == {("the object",)}
    assert sorted(texts["shuffled"]) == sorted(texts["true"]) != texts["true"]
    right = [own == true for own, true in zip(texts["start"], texts["true"], strict=True)]
    assert np.mean(right) > 0.4
    assert len(MasksDir(evidence.write_start_scenes(tmp_path))) == 6


def test_intervals_draw_seeds_and_images() -> None:
    rng = np.random.default_rng(0)
    seeds, images = rng.normal(0, 3, (6, 1)), rng.normal(0, 3, (1, 200))
    values = 50 + seeds + images + rng.normal(0, 1, (6, 200))
    mean, low, high = crossed.crossed_interval(values, np.ones_like(values))
    assert mean == pytest.approx(values.mean())
    # The seeds decide the width, the images add little.
    assert high - low == pytest.approx(3.92 * seeds.std() / 6**0.5, rel=0.2)
    alone = crossed.crossed_interval(values[:1], np.ones((1, 200)))
    assert alone[2] - alone[1] < 1.5


def test_table_of_results(tmp_path: Path) -> None:
    for arm, seed, value in (("loop", 0, 600), ("loop", 1, 640), ("captioned", 0, 500)):
        path = tmp_path / "core" / f"{arm}_s{seed}.json"
        path.parent.mkdir(exist_ok=True)
        regions = {"image": [0, 0, 1], "iou": [value] * 3, "picks": [1, 0, 1]}
        path.write_text(json.dumps({"arm": arm, "seed": seed, "commit": "abcdef012", "regions": regions}))
    text = crossed.markdown(tmp_path, ["core", "rewards"])
    assert "commits abcdef0" in text
    [row] = [line for line in text.splitlines() if line.startswith("| loop ")]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[1] == "2"
    assert cells[2].startswith("62.0 (60.0 to 64.0)")
    assert cells[4] == "+10.0 (+10.0 to +10.0)"

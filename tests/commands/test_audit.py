"""``dual-loop audit`` on generated data with the tiny checkpoint: the page, and training on its pseudo-labels."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from dual_loop.cli import main
from dual_loop.data.masks_dir import MasksDir
from dual_loop.model.build import TINY_WEIGHTS
from dual_loop.testing.demo_data import write_demo_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("measure") / "demo"
    write_demo_data(root, 8, 5, num_val=2)
    return root


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def test_audit_ranks_exports_and_trains_on_its_labels(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, labels = demo.parent / "audit", demo.parent / "labels"
    data = ["--data", "sa1b", "sav", "--sa1b_dir", demo / "sa1b", "--sav_dir", demo / "sav"]
    run(
        *("audit", *data, "--output_dir", out, "--labels", labels, "--examples", 3, "--device", "cpu"),
        *("--listener", TINY_WEIGHTS, "--best_of", 2, "--margin", 0, "--likelihood_floor", 0.8),
    )
    printed = capsys.readouterr().out
    page = (out / "audit.html").read_text()
    result = json.loads((out / "audit.json").read_text())
    assert result["listener"].startswith(str(TINY_WEIGHTS))
    for figures in (data["loop"] for data in result["figures"].values()):
        assert figures["cycle_gIoU_independent"] == figures["cycle_gIoU"], "both are the same weights here"
    for title in ("Worst masks", "Ambiguous captions", "Best pairs (3)"):
        assert title in page
    assert page.count("data:image/jpeg") >= 12
    rows = [json.loads(line) for line in (labels / "labels.jsonl").read_text().splitlines()]
    assert f"{len(rows)} pseudo-labels" in printed
    assert rows
    assert all(row["iou"] >= 0.7 and row["trust"] >= 0.8 for row in rows)
    assert result["thresholds"]["best_of"] == 2
    assert f"{result['replaced']} greedy captions replaced by one of 2 samples" in printed
    assert all(row["uniqueness"] is None or row["uniqueness"] >= 0.1 for row in rows)
    source = MasksDir(labels, index_dir=demo.parent / "index", regions_per_image=9)
    samples = [source.load(index, np.random.default_rng(0)) for index in range(len(source))]
    assert sum(sample.num_regions for sample in samples) == len(rows)
    assert {text for s in samples for own in s.captions for text in own} == {row["caption"] for row in rows}
    if importlib.util.find_spec("pyarrow"):
        import pyarrow.parquet as parquet

        assert parquet.read_table(labels / "labels.parquet").num_rows == len(rows)
    trained = demo.parent / "trained"
    run(
        *("train", "--config", "tiny_demo", "--masks_dir", labels, "--max_steps", 2, "--output_dir", trained),
        *("--device", "cpu", "--batch_size", 2),
    )
    assert set(json.loads((trained / "summary.json").read_text())["sources"]) == {"masks"}


def test_the_best_of_several_captions_needs_a_listener(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--data", "sa1b", "--sa1b_dir", str(demo / "sa1b"), "--best_of", "4"]) == 2
    assert "give --listener" in capsys.readouterr().err


def test_labels_need_a_new_folder(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["audit", "--data", "sa1b", "--sa1b_dir", str(demo / "sa1b"), "--labels", str(tmp_path)]) == 2
    assert "pseudo-labels need a new folder" in capsys.readouterr().err

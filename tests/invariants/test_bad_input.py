"""Damaged files of every source: named with a reason, counted, and training goes on; a pickle with code is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dual_loop.testing.demo_data import write_demo_data

from end_to_end import BASE, data_flags, run, summary, train

pytestmark = pytest.mark.slow


@pytest.fixture
def demo(tmp_path) -> Path:
    write_demo_data(tmp_path / "data", 4, seed=9)
    return tmp_path / "data"


def damage(demo: Path) -> dict[str, str]:
    """Break one thing in each way; return what must be named in the log, with its reason."""
    pair = sorted((demo / "sav").rglob("*.npz"))[0]
    pair.write_bytes(pair.read_bytes()[: pair.stat().st_size // 2])
    broken, orphan = sorted((demo / "sa1b").glob("*.json"))[:2]
    content = json.loads(broken.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"]["counts"] = annotation["segmentation"]["counts"][:-2] + "~~"
    broken.write_text(json.dumps(content))
    orphan.with_suffix(".jpg").unlink()
    image_id = sorted((demo / "openimages" / "images" / "train").glob("*.jpg"))[0].stem
    for mask in (demo / "openimages" / "masks" / "train").glob(f"{image_id}_*.png"):
        Image.fromarray(np.full((40, 200), 255, np.uint8)).save(mask)
    instances = demo / "ref_seg" / "refcoco" / "instances.json"
    content = json.loads(instances.read_text())
    image = content["annotations"][0]["image_id"]
    for annotation in content["annotations"]:
        if annotation["image_id"] == image:
            annotation.update(segmentation=[[1.0, 1.0, 9.0, 9.0]], iscrowd=0)
    instances.write_text(json.dumps(content))
    return {
        f"sav/{pair.relative_to(demo / 'sav').with_suffix('')}": "truncated_file",
        f"sa1b/{broken.stem}": "broken_rle",
        f"openimages/{image_id}": "aspect_mismatch",
        "refcoco/": "bad_polygon",
    }


def test_every_kind_of_damage_is_named_and_counted(demo, tmp_path):
    expected = damage(demo)
    out = tmp_path / "run"
    flags = [*BASE, *data_flags(demo), "--batch_size", "4", "--gradient_accumulation_steps", "1", "--num_epochs", "1"]
    result = train([*flags, "--output_dir", str(out), "--cfg-options", "data.max_bad_fraction=1.0"], tmp_path)
    log = result.stdout + result.stderr
    counters = summary(out)["counters"]
    for name, reason in expected.items():
        lines = [line for line in log.splitlines() if name in line and reason in line]
        assert lines, f"{name} ({reason}) is not in the log:\n{log[-3000:]}"
        key = f"data/bad_samples/{name.split('/')[0]}/{reason}"
        assert counters.get(key, 0) >= 1, (key, counters)
    assert counters["data/bad_samples"] >= len(expected)
    assert "left out of sa1b: 1 " in log, "a JSON file whose image is not there"
    assert summary(out)["steps"] >= 1


def test_too_many_bad_samples_stop_the_run(demo, tmp_path):
    for path in (demo / "sa1b").glob("*.jpg"):
        path.write_bytes(b"not an image")
    flags = [*BASE, "--sa1b_dir", str(demo / "sa1b"), "--output_dir", str(tmp_path / "run"), "--max_steps", "3"]
    result = run([*flags, "--cfg-options", "data.max_bad_grace=1"], tmp_path)
    assert result.returncode == 2
    assert "bad" in result.stderr


class Attack:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_pickle_with_code_is_refused_outright(demo, tmp_path):
    target = next((demo / "ref_seg" / "refcoco").glob("refs*.p"))
    target.write_bytes(pickle.dumps([Attack()], protocol=2))
    flags = [*BASE, "--refcoco_dir", str(demo / "ref_seg"), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    result = run(flags, tmp_path)
    assert result.returncode == 2
    assert "print" in result.stderr
    assert "this must never run" not in result.stdout


def test_a_damaged_set_gives_the_same_run_twice(demo, tmp_path):
    damage(demo)
    flags = [*BASE, *data_flags(demo), "--batch_size", "2", "--max_steps", "2", "--gradient_accumulation_steps", "1"]
    flags += ["--cfg-options", "data.max_bad_fraction=1.0"]
    # One of them is started from scratch: with a hash seed of its own.
    for name, python in (("one", ""), ("two", sys.executable)):
        train([*flags, "--output_dir", str(tmp_path / name)], tmp_path, python=python)
    one, two = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    keep = ("loss", "grad_norm", "counters")
    assert [{k: json.loads(r)[k] for k in keep} for r in one] == [{k: json.loads(r)[k] for k in keep} for r in two]
    shutil.rmtree(tmp_path / "one")

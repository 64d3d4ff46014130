"""Bad regions on two ranks: every rank counts those of both, so that all stop together. Two gloo processes."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_rank_faults import log_of, pair

pytestmark = pytest.mark.distributed


def write_coco(root: Path) -> None:
    """Four images; every second one has an annotation without a polygon beside a good one."""
    square = [[2, 2, 20, 2, 20, 20, 2, 20]]
    (root / "images").mkdir(parents=True)
    images = [{"id": number, "file_name": f"{number}.png", "height": 30, "width": 40} for number in range(4)]
    annotations = [{"id": number, "image_id": number, "segmentation": square} for number in range(4)]
    annotations += [{"id": 10 + number, "image_id": number, "segmentation": []} for number in (1, 3)]
    for image in images:
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(root / "images" / str(image["file_name"]))
    (root / "a.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def count_as_a_rank(root: str) -> None:
    """Read this rank's half of one step and print what its ledger counts."""
    from accelerate import Accelerator

    from dual_loop.config import Config, DataConfig
    from dual_loop.data.dataset import SkipLedger
    from dual_loop.data.dataset_builder import build_dataset
    from dual_loop.data.mixture import WindowedBatchSampler
    from dual_loop.data.prepare import Geometry, collate
    from dual_loop.training.trainer import Trainer

    accelerator, ledger = Accelerator(cpu=True), SkipLedger(0.1, 0)
    rank = accelerator.process_index
    data = DataConfig(masks_dir=root, index_dir=f"{root}/index{rank}", regions_per_image=2)
    dataset = build_dataset(Config(data=data), Geometry(16, 4, 32, 16))
    keys = WindowedBatchSampler(dataset.stream, 2, world_size=2, rank=rank).keys(0, 0)
    trainer: Any = SimpleNamespace(accelerator=accelerator, progress=SimpleNamespace(samples=Counter()))
    trainer.data = SimpleNamespace(source_names=["masks"], ledger=ledger)
    Trainer._count(trainer, [collate([dataset[key] for key in keys])], [])
    print(json.dumps([trainer.progress.samples["masks"], ledger.as_counters()]), flush=True)


def test_every_rank_counts_the_bad_regions_of_both(tmp_path: Path) -> None:
    write_coco(tmp_path / "mine")
    command = [__file__, str(tmp_path / "mine")]
    with pair([command, command], [tmp_path, tmp_path], tmp_path) as processes:
        assert [process.wait(timeout=60) for process in processes] == [0, 0], log_of(tmp_path, 0) + log_of(tmp_path, 1)
    counts = {"data/bad_regions": 2, "data/bad_regions_distinct": 2, "data/bad_regions/masks/bad_polygon": 2}
    expected = [4, {"data/bad_samples": 0, "data/bad_samples_distinct": 0, **counts}]
    for rank in range(2):
        assert json.loads(log_of(tmp_path, rank).splitlines()[-1]) == expected


if __name__ == "__main__":
    count_as_a_rank(sys.argv[1])

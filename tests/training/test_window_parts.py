"""Micro-batches in parts: the same images, regions and gradients, fewer activations at once."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from dual_loop.config import Config, load_config, resolve_config_path
from dual_loop.errors import ConfigError
from dual_loop.training.window_parts import as_computed, images_at_once, split_window
from dual_loop.types import Batch

from hollow import make_trainer
from small_model import pair_samples, scene_samples, small_batch, small_config


def assert_same(seen: Batch, expected: Batch) -> None:
    for field in fields(Batch):
        left, right = getattr(seen, field.name), getattr(expected, field.name)
        if field.name == "samples":
            assert [sample.sample_id for sample in left] == [sample.sample_id for sample in right]
        elif isinstance(right, torch.Tensor):
            assert torch.equal(left, right), field.name
        else:
            assert left == right, field.name


def test_images_of_a_batch_are_the_batch_of_those_samples() -> None:
    config = small_config()
    samples = [*scene_samples(2), *pair_samples(1), *scene_samples(1)]
    whole = small_batch(config, samples)
    assert len(whole.tiles_per_view) == 5  # a pair has two views
    for start, stop in ((0, 1), (1, 3), (2, 3), (2, 9), (3, 4)):
        assert_same(whole.images(start, stop), small_batch(config, samples[start:stop]))
    assert whole.images(0, 4) is whole


def test_parts_know_where_they_come_from_and_skips_are_told_once() -> None:
    config = small_config()
    window = [small_batch(config, scene_samples(3)), small_batch(config, pair_samples(2))]
    window[0].skipped.append("a sample")  # type: ignore[arg-type]
    parts = split_window(window, 2)
    assert [(part.micro_step, part.first, part.batch.num_images) for part in parts] == [(0, 0, 2), (0, 2, 1), (1, 0, 2)]
    assert [part.batch.skipped for part in parts] == [["a sample"], [], []]
    assert parts[2].batch is window[1]


def config_of(name: str = "bench_mid", **changes: Any) -> Config:
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(resolve_config_path(name), {"train.batch_size": 4, **given})


def test_one_image_at_once_where_it_keeps_a_cpu_busy() -> None:
    assert images_at_once(config_of(), "cpu") == 1
    assert images_at_once(config_of(), "cuda") == 4
    assert images_at_once(config_of("tiny_cpu"), "cpu") == 4
    assert images_at_once(config_of(train__parallel="fsdp"), "cpu") == 4
    chosen = [images_at_once(config_of(speed__images_at_once=choice), "cuda") for choice in ("all", "3", "9")]
    assert chosen == [4, 3, 4]
    with pytest.raises(ConfigError, match="images_at_once"):
        config_of(speed__images_at_once="0")


def test_estimates_look_at_parts() -> None:
    train = as_computed(config_of(speed__images_at_once="3", train__gradient_accumulation_steps=2), "cuda").train
    assert (train.batch_size, train.gradient_accumulation_steps) == (3, 4)
    assert as_computed(config_of(), "cuda") == config_of()


@pytest.mark.parametrize("choice", ["1", "3"])
def test_a_run_in_parts_is_the_run(tmp_path: Path, choice: str) -> None:
    runs = []
    for images in ("all", choice):
        trainer = make_trainer(tmp_path / images, images_at_once=images, batch_size=4)
        trainer.fit()
        runs.append(({k: v.clone() for k, v in trainer.task.model.state_dict().items()}, trainer.summary()))
    for name, tensor in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][name], tensor, rtol=1e-5, atol=1e-6)
    for key in ("sources", "effective_batch"):
        assert runs[0][1][key] == runs[1][1][key]
    assert runs[0][1]["counters"]["data/bad_samples"] == runs[1][1]["counters"]["data/bad_samples"]
    names = [sorted(path.name for path in (tmp_path / images / "panels").iterdir()) for images in ("all", choice)]
    assert names[0] == names[1]


def test_the_samples_of_a_part_are_its_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, images_at_once="3", batch_size=4)
    window = [next(trainer.data.batches(0))]
    trainer.progress.step = 1
    read = [[sample.sample_id for sample in trainer._samples(part)] for part in split_window(window, 3)]
    assert read == [["0", "1", "2"], ["3"]]

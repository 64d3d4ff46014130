"""Windows copied ahead, and micro-batches in parts: the same images, regions and gradients."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from dual_loop.config import load_config
from dual_loop.training.device_prefetch import DevicePrefetch, split_window
from dual_loop.types import Batch

from hollow import HollowData, make_trainer
from small_model import pair_samples, scene_samples, small_batch, small_config
from warm_python import warm_python

CPU = torch.device("cpu")


class Watched:
    """An endless stream of batches that knows how many were asked for."""

    def __init__(self) -> None:
        config = load_config(None, {"train.batch_size": 2, "train.gradient_accumulation_steps": 3})
        self.asked, self.batches = 0, HollowData(config).batches(0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.asked += 1
        return next(self.batches)


@pytest.mark.parametrize("copies_ahead", [False, True])
def test_windows_come_in_the_order_of_the_stream(copies_ahead: bool) -> None:
    source, plain = Watched(), Watched()
    settings = {"train.batch_size": 2, "train.gradient_accumulation_steps": 3, "speed.images_at_once": "all"}
    windows = DevicePrefetch(source, load_config(None, settings | {"speed.prefetch_to_device": copies_ahead}), CPU, 2)
    for number in range(1, 5):
        window = windows.take()
        assert source.asked == 3 * number
        windows.start_next()
        windows.start_next()
        assert source.asked == 3 * (number + copies_ahead)
        expected = [next(plain) for _ in range(3)]
        assert [batch.region_names for batch in window] == [batch.region_names for batch in expected]
        for batch, own in zip(window, expected, strict=True):
            assert torch.equal(batch.region_seeds, own.region_seeds)


def weights_after(folder: Path, ahead: bool, max_steps: int = 4, resume: str | None = None) -> tuple[Any, list[int]]:
    trainer = make_trainer(folder, max_steps=max_steps, save_interval=2, resume=resume)
    speed = dataclasses.replace(trainer.config.speed, prefetch_to_device=ahead)
    trainer.config = dataclasses.replace(trainer.config, speed=speed)
    trainer.restore()
    asked: list[int] = []
    original = trainer.data.batches

    def batches(first_step: int) -> Iterator[Batch]:
        for batch in original(first_step):
            asked.append(int(batch.region_seeds[0]))
            yield batch

    trainer.data.batches = batches  # type: ignore[method-assign]
    trainer.fit()
    return {name: value.detach().clone() for name, value in trainer.parameters.items()}, asked


def test_a_run_that_copies_ahead_trains_the_same_and_asks_for_nothing_after_its_end(tmp_path: Path) -> None:
    plain, asked = weights_after(tmp_path / "plain", False)
    ahead, asked_ahead = weights_after(tmp_path / "ahead", True)
    assert asked == asked_ahead == list(range(8))
    assert plain.keys() == ahead.keys()
    for name, value in plain.items():
        assert torch.equal(ahead[name], value), name


def assert_same(seen: Batch, expected: Batch) -> None:
    for field in fields(Batch):
        left, right = getattr(seen, field.name), getattr(expected, field.name)
        if isinstance(right, torch.Tensor):
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


def test_parts_come_in_order_and_skips_are_told_once() -> None:
    config = small_config()
    window = [small_batch(config, scene_samples(3)), small_batch(config, pair_samples(2))]
    window[0].skipped.append("a sample")  # type: ignore[arg-type]
    parts = split_window(window, 2)
    names = [part.region_names for part in parts[:2]]
    assert names == [window[0].images(0, 2).region_names, window[0].images(2, 3).region_names]
    assert [part.num_images for part in parts] == [2, 1, 2]
    assert [part.skipped for part in parts] == [["a sample"], [], []]
    assert parts[2] is window[1]


@pytest.mark.parametrize("choice", ["1", "3"])
def test_a_run_in_parts_is_the_run(tmp_path: Path, choice: str) -> None:
    runs = []
    for images in ("all", choice):
        trainer = make_trainer(tmp_path / images, images_at_once=images, batch_size=4)
        trainer.fit()
        runs.append(({k: v.clone() for k, v in trainer.task.model.state_dict().items()}, trainer.totals()))
    for name, tensor in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][name], tensor, rtol=1e-5, atol=1e-6)
    first, second = runs[0][1], runs[1][1]
    assert (first.sources, first.effective_batch) == (second.sources, second.effective_batch)
    assert first.counters["data/bad_samples"] == second.counters["data/bad_samples"]
    names = [sorted(path.name for path in (tmp_path / images / "panels").iterdir()) for images in ("all", choice)]
    assert names[0] == names[1]


def test_panels_read_the_images_of_their_parts(tmp_path: Path) -> None:
    """Regions of parts are named by their place in the micro-batch: a wrong one would be refused by its name."""
    trainer = make_trainer(tmp_path, images_at_once="3", batch_size=4, max_steps=1, gradient_accumulation_steps=1)
    read: list[int] = []
    original = trainer.data.samples

    def samples(step: int, images: Any) -> Any:
        assert step == 0
        read.extend(images)
        return original(step, images)

    trainer.data.samples = samples  # type: ignore[method-assign]
    trainer.fit()
    assert sorted(read) == [0, 1, 2, 3]


def test_a_process_that_is_stopped_does_not_hold_up_the_end() -> None:
    """multiprocessing ends its processes by a signal that a stopped one does not hear, and waits for them."""
    program = """
import multiprocessing, os, signal, time
import dual_loop.training.device_prefetch
loader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,), daemon=True)
loader.start()
os.kill(loader.pid, signal.SIGSTOP)
"""
    assert subprocess.run([warm_python(), "-c", program], timeout=30, check=False).returncode == 0

"""Windows copied ahead are the same windows, and the attention kernel that is asked for is the one that runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dual_loop.config import Config, SpeedConfig, load_config
from dual_loop.errors import EnvironmentProblem
from dual_loop.preflight.findings import PROBLEM
from dual_loop.preflight.machine import check_kernels
from dual_loop.training.device_prefetch import WindowFeed
from dual_loop.training.devices import attention_kernel
from dual_loop.types import Batch

from hollow import HollowData, make_trainer

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
    feed = WindowFeed(source, 3, CPU, copies_ahead)
    for number in range(1, 5):
        window = feed.take()
        assert source.asked == 3 * number
        feed.start_next()
        feed.start_next()
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


def config_of(kernel: str) -> Config:
    return Config(speed=SpeedConfig(sdpa_kernel=kernel))


def enabled() -> tuple[bool, bool]:
    backends = torch.backends.cuda
    return backends.flash_sdp_enabled(), backends.math_sdp_enabled()


def test_one_kernel_and_no_other_inside_the_context() -> None:
    before = enabled()
    with attention_kernel(config_of("math"), CPU):
        assert enabled() == (False, True)
    with attention_kernel(config_of("flash"), CPU):
        assert enabled() == (True, False)
    with attention_kernel(config_of("auto"), torch.device("cuda")):
        assert enabled() == before
    assert enabled() == before


def test_the_trainer_computes_the_whole_step_under_the_kernel(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.config = dataclasses.replace(trainer.config, speed=SpeedConfig(sdpa_kernel="math"))
    seen: list[tuple[str, tuple[bool, bool]]] = []
    parts = {"prepare": trainer.task.prepare, "forward": trainer.task.forward}
    for name, original in parts.items():

        def watched(*args: Any, name: str = name, original: Any = original) -> Any:
            seen.append((name, enabled()))
            return original(*args)

        setattr(trainer.task, name, watched)
    backward = torch.Tensor.backward

    def watched_backward(self: torch.Tensor, *args: Any) -> None:
        seen.append(("backward", enabled()))
        backward(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", watched_backward)
        trainer.fit()
    assert {name for name, _ in seen} == {"prepare", "forward", "backward"}
    assert {state for _, state in seen} == {(False, True)}
    assert enabled() == (True, True)


@pytest.mark.parametrize(
    ("kernel", "device", "word"),
    [("efficient", "cpu", "CPU has no"), ("cudnn", "cpu", "CPU has no"), ("flash", "cuda", "takes no mask")],
)
def test_a_kernel_that_cannot_run_is_refused(kernel: str, device: str, word: str) -> None:
    with pytest.raises(EnvironmentProblem, match=word):
        attention_kernel(config_of(kernel), torch.device(device))


def test_preflight_names_what_the_flags_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    speed = SpeedConfig(sdpa_kernel="cudnn", liger=True)
    findings = list(check_kernels(Config(speed=speed)))
    assert [finding.level for finding in findings] == [PROBLEM, PROBLEM]
    assert "speed.liger" in findings[0].what
    assert "speed.sdpa_kernel" in findings[1].what
    assert not list(check_kernels(Config()))

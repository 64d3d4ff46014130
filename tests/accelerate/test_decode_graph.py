"""Recorded decoding steps: on no GPU, and where recording fails, a step stays as it is (tests/emulated_gpu records)."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from dual_loop.accelerate.decode_graph import Recorder, apply

from small_model import small_model


def test_a_step_that_cannot_be_recorded_runs_and_is_said_once(monkeypatch, caplog):
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("no graph here\nsecond line")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    calls: list[int] = []
    recorder = Recorder()
    first = recorder(lambda: calls.append(1))
    second = recorder(lambda: calls.append(2))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            first()
        for _ in range(3):
            second()
    assert calls == [1, 1, 1, 2, 2, 2]
    [record] = caplog.records
    assert "no graph here" in record.getMessage()

    def third() -> None: ...

    assert recorder(third) is third


@pytest.mark.parametrize(
    ("choice", "device", "is_recorded"), [("auto", "cuda", 1), ("auto", "cpu", 0), ("off", "cuda", 0)]
)
def test_steps_are_recorded_on_a_gpu_where_they_shall(choice, device, is_recorded):
    model, _, config = small_model()
    model.after_loading.clear()
    apply(model, dataclasses.replace(config, speed=dataclasses.replace(config.speed, decode_graph=choice)))
    model.finish(torch.device(device))
    assert isinstance(model.repeated, Recorder) == is_recorded

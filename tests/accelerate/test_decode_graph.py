"""Recorded decoding steps: on no GPU, and where recording fails, a step stays as it is (tests/emulated_gpu records)."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from dual_loop.accelerate.decode_graph import Recorder, apply

from small_model import small_model


@pytest.fixture(scope="module")
def model():
    return small_model()[0]


def test_a_step_of_a_cpu_is_itself(model):
    def step() -> None: ...

    assert Recorder(model)(step) is step


def test_a_step_that_cannot_be_recorded_runs_and_is_said_once(model, monkeypatch, caplog):
    monkeypatch.setattr(type(model), "device", property(lambda self: torch.device("cuda")))

    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("no graph here\nsecond line")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    calls: list[int] = []
    recorder = Recorder(model)
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


def test_off_records_nothing():
    model, _, config = small_model()
    off = dataclasses.replace(config, speed=dataclasses.replace(config.speed, decode_graph="off"))
    del vars(model)["repeated"]
    apply(model, off)
    assert "repeated" not in vars(model)
    apply(model, config)
    assert isinstance(model.repeated, Recorder)

"""How the images of a step are shared out among ranks and passes, and the attention kernel that is asked for."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from dual_loop.config import Config, SpeedConfig, TrainConfig, load_config, resolve_config_path
from dual_loop.data.mixture import DrawKey, DrawStream, WindowedBatchSampler
from dual_loop.data.shares import SourceShare
from dual_loop.errors import ConfigError, EnvironmentProblem
from dual_loop.preflight.findings import PROBLEM
from dual_loop.preflight.machine import check_kernels
from dual_loop.serve.loading import find_trained
from dual_loop.training.devices import (
    as_computed,
    build_accelerator,
    choose_arithmetic,
    choose_attention_kernels,
    choose_device,
    gather_objects,
    images_at_once,
    share_out_batch,
)

CPU = torch.device("cpu")


def _config(effective_batch: int | None, batch_size: int = 2) -> Config:
    values = {"effective_batch": effective_batch, "batch_size": batch_size, "gradient_accumulation_steps": 5}
    return load_config(None, {f"train.{name}": value for name, value in values.items() if value is not None})


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 32), (2, 16), (8, 4), (16, 2), (32, 1)])
def test_the_accumulation_follows_from_the_number_of_ranks(world_size: int, accumulation: int) -> None:
    config = _config(64)
    shared = share_out_batch(config, world_size)
    assert shared.train.gradient_accumulation_steps == accumulation
    assert shared.train.batch_size == 2
    # The configuration that was given is left as it was.
    assert config.train.gradient_accumulation_steps == 5


def test_where_memory_decides_a_rank_s_images_are_one_micro_batch() -> None:
    config = _config(64)
    config = dataclasses.replace(config, speed=SpeedConfig(images_at_once="fit"))
    shared = share_out_batch(config, 8)
    assert (shared.train.batch_size, shared.train.gradient_accumulation_steps) == (8, 1)
    with pytest.raises(ConfigError, match=r"shared out evenly; .* expected: a multiple of 7 processes;"):
        share_out_batch(config, 7)


def test_without_an_effective_batch_nothing_changes() -> None:
    config = _config(None)
    assert share_out_batch(config, 3) is config


@pytest.mark.parametrize(("effective_batch", "world_size", "at_once"), [(64, 3, 6), (64, 64, 128), (3, 1, 2)])
def test_images_that_cannot_be_shared_out_are_refused(effective_batch: int, world_size: int, at_once: int) -> None:
    with pytest.raises(ConfigError) as caught:
        share_out_batch(_config(effective_batch), world_size)
    text = str(caught.value)
    assert "--effective_batch" in text
    assert f"seen: {effective_batch}; expected: a multiple of {at_once} = {world_size} processes x 2 images" in text
    assert "choose another --effective_batch, --batch_size or number of processes" in text


def test_ranks_that_run_all_images_of_a_micro_batch_at_once_keep_their_batch_size() -> None:
    config = dataclasses.replace(_config(64), speed=SpeedConfig(images_at_once="fit"))
    assert share_out_batch(config, 4).train.batch_size == 16
    sharded = dataclasses.replace(config, train=dataclasses.replace(config.train, parallel="fsdp"))
    train = share_out_batch(sharded, 4).train
    assert (train.batch_size, train.gradient_accumulation_steps) == (2, 8)


def test_no_image_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.effective_batch"):
        _config(0)


def _step(stream: DrawStream, config: Config, world_size: int, step: int) -> list[DrawKey]:
    """Return what all ranks draw in one optimiser step, in the order of slots."""
    train = share_out_batch(config, world_size).train
    keys: list[DrawKey] = []
    for rank in range(world_size):
        sampler = WindowedBatchSampler(stream, train.batch_size, world_size, rank, train.gradient_accumulation_steps)
        for micro_step in range(train.gradient_accumulation_steps):
            keys += sampler.keys(step, micro_step)
    return sorted(keys, key=lambda key: key.slot)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    times=st.integers(1, 3),
    batch_size=st.integers(1, 3),
    worlds=st.lists(st.sampled_from([1, 2, 4]), min_size=2, max_size=8),
)
def test_a_run_that_changes_its_ranks_draws_what_a_straight_run_draws(
    lengths: list[int], times: int, batch_size: int, worlds: list[int]
) -> None:
    """``worlds`` are the numbers of ranks of one step after the other."""
    train = dataclasses.replace(Config().train, effective_batch=4 * batch_size * times, batch_size=batch_size)
    config = dataclasses.replace(Config(), train=train)
    stream = DrawStream([SourceShare(f"s{index}", length) for index, length in enumerate(lengths)], seed=3)
    drawn = [key for step, world_size in enumerate(worlds) for key in _step(stream, config, world_size, step)]
    assert drawn == [key for step in range(len(worlds)) for key in _step(stream, config, 1, step)]
    assert [key.slot for key in drawn] == list(range(len(drawn)))
    for epoch in range(len(drawn) // stream.epoch_length):
        entries = [(key.source_index, key.entry) for key in drawn[epoch * stream.epoch_length :][: stream.epoch_length]]
        assert sorted(entries) == [(index, entry) for index, length in enumerate(lengths) for entry in range(length)]


@pytest.mark.parametrize("saved_by", [1, 2, 4])
def test_a_position_means_the_same_on_any_number_of_ranks(saved_by: int) -> None:
    stream, config = DrawStream([SourceShare("s", 11)], seed=3), _config(8)
    train = share_out_batch(config, saved_by).train
    state = WindowedBatchSampler(stream, 2, saved_by, 0, train.gradient_accumulation_steps).state_dict(5)
    for world_size in (1, 2, 4):
        accumulation = share_out_batch(config, world_size).train.gradient_accumulation_steps
        sampler = WindowedBatchSampler(stream, 2, world_size, world_size - 1, accumulation)
        sampler.load_state_dict(state)
        assert sampler.start_step == 5
        assert next(iter(sampler)) == sampler.keys(5, 0)


def test_a_process_may_compute_in_one_precision_after_the_other() -> None:
    for precision in ("no", "bf16", "no"):
        accelerator = build_accelerator(Config(train=TrainConfig(mixed_precision=precision)))
        assert accelerator.mixed_precision == precision


def kernel_config(kernel: str) -> Config:
    return Config(speed=SpeedConfig(sdpa_kernel=kernel))


def enabled() -> tuple[bool, ...]:
    backends = torch.backends.cuda
    return (
        *(backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled()),
        *(backends.cudnn_sdp_enabled(), backends.math_sdp_enabled()),
    )


@pytest.fixture
def kernels_as_found() -> Iterator[None]:
    yield
    choose_attention_kernels(Config(), "cpu")


@pytest.mark.usefixtures("kernels_as_found")
@pytest.mark.parametrize(
    ("kernel", "device", "expected"),
    [
        ("auto", "cuda", (True, True, False, True)),
        ("auto", "cpu", (True, True, False, True)),
        ("cudnn", "cuda", (False, False, True, False)),
        ("efficient", "cuda", (False, True, False, False)),
        ("math", "cpu", (False, False, False, True)),
        ("flash", "cpu", (True, False, False, False)),
    ],
)
def test_the_process_takes_the_kernel_and_no_other(kernel: str, device: str, expected: tuple[bool, ...]) -> None:
    choose_attention_kernels(kernel_config(kernel), device)
    assert enabled() == expected


@pytest.mark.usefixtures("kernels_as_found")
def test_training_and_serving_choose_before_they_compute() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    build_accelerator(kernel_config("math"))
    assert enabled() == (False, False, False, True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    find_trained().load(torch.device("cpu"))
    assert enabled() == (True, True, False, True)


@pytest.mark.usefixtures("kernels_as_found")
def test_arithmetic_is_what_the_run_asks_for_and_not_what_one_before_left(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", given.append, raising=False)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    fast = Config(speed=SpeedConfig(tf32=True), train=TrainConfig(deterministic=True))
    for config in (fast, Config()):
        with warnings.catch_warnings(action="error"):
            choose_arithmetic(config, "cuda")
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == config.speed.tf32
        assert torch.are_deterministic_algorithms_enabled() == config.train.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert given == ["expandable_segments:True"] * 2
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")  # the user's own word
    choose_arithmetic(Config(), "cuda")
    choose_arithmetic(Config(), "cpu")
    assert len(given) == 2
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")  # torch before it had the newer name
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", given.append)
    choose_arithmetic(Config(), "cuda")
    assert len(given) == 3


@pytest.mark.parametrize(
    ("kernel", "device", "word"),
    [("efficient", "cpu", "CPU has no"), ("cudnn", "cpu", "CPU has no"), ("flash", "cuda", "takes no mask")],
)
def test_a_kernel_that_cannot_run_is_refused(kernel: str, device: str, word: str) -> None:
    with pytest.raises(EnvironmentProblem, match=word):
        choose_attention_kernels(kernel_config(kernel), device)


def test_preflight_names_what_the_flags_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    speed = SpeedConfig(sdpa_kernel="cudnn", liger=True)
    findings = list(check_kernels(Config(speed=speed)))
    assert [finding.level for finding in findings] == [PROBLEM, PROBLEM]
    assert "speed.liger" in findings[0].what
    assert "speed.sdpa_kernel" in findings[1].what
    assert not list(check_kernels(Config()))


@pytest.mark.parametrize(("wanted", "kind"), [("auto", "mps"), ("auto", "xpu"), ("cuda", "mps"), ("cuda", None)])
def test_a_device_that_is_not_supported_is_refused(monkeypatch: pytest.MonkeyPatch, wanted: str, kind: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    with pytest.raises(EnvironmentProblem, match=f"--device {wanted}; seen: .*{kind or 'none'}.*--device cpu"):
        choose_device(wanted)
    assert choose_device("cpu") == CPU


def test_a_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for count, index in ((8, 3), (1, 0)):  # one is visible where the launcher gives each process its own
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert choose_device("auto") == torch.device("cuda", index)


def test_gathering_in_one_process_keeps_the_value() -> None:
    assert gather_objects(Accelerator(cpu=True), ["x"]) == [["x"]]


def config_of(name: str = "bench_mid", **changes: Any) -> Config:
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(resolve_config_path(name), {"train.batch_size": 4, **given})


def test_one_image_at_once_where_it_keeps_a_cpu_busy() -> None:
    assert images_at_once(config_of(), "cpu") == 1
    assert images_at_once(config_of(), "cuda") == 4
    assert images_at_once(config_of("tiny_cpu"), "cpu") == 4
    assert images_at_once(config_of("tiny_cpu", data__max_tiles=6), "cpu") == 1
    assert images_at_once(config_of(train__parallel="fsdp"), "cpu") == 4
    chosen = [images_at_once(config_of(speed__images_at_once=choice), "cuda") for choice in ("all", "3", "9")]
    assert chosen == [4, 3, 4]
    with pytest.raises(ConfigError, match="images_at_once"):
        config_of(speed__images_at_once="0")


def test_estimates_look_at_parts() -> None:
    train = as_computed(config_of(speed__images_at_once="3", train__gradient_accumulation_steps=2), "cuda").train
    assert (train.batch_size, train.gradient_accumulation_steps) == (3, 4)
    assert as_computed(config_of(), "cuda") == config_of()

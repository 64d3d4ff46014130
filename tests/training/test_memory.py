"""Which layers recompute, by the memory there is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dual_loop.accelerate import cpu
from dual_loop.config import Config, ConfigError, TrainConfig, load_config, resolve_config_path
from dual_loop.model.build import build_model, build_tokenizer, geometry
from dual_loop.preflight.dry_run import dry_run
from dual_loop.training import memory
from dual_loop.training.devices import share_out_batch
from dual_loop.training.memory import (
    BUSY_TOKENS,
    GIB,
    SHARE_USED,
    LayerMemory,
    LayerPlan,
    MemoryEstimator,
    decide_by_memory,
    estimate_memory,
    estimators,
    first_that_fits,
    measure_layer,
    peak_bytes,
    shape_of_rows,
)

from small_model import recomputed_layers, small_model

LAYERS = 8


def config_of(**overrides: Any) -> Config:
    given = {"model.gradient_checkpointing": True, "speed.checkpoint_layers": "auto"}
    given |= {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(resolve_config_path("bench_mid"), given)


def planner_of(**overrides: Any) -> MemoryEstimator:
    config = config_of(**overrides)
    return MemoryEstimator(config, build_model(config, build_tokenizer(config.model), device="meta"))


def test_what_a_layer_keeps_on_a_gpu_does_not_depend_on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = planner_of(model__dtype="bfloat16").model
    found = set()
    for is_slower in (True, False):
        monkeypatch.setattr(cpu, "is_slower_in_bfloat16", lambda answer=is_slower: answer)
        found.add(measure_layer(model, rows=1, length=64, computes_in="bf16").kept)
    assert len(found) == 1


def test_the_peak_falls_with_every_recomputed_layer_that_saves_something() -> None:
    layer = LayerMemory(kept=20, entry=1)
    assert [peak_bytes(layer, 4, count) for count in range(5)] == [80, 61, 42, 23, 24]


def test_much_memory_recomputes_nothing_and_little_everything_and_between_as_few_as_fit() -> None:
    planner = planner_of()
    needed = [planner.estimate(count).micro_batch / SHARE_USED for count in range(LAYERS + 1)]
    assert needed[0] > needed[4] > needed[6]
    assert planner.decide(needed[0]).recomputed == 0
    assert planner.decide(needed[0] - 1).recomputed == 1
    assert planner.decide(needed[4]).recomputed == 4
    assert planner.decide(needed[4] - 1).recomputed == 5
    scarce = planner.decide(min(needed) - 1)
    assert (scarce.recomputed, scarce.fits) == (LAYERS, False)
    assert "may not fit" in scarce.line()
    assert planner.decide(needed[4]).fits


def test_each_listener_that_was_trained_apart_takes_what_trains_once_more() -> None:
    alone, one, two = (
        planner_of(train__audit_listener="a", reward__listener=listener).estimate(0)
        if listener
        else planner_of().estimate(0)
        for listener in ("", "a", "b")
    )
    assert [found.total - alone.total for found in (one, two)] == [alone.trained, 2 * alone.trained]
    assert planner_of(reward__listener="frozen").estimate(0).total == alone.total


def test_a_number_or_a_trained_encoder_leaves_memory_no_say() -> None:
    assert planner_of(speed__checkpoint_layers="3").decide(1.0).recomputed == 3
    assert planner_of(speed__checkpoint_layers="none").decide(1.0).chosen_by == "setting"
    trained = planner_of(model__trainable=("lora", "vision_tower"))
    assert trained.decide(1e15).recomputed == LAYERS


def plan(monkeypatch: pytest.MonkeyPatch, free_gib: float, of_others: int = 0) -> tuple[Any, Any]:
    """The plan of a real model where so much is free, and another rank wants ``of_others`` layers."""
    config = config_of()
    model = build_model(config, build_tokenizer(config.model))
    planner = MemoryEstimator(config, model)
    monkeypatch.setattr(memory, "free_memory", lambda config, device: free_gib * GIB)

    def gathered(accelerator: Any, own: LayerPlan) -> list[LayerPlan]:
        return [own, dataclasses.replace(own, recomputed=of_others)]

    monkeypatch.setattr(memory, "gather_objects", gathered)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return decide_by_memory([planner], Accelerator(cpu=True), optimizer), model


def test_all_ranks_take_the_most_careful_choice_and_the_model_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    own, model = plan(monkeypatch, 1000.0)
    assert (own.recomputed, recomputed_layers(model)) == (0, 0)
    careful, model = plan(monkeypatch, 1000.0, of_others=5)
    assert (careful.recomputed, recomputed_layers(model)) == (5, 5)
    scarce, model = plan(monkeypatch, 0.0)
    assert (scarce.recomputed, recomputed_layers(model)) == (LAYERS, LAYERS)


def test_gradients_and_moments_are_set_aside() -> None:
    weights = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.AdamW([weights])
    accelerator = Accelerator(cpu=True)
    assert memory.still_to_come(accelerator, optimizer, TrainConfig()) == 3 * 4000
    weights.sum().backward()
    optimizer.step()
    assert memory.still_to_come(accelerator, optimizer, TrainConfig()) == 4000


def test_a_stated_size_counts_what_is_used_already_and_a_container_has_its_own_limit(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    stated = memory.free_memory(config_of(speed__memory_gib=100), cpu)
    assert 90 * GIB < stated < 100 * GIB
    assert memory._group_memory(7.0, tmp_path) == 7.0
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    assert memory._group_memory(7.0, tmp_path) == 500.0
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_memory(7.0, tmp_path) == 7.0


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 8 * GIB}))
    monkeypatch.setattr(memory, "_group_memory", lambda otherwise: otherwise)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory(config_of(), torch.device("cpu")) == 2 * GIB


def test_images_at_a_time_are_as_many_as_keep_a_gpu_busy_and_fit() -> None:
    """Of a rank's 32 images; without memory to look at the first choice stands."""
    options = {"speed.images_at_once": "fit", "train.effective_batch": 32, "data.regions_per_image": 2}
    options["model.gradient_checkpointing"] = True
    config = share_out_batch(load_config(resolve_config_path("bench_mid"), options), 1)
    assert (config.train.batch_size, config.train.gradient_accumulation_steps) == (32, 1)
    model = build_model(config, build_tokenizer(config.model), device="meta")
    choices = estimators(config, model, "cuda")
    counts = [choice.config.train.batch_size for choice in choices]
    rows, length = shape_of_rows(choices[0].config)
    assert counts[0] * 4 == 32, "parts of like size"
    assert rows * length < 2 * BUSY_TOKENS < 3 * rows * length
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 1 < counts[1] < counts[0] < 32
    assert first_that_fits(choices, None).images == counts[0]
    counted = range(choices[0].layers + 1)
    needed = [min(choice.estimate(n).micro_batch for n in counted) / SHARE_USED for choice in choices]
    assert first_that_fits(choices, needed[0]).images == counts[0]
    assert first_that_fits(choices, needed[0] - 1).images == counts[1]
    nothing = first_that_fits(choices, min(needed) - 1)
    assert (nothing.images, nothing.fits) == (1, False)
    assert [choice.config.train.batch_size for choice in estimators(config, model, "cpu")] == [1]
    stated = dataclasses.replace(config, speed=dataclasses.replace(config.speed, images_at_once="all"))
    assert [choice.config.train.batch_size for choice in estimators(stated, model, "cuda")] == [32]


def test_rows_grow_with_what_they_hold() -> None:
    rows, length = shape_of_rows(config_of())
    assert rows == 2
    assert shape_of_rows(config_of(data__regions_per_image=4))[1] > length
    assert shape_of_rows(config_of(policy__caption_gradient="grpo"))[1] > length


def test_every_tile_costs_its_pixels_its_features_and_its_tokens() -> None:
    model, _, whole = small_model()
    cut = dataclasses.replace(whole, data=dataclasses.replace(whole.data, max_tiles=6))
    tile = torch.zeros(1, 3, 64, 64)
    values = whole.train.batch_size * whole.train.gradient_accumulation_steps * 6
    values *= tile.numel() + model.encode_vision(tile).numel()
    estimates = [MemoryEstimator(config, model).without_layers for config in (whole, cut)]
    assert estimates[1].features - estimates[0].features == 4 * values
    assert estimates[1].rollout > estimates[0].rollout
    assert shape_of_rows(cut)[1] - shape_of_rows(whole)[1] == 6 * 64


def test_frames_and_turns_of_signals_are_counted() -> None:
    folder = {"data__sav_dir": "clips", "data__refcoco_dir": "captions"}
    pair, clip = config_of(**folder), config_of(**folder, data__sav_frames=4)
    (rows, length), cells = shape_of_rows(pair), geometry(pair).grid_size ** 2
    assert shape_of_rows(clip) == (rows, length + 2 * cells)
    model = build_model(pair, build_tokenizer(pair.model), device="meta")
    one, three = (MemoryEstimator(config, model).estimate(0) for config in (pair, clip))
    assert three.losses == 3 * one.losses
    assert three.mask_decoder > 2 * one.mask_decoder
    assert three.features > one.features
    for name in ("no_target_weight", "recaption_weight"):
        assert shape_of_rows(config_of(**folder, **{f"loss__{name}": 0.5}))[1] > length
    absent = config_of(**folder, loss__no_target_weight=0.5)
    assert MemoryEstimator(absent, model).estimate(0).mask_decoder > one.mask_decoder


def test_the_dry_run_prints_the_choice_for_a_stated_memory() -> None:
    planner = planner_of()
    sizes = estimate_memory(planner.config, planner.model)[0].rows()
    fixed = sum(size for name, size in sizes.items() if not name.startswith("activations")) / GIB
    for wanted in (0, 4):
        memory = fixed + planner.estimate(wanted).micro_batch / SHARE_USED / GIB + 1e-6
        report = dry_run(config_of(speed__memory_gib=memory))
        assert f"Checkpointing: {wanted} of 8 decoder layers recomputed (memory: about" in report
    assert "8 of 8 decoder layers recomputed (default: about" in dry_run(config_of())
    assert "state speed.memory_gib" in dry_run(config_of())


def test_a_wrong_number_of_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="checkpoint_layers"):
        config_of(speed__checkpoint_layers="some")
    assert config_of(speed__checkpoint_layers=4).speed.checkpoint_layers == "4"

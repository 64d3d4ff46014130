"""Plans: what is counted on hollow tensors is what a real step counts, and follows its sizes; and the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plan_run
import pytest
import torch

from dual_loop.config import load_config, resolve_config_path
from dual_loop.model.build import build_model, build_tokenizer, geometry
from dual_loop.model.decode import Decoder
from dual_loop.training.memory import MemoryEstimator
from dual_loop.training.stop import StopRequest

from bench.phases import PHASES, PhaseClock, ProductCounter, watch, watch_task
from bench.setup import GeneratedData, Setting, build_config, build_trainer
from plan.fake_tensors import HollowMode
from plan.report import (
    ALL_REDUCE,
    Machines,
    memory_parts,
    phase_seconds,
    plan_values,
    report,
    steps_of,
)
from plan.step import CountedStep, PlannedCaptions, count_step

SETTING = Setting("tiny", batch=2, accumulation=1, new_tokens=8, regions=2)
COUNTED = ("vision tower", "prompt prefill", "decode", "language forward", "SAM 2 encoder", "mask decoder", "backward")
RATES = ["--tflops", "0.1", "--utilisation", "1", "--bandwidth_gbs", "10"]


def _plan(**changes: Any) -> CountedStep:
    values = {
        "train.batch_size": 1,
        "train.gradient_accumulation_steps": 1,
        "loop.max_new_tokens": 8,
        "data.regions_per_image": 1,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    config = load_config(resolve_config_path("tiny_cpu"), values)
    return count_step(config, build_tokenizer(config.model))


@pytest.fixture(scope="module")
def small() -> CountedStep:
    return _plan()


def _count_real_step(setting: Setting) -> tuple[PhaseClock, list[list[int]]]:
    """Take a real step with real numbers, as ``bench_step.py`` does in a process of its own; with its captions."""
    config = build_config(setting, "default")
    trainer = build_trainer(config, setting)
    clock, undo, write, captions = PhaseClock(), [], Decoder.write, []

    def remembered(*args: Any, **options: Any) -> list[list[int]]:
        written = write(*args, **options)
        captions.extend(written)
        return written

    try:
        Decoder.write = remembered
        undo += watch_task(trainer.task, lambda: clock, lambda rows: None)
        undo.append(watch(torch.Tensor, "backward", lambda: clock, "backward"))
        with ProductCounter() as clock.counter:
            clock.start()
            trainer.task.train()
            trainer.step(trainer.open_windows(), StopRequest())
            clock.stop()
    finally:
        for end in reversed(undo):
            end()
        Decoder.write = write
    return clock, captions


def test_a_plan_counts_what_a_real_step_counts() -> None:
    real, written = _count_real_step(SETTING)
    config = build_config(SETTING, "default")
    tokenizer = build_tokenizer(config.model)
    window = [next(GeneratedData(SETTING, geometry(config)).batches(0))]
    planned = count_step(config, tokenizer, window=window, captions=PlannedCaptions([], None, written))
    for phase in COUNTED:
        assert real.flops[phase] > 0, phase
        assert planned.flops[phase] == pytest.approx(real.flops[phase], rel=0.01), phase
        assert planned.bytes[phase] == pytest.approx(real.bytes[phase], rel=0.05), phase


def test_decoding_grows_with_the_tokens(small: CountedStep) -> None:
    """n tokens take n - 1 decoding steps and n products with the head; each step reads a longer cache."""
    longer = _plan(loop__max_new_tokens=16)
    ratio = longer.flops["decode"] / small.flops["decode"]
    assert 2.0 < ratio < 2.3
    assert longer.flops["vision tower"] == small.flops["vision tower"]
    assert longer.flops["prompt prefill"] == small.flops["prompt prefill"]
    assert longer.flops["language forward"] > small.flops["language forward"]


def test_steps_that_are_not_run_count_as_if_they_were(monkeypatch: pytest.MonkeyPatch, small: CountedStep) -> None:
    from plan import step as plan

    monkeypatch.setattr(plan, "DECODED_STEPS", 7)
    monkeypatch.setattr(plan, "_add_steps", lambda *_: None)
    whole = _plan()
    assert whole.flops["decode"] == pytest.approx(small.flops["decode"], rel=1e-12)
    assert whole.bytes["decode"] == pytest.approx(small.bytes["decode"], rel=1e-12)


def test_regions_of_an_image_share_it(small: CountedStep) -> None:
    three = _plan(data__regions_per_image=3)
    assert (small.regions, three.regions, three.captions) == (1, 3, 3)
    for phase in ("vision tower", "SAM 2 encoder"):
        assert three.flops[phase] == small.flops[phase]
    assert three.flops["decode"] == pytest.approx(3 * small.flops["decode"], rel=0.05)
    assert small.flops["language forward"] < three.flops["language forward"] < 3 * small.flops["language forward"]


def test_alike_micro_batches_count_as_often_as_there_are(small: CountedStep) -> None:
    four = _plan(train__gradient_accumulation_steps=4)
    for phase in ("vision tower", "SAM 2 encoder", "mask decoder"):
        assert four.flops[phase] == 4 * small.flops[phase]
    assert four.flops["backward"] == pytest.approx(4 * small.flops["backward"], rel=0.05)
    assert four.bytes["optimiser"] == small.bytes["optimiser"] > 0
    assert sum(four.training.values()) < 1.5 * sum(small.training.values())


def test_checkpointing_trades_memory_for_operations(small: CountedStep) -> None:
    other = _plan(model__gradient_checkpointing=True)
    assert other.language_activations["on"] < 0.3 * small.language_activations["off"]
    assert other.flops["backward"] > small.flops["backward"]
    assert other.flops["language forward"] == small.flops["language forward"]


def test_memory_parts_add_up(small: CountedStep) -> None:
    assert sum(memory_parts(small).values()) == pytest.approx(small.peak)
    assert small.training["other"] < 4 * small.trained, "gradients are part of the state, and counted once"
    assert small.state["Adam moments"] == 8 * small.trained
    config = load_config(resolve_config_path("tiny_cpu"))
    meta = build_model(config, build_tokenizer(config.model), device="meta")
    assert MemoryEstimator(config, meta, world_size=2).estimate(0).rows()["DDP buckets (fp32)"] == 4 * small.trained


def test_a_phase_takes_as_long_as_its_tighter_bound(small: CountedStep) -> None:
    flops, moved = small.flops["backward"], small.bytes["backward"]
    assert phase_seconds(small, Machines(1, 1e9, 1e30))["backward"] == pytest.approx(flops / 1e9)
    assert phase_seconds(small, Machines(1, 1e30, 1e9))["backward"] == pytest.approx(moved / 1e9)
    linked = phase_seconds(small, Machines(4, 1e9, 1e9, link_bytes_per_second=1e9))
    assert linked[ALL_REDUCE] == pytest.approx(1.5 * 4 * small.trained / 1e9)
    assert ALL_REDUCE not in phase_seconds(small, Machines(1, 1e9, 1e9, link_bytes_per_second=1e9))


def test_the_report_says_days_and_what_does_not_fit(small: CountedStep) -> None:
    config = load_config(resolve_config_path("tiny_cpu"))
    for size, verdict in ((small.peak - 1, "DOES NOT FIT"), (small.peak + 1, "Fits")):
        values = plan_values(small, Machines(2, 1e12, 1e11, memory_bytes=size), config, steps=1000)
        text = report(values, config)
        assert verdict in text
        assert values["days"] == pytest.approx(values["seconds_a_step"] * 1000 / 86400)
        assert "not measured" in text
        assert "1,000 steps" in text
    assert 0 < values["captioning_share"] < 1
    assert steps_of(101, 2, 10) == 22


def test_the_script_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    options = ["--batch_size", "1", "--gradient_accumulation_steps", "1", "--new_tokens", "5", "--images", "100"]
    assert plan_run.main(["tiny_cpu", "--gpus", "4", *options, *RATES, "--json", str(path)]) == 0
    values, text = json.loads(path.read_text()), capsys.readouterr().out
    assert values["steps"] == 25
    assert f"{values['seconds_a_step']:.4g} s a step" in text
    assert set(values["seconds"]) == set(PHASES)
    assert "DDP buckets (fp32)" in values["memory"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny_cpu", "--gpus", "0", *RATES], "gpus 0"),
        (["tiny_cpu", *RATES, "--cfg-options", "loop.no_such_key=1"], "no_such_key"),
        (["no_such_config", *RATES], "config file not found"),
        (["tiny_cpu", *RATES, "--cfg-options", "train.parallel=fsdp"], "does not cover"),
        (["--check", "no_such_file.json"], "no_such_file.json"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_run.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_no_rate_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan_run.main(["tiny_cpu"])
    assert ended.value.code == 2
    assert "no rate is assumed" in capsys.readouterr().err


def test_a_file_without_its_setting_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"variants": {}, "floor": {}}))
    assert plan_run.main(["--check", str(path)]) == 2
    assert "run scripts/bench_step.py --json again" in capsys.readouterr().err


def _filled(mode: HollowMode, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    with torch.device("meta"):
        model = build()
    mode.fill(model)
    return model


def test_hollow_tensors_are_counted_while_they_live() -> None:
    mode = HollowMode(lambda: "here")
    layer = _filled(mode, lambda: torch.nn.Linear(8, 16))
    assert mode.live == 0
    with mode:
        out = layer(torch.ones(4, 8)).relu()
        assert (tuple(out.shape), out.device.type) == ((4, 16), "cpu")
        assert mode.owned["here"] >= 4 * 4 * 16
        chosen = out[torch.tensor([True, False, True, False])]
        assert len(chosen) == 2
        assert 0 <= float(out.detach().sum()) < 1
        ids = torch.arange(5)
        assert ids.tolist() == [0, 1, 2, 3, 4]
        peak = mode.peak
        del out, chosen, ids
    assert mode.live == 0
    assert mode.peak == peak > 0


def test_weights_that_are_shared_stay_shared() -> None:
    def tied() -> torch.nn.Module:
        pair = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        pair[1].weight = pair[0].weight
        return pair

    model = _filled(HollowMode(), tied)
    assert model[0].weight is model[1].weight  # type: ignore[index]
    assert len(list(model.parameters())) == 3

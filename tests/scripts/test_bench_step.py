"""The measuring stick: what it counts is right, its parts add up, and its JSON holds what it promises. No times."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench_step import run_variants

from dual_loop.accelerate.cpu import PackedLinear, can_pack, pack_frozen_linears, widen_frozen_linears
from dual_loop.config import SpeedConfig

from bench.phases import PHASES, PhaseClock, ProductCounter, watch
from bench.setup import LEVERS, PLAIN, Setting, build_config, variant_speed
from bench.worker import Variant
from warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("bench") / "out.json"
    command = [warm_python(), str(ROOT / "scripts" / "bench_step.py"), "--preset", "tiny", "--plain"]
    command += ["--off", "lean_sam2", "--batch", "2", "--accumulation", "2", "--threads", "1"]
    command += ["--repeats", "1", "--new_tokens", "4", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "plain / default" in done.stdout
    return json.loads(path.read_text())


@pytest.mark.slow
def test_the_json_holds_what_it_promises(results):
    assert set(results["variants"]) == {"default", "plain", "off:lean_sam2"}
    for values in results["variants"].values():
        assert values["seconds"] > 0
        assert values["peak_mb"] > values["peak_above_imports_mb"] > 0
        assert set(values["phases"]) == set(PHASES)
    ratio, (default, plain) = results["ratio_plain"], (results["variants"][name] for name in ("default", "plain"))
    assert ratio["seconds"] == pytest.approx(plain["seconds"] / default["seconds"])
    assert ratio["peak_mb"] == pytest.approx(default["peak_mb"] / plain["peak_mb"])
    assert results["floor"]["flops_per_second"] > 1e9
    assert results["floor"]["bytes_per_second"] > 1e8


@pytest.mark.slow
def test_the_share_of_captions_is_given(results):
    for name in ("default", "plain"):
        assert 0 < results["variants"][name]["caption_share"] < 1


@pytest.mark.slow
def test_a_cold_step_is_the_first_and_counted():
    setting = Setting("tiny", 1, 1, 4, 1)
    cold = run_variants(setting, ["default"], 3, 1, True, is_cold=True)["variants"]["default"]
    assert cold["seconds"] > 0
    assert cold["flops"]["language forward"] > 0


@pytest.mark.slow
def test_the_phases_add_up_to_the_step(results):
    for name, values in results["variants"].items():
        assert sum(values["phases"].values()) == pytest.approx(values["seconds"], rel=0.05), name


@pytest.mark.slow
def test_captions_are_as_long_as_asked_and_step_2_reads_them(results):
    for name, values in results["variants"].items():
        assert [len(ids) for ids in values["captions"]] == [4] * 4, name
        assert values["rejected"] == 0, name
        assert len({tuple(ids) for ids in values["captions"]}) > 1, name


@pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN packed linear layer")
def test_packed_matrices_are_parameters_too():
    setting = Setting("tiny", 1, 1, 4, 1)
    plain, packed = Variant(setting, "off:pack_weights"), Variant(setting, "on:pack_weights")
    assert any(isinstance(module, PackedLinear) for module in packed.trainer.task.model.modules())
    assert packed.end()["parameters"] == plain.end()["parameters"]


@pytest.mark.slow
def test_what_is_shared_is_counted_once(results):
    """Every variant runs the vision tower once an image; what SAM 2's lever saves is seen in the mask decoder."""
    flops = {name: values["flops"] for name, values in results["variants"].items()}
    assert flops["plain"]["vision tower"] == pytest.approx(flops["default"]["vision tower"], rel=1e-6)
    assert flops["off:lean_sam2"]["vision tower"] == flops["default"]["vision tower"] > 0
    assert flops["plain"]["mask decoder"] == pytest.approx(flops["off:lean_sam2"]["mask decoder"], rel=1e-6)
    assert flops["default"]["mask decoder"] < flops["plain"]["mask decoder"]  # two convolutions as one
    assert results["variants"]["default"]["decode_step"]["rows"] == 4  # a step's captions at once
    assert flops["default"]["decode"] > 0


def test_products_are_counted_exactly():
    x, w = torch.randn(3, 5, 7), torch.randn(11, 7)
    with ProductCounter() as counter:
        F.linear(x, w)
    assert counter.flops == 2 * 15 * 7 * 11
    assert counter.bytes >= 4 * (x.numel() + w.numel() + 15 * 11)
    q = torch.randn(2, 3, 6, 8)
    with ProductCounter() as counter, torch.no_grad():
        F.scaled_dot_product_attention(q, q, q)
    assert counter.flops == 2 * (2 * 3 * 6) * 6 * (8 + 8)


@pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN packed linear layer")
def test_packed_products_count_like_plain_ones():
    plain, packed = (torch.nn.Linear(32, 48).requires_grad_(False) for _ in range(2))
    assert pack_frozen_linears(packed) == 1
    x = torch.randn(5, 32, requires_grad=True)
    counts = []
    for layer in (plain, packed):
        with ProductCounter() as counter:
            layer(x).sum().backward()
        counts.append(counter.flops)
    assert counts[0] == counts[1] == 2 * 2 * 5 * 32 * 48


def test_widened_products_count_in_both_directions():
    layer = torch.nn.Linear(32, 48, dtype=torch.bfloat16).requires_grad_(False)
    assert widen_frozen_linears(torch.nn.Sequential(layer)) == 1
    with ProductCounter() as counter:
        layer(torch.randn(5, 32, requires_grad=True)).float().sum().backward()
    assert counter.flops == 2 * 2 * 5 * 32 * 48


def test_a_phase_inside_another_pauses_it_and_backward_keeps_all():
    clock = PhaseClock()
    clock.start()
    with clock.phase("decode"):
        time.sleep(0.02)
        with clock.phase("prompt prefill"):
            time.sleep(0.05)
    with clock.phase("backward"), clock.phase("language forward"):
        time.sleep(0.03)
    clock.stop()
    assert clock.seconds["prompt prefill"] >= 0.05
    assert clock.seconds["decode"] < clock.seconds["prompt prefill"]
    assert clock.seconds["language forward"] == 0
    assert clock.calls["decode"] == clock.calls["prompt prefill"] == 1


def test_a_watched_call_is_booked_and_still_answers():
    class Owner:
        def add(self, a: int, b: int) -> int:
            return a + b

    clock, owner = PhaseClock(), Owner()
    watch(owner, "add", lambda: clock, "losses")
    assert owner.add(2, 3) == 5
    assert clock.calls["losses"] == 1


def test_variants_differ_in_the_named_lever_alone():
    base = SpeedConfig()
    assert variant_speed("default", base) == base
    assert variant_speed("plain", base) == PLAIN
    for lever in LEVERS:
        speed = variant_speed(f"off:{lever}", base)
        changed = [name for name in LEVERS if getattr(speed, name) != getattr(base, name)]
        assert changed == [lever]


def test_sizes_follow_the_arguments():
    from dual_loop.model.build import geometry

    config = build_config(Setting("mid", 2, 4, 16, 3, image_tokens=64, vocabulary=2048), "plain")
    assert geometry(config).grid_size ** 2 == 64
    assert config.model.text["vocab_size"] == 2048
    assert config.model.train_embeddings == "all"
    assert (config.loop.max_new_tokens, config.data.regions_per_image) == (16, 3)


def test_a_configuration_of_the_originals_kind_is_read(tmp_path):
    from golden.synthetic_case import original_config

    path = tmp_path / "config.json"
    original = original_config()
    original["llm_config"]["vocab_size"] = 700
    path.write_text(json.dumps(original))
    config = build_config(Setting(str(path), 1, 1, 4, 1), "default")
    assert config.model.dtype == "float32"
    assert config.model.train_embeddings == "none"

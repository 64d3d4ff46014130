"""A sharded language model trains, captions, evaluates, saves and resumes as the whole one does: two gloo ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dual_loop.testing.demo_data import write_demo_data

from end_to_end import BASE, data_flags, parameters, records, summary, train

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS = 3
SIZE = ["--batch_size", "1", "--gradient_accumulation_steps", "2", "--audit_interval", "2", "--save_interval", "2"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo_data(folder / "data", 6, seed=5, num_val=3)
    return folder / "data"


def trained(demo: Path, tmp_path: Path, name: str, parallel: str, *more: str, steps: int = STEPS) -> Path:
    out = tmp_path / name
    # Three held-out images over two ranks: one rank has more to evaluate than the other.
    held_out = ["--eval_dir", str(demo / "ref_seg")]
    ends = ["--max_steps", str(steps), "--output_dir", str(out), "--parallel", parallel, *more]
    done = train([*BASE, *data_flags(demo), *SIZE, *held_out, *ends], tmp_path, 2)
    assert ("Sharding 3 decoder layers over 2 ranks" in done.stdout) == (parallel == "fsdp")
    return out


@pytest.fixture(scope="module")
def runs(demo: Path, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: trained(demo, folder, name, name) for name in ("ddp", "fsdp")}


def assert_same_weights(first: Path, second: Path, step: int = STEPS) -> None:
    left, right = parameters(first, step), parameters(second, step)
    assert {name: tensor.shape for name, tensor in left.items()} == {n: t.shape for n, t in right.items()}
    differences = torch.cat([(left[name] - right[name]).abs().flatten() for name in left])
    # AdamW turns the rounding of a gradient near zero into a step of either sign.
    assert float(differences.max()) <= 2 * 1e-3 * step
    assert float(differences.mean()) <= 2e-2 * 1e-3 * step


def test_losses_norms_and_what_is_reported_are_those_of_ddp(runs):
    for one, other in zip(records(runs["ddp"]), records(runs["fsdp"]), strict=True):
        for key in ("loss", "mask_loss", "dice_loss", "llm_loss", "grad_norm", "caption_tokens"):
            assert other[key] == pytest.approx(one[key], rel=2e-3, abs=1e-5), (key, one["step"])
        assert other["counters"] == one["counters"]
    for key in ("own_cycle_iou", "frozen_cycle_iou", "kl"):
        values = [[record[key] for record in records(runs[name]) if key in record] for name in ("ddp", "fsdp")]
        assert values[0], key
        assert values[1] == pytest.approx(values[0], rel=2e-2, abs=1e-3), key


def test_parameters_and_averages_are_those_of_ddp(runs):
    assert_same_weights(runs["ddp"], runs["fsdp"])
    left, right = (parameters_of(runs[name], "ema") for name in ("ddp", "fsdp"))
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) <= 2 * 1e-3 * STEPS


def parameters_of(run: Path, kind: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "checkpoints" / f"step_{STEPS:08d}" / f"{kind}.safetensors")


def test_the_evaluation_is_that_of_ddp(runs):
    first, second = (summary(runs[name]) for name in ("ddp", "fsdp"))
    for when in ("before", "after"):
        known = {name for name, value in first[when].items() if value is not None}
        assert known == {name for name, value in second[when].items() if value is not None}
        for name in known:
            assert second[when][name] == pytest.approx(first[when][name], rel=2e-2, abs=2e-2), name


@pytest.mark.parametrize(("start", "end"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_run_goes_on_under_the_other(demo, runs, tmp_path, start, end):
    begun = trained(demo, tmp_path, "run", start, steps=2)
    resumed = trained(demo, tmp_path, "run", end, "--resume", "auto")
    assert resumed == begun
    last, straight = records(resumed)[-1], records(runs["ddp"])[-1]
    assert last["step"] == STEPS
    for key in ("mask_loss", "dice_loss", "llm_loss"):
        assert last[key] == pytest.approx(straight[key], rel=5e-2, abs=1e-3), key

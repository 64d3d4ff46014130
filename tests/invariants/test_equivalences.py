"""What must not change a run: how a batch is split, how many ranks there are, being killed in the middle."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dual_loop.testing.demo_data import write_demo_data

from end_to_end import BASE, command, data_flags, environment, parameters, records, summary, train

pytestmark = pytest.mark.slow

STEPS = 3
PLAIN: list[str] = []
# Every option that teaches the captioner or the segmenter, at once.
LEARNING = [
    *("--caption_gradient", "gumbel+grpo", "--captions_per_region", "3", "--contrast_reward_weight", "0.5"),
    *("--caption_reward_weight", "0.1", "--kl_weight", "0.01", "--cycle_keep", "0.8", "--cycle_drop", "0.0"),
    *("--distill_weight", "0.5", "--align_weight", "0.5", "--audit_interval", "1"),
    *("--cfg-options", "policy.mask_truncated=False"),
]
OPTIONS = pytest.mark.parametrize("options", [PLAIN, LEARNING], ids=["plain", "learning"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo_data(folder / "data", 6, seed=5)
    return folder / "data"


def straight(
    demo: Path, tmp_path: Path, name: str, batch: int, accumulation: int, ranks: int = 1, options: list[str] = PLAIN
) -> Path:
    out = tmp_path / name
    size = ["--batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
    ends = ["--max_steps", str(STEPS), "--output_dir", str(out), *options]
    train([*BASE, *data_flags(demo), *size, *ends], tmp_path, ranks)
    return out


def assert_same_training(first: Path, second: Path) -> None:
    """Same losses and gradient norms at every step, and the same parameters by largest and by mean difference."""
    for one, other in zip(records(first), records(second), strict=True):
        assert one["step"] == other["step"]
        for key in ("loss", "mask_loss", "dice_loss", "llm_loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=2e-3, abs=1e-5), (key, one["step"])
        assert one["other_losses"] == pytest.approx(other["other_losses"], rel=2e-3, abs=1e-5), one["step"]
    left, right = parameters(first, STEPS), parameters(second, STEPS)
    assert left.keys() == right.keys()
    differences = torch.cat([(left[n] - right[n]).abs().flatten() for n in left])
    # AdamW turns the rounding of a gradient near zero into a step of either sign: at most twice the learning rate a
    # step, and only for few parameters.
    assert float(differences.max()) <= 2 * 1e-3 * STEPS
    assert float(differences.mean()) <= 2e-2 * 1e-3 * STEPS


@OPTIONS
def test_accumulation_equals_a_larger_batch(demo, tmp_path, options):
    whole = straight(demo, tmp_path, "whole", batch=2, accumulation=1, options=options)
    split = straight(demo, tmp_path, "split", batch=1, accumulation=2, options=options)
    assert_same_training(whole, split)
    assert summary(whole)["sources"] == summary(split)["sources"]


@pytest.mark.distributed
@OPTIONS
def test_two_ranks_equal_one(demo, tmp_path, options):
    one = straight(demo, tmp_path, "one", batch=2, accumulation=1, options=options)
    two = straight(demo, tmp_path, "two", batch=1, accumulation=1, ranks=2, options=options)
    assert_same_training(one, two)
    pairs = zip(records(one), records(two), strict=True)
    for first, second in pairs:
        for key in ("frozen_cycle_iou", "kl", "zero_variance", "vocabulary", "distinct_2", "seg_probability"):
            assert (first.get(key) is None) == (second.get(key) is None), key
            if first.get(key) is not None:
                assert first[key] == pytest.approx(second[key], rel=5e-3, abs=1e-4), (key, first["step"])
    assert summary(two)["world_size"] == 2
    assert summary(one)["sources"] == summary(two)["sources"]


def test_killed_and_resumed_equals_straight_bitwise(demo, tmp_path):
    """With every option at once; without any it is a test of tests/test_train_dual_loop.py."""
    size = ["--batch_size", "2", "--gradient_accumulation_steps", "2", "--max_steps", "4", "--save_interval", "2"]
    flags = [*BASE, *data_flags(demo), *size, "--keep_checkpoints", "5"]
    straight_run, killed_run = tmp_path / "straight", tmp_path / "killed"
    train([*flags, "--output_dir", str(straight_run), *LEARNING], tmp_path)
    arguments = [*flags, "--output_dir", str(killed_run), "--resume", "auto", *LEARNING]
    process = subprocess.Popen(
        command(arguments), cwd=Path(__file__).parents[2], env=environment(tmp_path), stdout=subprocess.DEVNULL
    )
    checkpoint = killed_run / "checkpoints" / "step_00000002"
    deadline = time.time() + 300
    while not checkpoint.is_dir() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.is_dir()
    assert not (killed_run / "summary.json").exists(), "the run ended before it could be killed"
    # Started from scratch: with a hash seed of its own.
    assert "Resumed from" in train(arguments, tmp_path, python=sys.executable).stdout
    left, right = parameters(straight_run, 4), parameters(killed_run, 4)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert [record["step"] for record in records(killed_run)] == [1, 2, 3, 4]
    pairs = zip(records(straight_run), records(killed_run), strict=True)
    for one, other in pairs:
        same = {key: value for key, value in one.items() if key != "seconds"}
        assert same == {key: value for key, value in other.items() if key != "seconds"}
    assert summary(straight_run)["sources"] == summary(killed_run)["sources"]

"""The options that go beyond the plain loop, alone and all together, on real photographs and two processes."""

from __future__ import annotations

import math

import pytest

from dual_loop.model.build import TINY_WEIGHTS

from end_to_end import records, summary, train

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

OPTIONS = {
    "distillation": ["--distill_weight", "0.5"],
    "caption reward": ["--caption_reward_weight", "0.1"],
    "several objects": ["--regions_per_image", "3", "--contrast_reward_weight", "0.5", "--segment_form", "turns"],
}
TOGETHER = [
    *("--distill_weight", "0.5", "--caption_reward_weight", "0.1", "--regions_per_image", "3"),
    *("--caption_gradient", "gumbel+grpo", "--captions_per_region", "2", "--contrast_reward_weight", "0.5"),
    *("--align_weight", "0.5", "--kl_weight", "0.01", "--cycle_keep", "0.8", "--cycle_drop", "0.1"),
    *("--cycle_score", "likelihood"),
    *("--no_target_weight", "0.5", "--recaption_weight", "0.5", "--sav_frames", "3"),
    *("--length_reward_weight", "0.1", "--reward_listener", "average", "--audit_listener", str(TINY_WEIGHTS)),
]


@pytest.mark.parametrize("options", [*OPTIONS.values(), TOGETHER], ids=[*OPTIONS, "together"])
def test_six_steps_on_two_ranks(real_samples, tmp_path, options):
    out = tmp_path / "run"
    flags = [
        *("--config", "configs/tiny_cpu.py", "--device", "cpu", "--num_workers", "0", "--max_steps", "6"),
        *("--sav_dir", str(real_samples / "sav" / "npz"), "--sa1b_dir", str(real_samples / "sa1b_flat")),
        *("--openimage_dir", str(real_samples / "openimages"), "--refcoco_dir", str(real_samples / "ref_seg")),
        *("--output_dir", str(out), "--log_interval", "1", "--batch_size", "2", "--audit_interval", "3"),
        *("--gradient_accumulation_steps", "1", *options),
    ]
    train(flags, tmp_path, num_processes=2)
    result, last = summary(out), records(out)[-1]
    assert result["steps"] == 6
    assert all(count > 0 for count in result["sources"].values())
    losses = last["other_losses"]
    expected = {
        "--distill_weight": "distill_loss",
        "--align_weight": "align_loss",
        "--kl_weight": "kl_loss",
        "--recaption_weight": "recaption_loss",
        "--no_target_weight": "no_target_loss",
        "--caption_reward_weight": "policy_loss",
        "--contrast_reward_weight": "policy_loss",
    }
    assert set(losses) == {name for flag, name in expected.items() if flag in options}
    assert all(math.isfinite(value) for value in losses.values())
    for name in ("own_cycle_iou", "frozen_cycle_iou", "kl", "vocabulary", "distinct_2", "seg_probability"):
        assert last[name] is not None, name
    assert ("independent_cycle_iou" in last) == ("--audit_listener" in options)
    assert any(name.startswith("gate/") for name in last["counters"])


def test_distillation_in_soft_mask_form_runs_on_masks_and_captions_mixed(demo, tmp_path):
    """0.5 x (2.0 cross-entropy + 0.5 dice) against the masks of the average."""
    flags = [
        *("--config", "configs/tiny_cpu.py", "--device", "cpu", "--num_workers", "0", "--max_steps", "20"),
        *("--sa1b_dir", str(demo / "sa1b"), "--refcoco_dir", str(demo / "ref_seg"), "--regions_per_image", "2"),
        *("--output_dir", str(tmp_path / "run"), "--log_interval", "1", "--batch_size", "1"),
        *("--gradient_accumulation_steps", "1", "--distill_weight", "0.5", "--distill_form", "soft_mask"),
    ]
    train(flags, tmp_path, num_processes=2)
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == list(range(1, 21))
    assert all(count > 0 for count in summary(tmp_path / "run")["sources"].values())
    for record in found:
        assert 0 < record["other_losses"]["distill_loss"] < 10
        assert record["teacher_agrees"] == 1.0, "every object is taught"


def test_segmentation_minus_a_tenth_of_the_reward_on_masks_and_captions_mixed(demo, tmp_path):
    """``loss = segmentation - 0.1 * reward`` and nothing else, also where no region of a step has a reference."""
    flags = [
        *("--config", "configs/tiny_cpu.py", "--device", "cpu", "--num_workers", "0", "--max_steps", "20"),
        *("--sa1b_dir", str(demo / "sa1b"), "--refcoco_dir", str(demo / "ref_seg"), "--captions_per_region", "2"),
        *("--output_dir", str(tmp_path / "run"), "--log_interval", "1", "--batch_size", "1"),
        *("--gradient_accumulation_steps", "1", "--caption_reward_weight", "0.1"),
    ]
    train(flags, tmp_path, num_processes=2)
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == list(range(1, 21))
    assert all(count > 0 for count in summary(tmp_path / "run")["sources"].values())
    for record in found:
        segmentation = record["mask_loss"] + record["dice_loss"] + record["llm_loss"]
        assert -0.1 - 1e-6 <= record["loss"] - segmentation <= 1e-6
        assert record["loss"] - segmentation == pytest.approx(record["other_losses"]["policy_loss"])
        assert "reward_cycle" not in record
        assert record["reward_caption"] is None or 0 <= record["reward_caption"] <= 1
    without = [record for record in found if record["reward_caption"] is None]
    assert 0 < len(without) < 20
    assert all(record["other_losses"]["policy_loss"] == 0 for record in without)
    assert found[-1]["counters"]["caption/no_reward"] == summary(tmp_path / "run")["sources"]["sa1b"]

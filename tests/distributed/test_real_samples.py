"""Real photographs in all four formats through the real entry on two processes."""

from __future__ import annotations

import pytest

from end_to_end import summary, train

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_six_steps_on_two_ranks_use_every_source(real_samples, tmp_path):
    out = tmp_path / "run"
    flags = [
        *("--config", "configs/tiny_cpu.py", "--device", "cpu", "--num_workers", "0", "--max_steps", "6"),
        *("--sav_dir", str(real_samples / "sav" / "npz"), "--sa1b_dir", str(real_samples / "sa1b_flat")),
        *("--openimage_dir", str(real_samples / "openimages"), "--refcoco_dir", str(real_samples / "ref_seg")),
        *("--output_dir", str(out), "--log_interval", "1"),
    ]
    train(flags, tmp_path, num_processes=2)
    result = summary(out)
    assert result["steps"] == 6
    assert result["world_size"] == 2
    assert set(result["sources"]) == {"sav", "sa1b", "openimages", "refcoco"}
    assert all(count > 0 for count in result["sources"].values())
    assert list((out / "panels").glob("*.png"))
    assert (out / "metrics.jsonl").read_text().count("\n") == 6

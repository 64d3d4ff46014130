"""The on-disk cache of frozen features: exact, keyed by content, bounded, repaired."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dual_loop.errors import ConfigError, EnvironmentProblem
from dual_loop.loop.feature_cache import FeatureCache

from small_model import scene_samples, small_batch, small_model


@pytest.fixture
def parts():
    return small_model()


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_what_is_read_is_what_was_computed(parts, tmp_path, monkeypatch):
    model, _, config = parts
    batch = small_batch(config, scene_samples(3))
    expected = model.encode_vision(batch.pixel_values), model.encode_grounding(batch.g_pixel_values)
    first = FeatureCache(model, tmp_path, 1.0)
    seen = first.see(batch)
    assert torch.equal(seen.vision, expected[0])
    assert len(seen.levels) == len(expected[1])
    assert all(map(torch.equal, seen.levels, expected[1]))
    assert (first.num_read, first.num_computed) == (0, 6)
    second = FeatureCache(model, tmp_path, 1.0)
    second.is_announced = True  # what an image takes is measured with the encoders
    monkeypatch.setattr(model, "encode_vision", None)
    monkeypatch.setattr(model, "encode_grounding", None)
    seen = second.see(batch)
    assert torch.equal(seen.vision, expected[0])
    assert len(seen.levels) == len(expected[1])
    assert all(map(torch.equal, seen.levels, expected[1]))
    assert (second.num_read, second.num_computed) == (6, 0)
    assert second.used == sum(path.stat().st_size for path in files(tmp_path))


def test_other_images_and_other_weights_are_not_mistaken(parts, tmp_path):
    model, _, config = parts
    first, second = (small_batch(config, scene_samples(2)[k : k + 1]) for k in range(2))
    cache = FeatureCache(model, tmp_path, 1.0)
    cache.see(first)
    cache.see(second)
    assert (cache.num_read, cache.num_computed) == (0, 4)
    with torch.no_grad():
        next(model.mllm.model.vision_tower.parameters()).add_(1.0)
    changed = FeatureCache(model, tmp_path, 1.0)
    assert torch.equal(changed.see(first).vision, model.encode_vision(first.pixel_values))
    assert (changed.num_read, changed.num_computed) == (1, 1), "SAM 2's weights are the same"


def test_nothing_is_written_over_the_limit_and_everything_is_still_right(parts, tmp_path):
    model, _, config = parts
    batch = small_batch(config, scene_samples(2))
    cache = FeatureCache(model, tmp_path, 0.0)
    assert torch.equal(cache.see(batch).vision, model.encode_vision(batch.pixel_values))
    assert files(tmp_path) == []
    assert cache.num_not_stored == 4


def test_a_damaged_file_is_computed_and_written_again(parts, tmp_path):
    model, _, config = parts
    batch = small_batch(config, scene_samples(1))
    expected = FeatureCache(model, tmp_path, 1.0).see(batch)
    whole = {path: path.read_bytes() for path in files(tmp_path)}
    assert len(whole) == 2
    for path, content in whole.items():
        path.write_bytes(content[: len(content) // 2])
    found = FeatureCache(model, tmp_path, 1.0).see(batch)
    assert torch.equal(found.vision, expected.vision)
    assert torch.equal(found.vision, model.encode_vision(batch.pixel_values))
    assert all(map(torch.equal, found.levels, expected.levels))
    assert {path: path.read_bytes() for path in files(tmp_path)} == whole


def test_an_encoder_that_trains_is_refused(parts, tmp_path):
    model, _, _ = parts
    next(model.grounding_encoder.vision_encoder.parameters()).requires_grad_(True)
    with pytest.raises(ConfigError, match="grounding encoder trains"):
        FeatureCache(model, tmp_path, 1.0)


def test_a_folder_that_cannot_be_made_is_an_error(parts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="feature cache"):
        FeatureCache(parts[0], tmp_path / "file" / "below", 1.0)


def test_the_size_is_announced_before_anything_is_written(parts, tmp_path):
    model, _, config = parts
    batch = small_batch(config, scene_samples(2))
    cache = FeatureCache(model, tmp_path, 0.001, 1_000_000)
    line = cache.announcement(batch)
    assert files(tmp_path) == []
    assert "1,000,000 images" in line
    assert "computed anew" in line
    cache = FeatureCache(model, tmp_path, 1.0)
    cache.see(batch)
    assert cache.used == pytest.approx(cache.bytes_of(batch), rel=0.05)

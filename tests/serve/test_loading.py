"""From a path to a model in use: what is loaded by default, what is said of it, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_run import write_small_run

from dual_loop.checkpoint import manifest
from dual_loop.checkpoint.manifest import hash_file
from dual_loop.errors import CheckpointError, EnvironmentProblem
from dual_loop.model.build import TINY_WEIGHTS
from dual_loop.serve import loading
from dual_loop.serve.loading import find_run, find_trained
from dual_loop.serve.predictor import Predictor

CPU = torch.device("cpu")


def test_nothing_given_is_the_tiny_checkpoint() -> None:
    loaded = find_trained().load(CPU)
    assert loaded.origin == {"path": "the tiny checkpoint in the package", "sha256": hash_file(TINY_WEIGHTS)}
    assert loaded.config.model.initial_weights == "tiny"
    assert not loaded.model.training


def test_weights_by_their_path_with_settings_over_the_configs() -> None:
    loaded = find_trained(TINY_WEIGHTS, overrides={"loop.max_new_tokens": 3}).load(CPU)
    assert loaded.origin["path"] == str(TINY_WEIGHTS)
    assert loaded.config.loop.max_new_tokens == 3


def test_a_run_is_served_by_hashing_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, hashed = write_small_run(tmp_path / "run"), []
    for module in (manifest, loading):
        monkeypatch.setattr(module, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    loaded = find_trained(tmp_path / "run").load(CPU)
    assert loaded.origin["checkpoint"] == checkpoint.name
    assert loaded.origin["sha256"] == hash_file(checkpoint / "ema.safetensors")
    assert sorted(hashed) == ["ema.safetensors", "model.safetensors", "optimizer.pt", "rng_0.pt", "state.json"]


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such run or weights"):
        find_trained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a run folder"):
        find_run(tmp_path)
    with pytest.raises(CheckpointError, match="no weights are given"):
        find_trained(config="tiny_cpu", overrides={"model.initial_weights": None})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this checks a machine without CUDA")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_read() -> None:
    with pytest.raises(EnvironmentProblem, match="no GPU is visible"):
        Predictor.load("nowhere", device="cuda")

"""Weights by the name that a hub gives them: out of a cache that these tests make, without any network."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from dual_loop.checkpoint.importer import load_weights, tokenizer_folder, weights_sources
from dual_loop.checkpoint.sources import guess_load_checkpoint
from dual_loop.cli import main as cli
from dual_loop.config import Config, in_cache, load_config, resolve_config_path
from dual_loop.errors import CheckpointError, ConfigError
from dual_loop.model.build import TINY_WEIGHTS, build_model, build_tokenizer
from dual_loop.serve.loading import find_trained
from dual_loop.train_dual_loop import check_paths

OLD, NEW, NAME = "0" * 39 + "a", "0" * 39 + "b", "Some-One/tiny.model"
KEYS = ("train.pretrained_pth", "train.model_path", "train.sam2_path", "train.audit_listener", "reward.listener")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with two commits of one model; ``main`` is the newer one. The working directory is empty."""
    root = tmp_path / "cache"
    for commit, value in ((OLD, 1.0), (NEW, 2.0)):
        folder = root / "models--Some-One--tiny.model" / "snapshots" / commit
        folder.mkdir(parents=True)
        save_file({"value": torch.tensor([value])}, folder / "model.safetensors")
    for ref, commit in (("main", NEW), ("refs/pr/1", OLD)):
        file = folder.parents[1] / "refs" / ref
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder.parent


def test_a_name_is_its_newest_commit_or_the_revision_that_is_asked_for(cache):
    assert in_cache(NAME) == str(cache / NEW)
    assert in_cache(f"{NAME}@{OLD}") == in_cache(f"{NAME}@refs/pr/1") == str(cache / OLD)
    assert guess_load_checkpoint(f"{NAME}@{OLD}")["value"] == 1


def test_a_path_that_is_there_wins(cache):
    Path(NAME).mkdir(parents=True)
    assert in_cache(NAME) == NAME


def test_a_path_of_another_machines_cache_is_found_by_name_and_commit(cache):
    there = f"/far/away/hub/models--Some-One--tiny.model/snapshots/{OLD}"
    assert in_cache(there) == str(cache / OLD)
    assert in_cache(there.replace(OLD, "c" * 40)) == there.replace(OLD, "c" * 40)


def test_every_setting_of_weights_takes_a_name_and_no_other_does(cache):
    config = load_config(overrides={**dict.fromkeys(KEYS, NAME), "data.sa1b_dir": NAME, "model.tokenizer": NAME})
    got = [getattr(getattr(config, group), name) for group, name in (key.split(".") for key in KEYS)]
    assert [*got, config.model.tokenizer] == [str(cache / NEW)] * 6
    assert config.data.sa1b_dir == NAME
    assert tokenizer_folder(config) == str(cache / NEW)


@pytest.mark.parametrize("name", ["../x", "a/..", "a/b--c", "a/b/c", "a", "", "/a/b", "a/b@", "Some-One/tiny.model@no"])
def test_what_is_no_name_or_not_there_stays_as_it_is(cache, name):
    assert in_cache(name) == name


def test_no_name_revision_or_reference_leads_out_of_the_cache(cache, tmp_path):
    """Each of the folders is there and would be taken, if names were only joined."""
    other = tmp_path / "cache" / "models--evil--x" / "snapshots" / NEW
    shutil.copytree(cache / NEW, other)
    outside = tmp_path / "other" / "models--Some-One--tiny.model" / "snapshots" / NEW
    shutil.copytree(cache / NEW, outside)
    (tmp_path / "secret").write_text(NEW)
    refs = cache.parent / "refs"
    for target in ("../../models--evil--x/snapshots", "../../../other/models--Some-One--tiny.model/snapshots"):
        (refs / "bad").write_text(f"{target}/{NEW}")
        assert (cache / target / NEW).is_dir()
        assert in_cache(f"{NAME}@bad") == f"{NAME}@bad"
    (cache / ("d" * 40)).symlink_to(outside)
    for revision in ("../../../secret", "..", "d" * 40):
        assert in_cache(f"{NAME}@{revision}") == f"{NAME}@{revision}"


def test_what_is_not_in_the_cache_is_one_message_that_says_how_to_fetch_it(cache, capsys):
    name, fix = "ByteDance/Sa2VA-4B", "hf download ByteDance/Sa2VA-4B"
    with pytest.raises(CheckpointError, match=fix):
        find_trained(name)
    with pytest.raises(CheckpointError, match=fix):
        guess_load_checkpoint(name)
    with pytest.raises(CheckpointError, match=fix):
        build_tokenizer(Config().model, name)
    with pytest.raises(ConfigError, match=f"(?s){fix}.*{fix} --revision v1"):
        check_paths(load_config(overrides={"train.model_path": name, "train.sam2_path": f"{name}@v1"}))
    assert cli(["caption", "x.png", "--checkpoint", name]) == 2
    text = capsys.readouterr().err
    assert text.count("error: ") == text.count(fix) == 1
    with pytest.raises(CheckpointError, match=r"check the path$"):
        guess_load_checkpoint("weights.pth")


def test_half_a_download_says_how_to_get_the_rest(cache):
    (cache / NEW / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"no weights.*hf download {NAME} --revision {NEW}"):
        guess_load_checkpoint(NAME)


def test_a_pickle_in_the_cache_is_refused(cache, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (cache / NEW / "model.safetensors").unlink()
    (cache / NEW / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(CheckpointError, match=r"refused|cannot be read"):
        guess_load_checkpoint(NAME)
    assert not (tmp_path / "ran").exists()


def test_the_commit_is_written_down(cache):
    shutil.copy(TINY_WEIGHTS, cache / NEW / "model.safetensors")
    assert find_trained(NAME).origin["hub"] == f"{NAME}@{NEW}"
    config = load_config(resolve_config_path("tiny_cpu"), {"train.pretrained_pth": NAME})
    model = build_model(config, build_tokenizer(config.model), device="cpu", weights_imported=True)
    report = load_weights(model, weights_sources(config))
    assert dataclasses.asdict(report)["sources"][0]["hub"] == f"{NAME}@{NEW}"
    assert f"{NAME}@{NEW}: native, full" in str(report)
    assert json.loads(json.dumps(config.to_dict()))["train"]["pretrained_pth"] == str(cache / NEW)

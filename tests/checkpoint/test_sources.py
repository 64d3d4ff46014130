"""Finding and reading files of weights, and refusing what is unsafe or damaged."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from dual_loop.checkpoint.sources import (
    consolidate_zero,
    guess_load_checkpoint,
    has_weights,
    is_zero_folder,
    open_checkpoint,
)
from dual_loop.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def same(found):
    return found.keys() == TENSORS.keys() and all(torch.equal(found[k], v) for k, v in TENSORS.items())


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t, "meta": {}}, lambda t: {"model": t}])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_bare_and_wrapped(tmp_path, wrap, zipped):
    path = tmp_path / "weights.pth"
    torch.save(wrap(TENSORS), path, _use_new_zipfile_serialization=zipped)
    assert same(guess_load_checkpoint(path))
    info = open_checkpoint(path).tensors["b"]
    assert (info.shape, info.dtype) == ((2,), torch.bfloat16)


def test_a_folder_named_like_a_file(tmp_path):
    folder = tmp_path / "sa2va_4b_iter152k_fp32.pth"
    folder.mkdir()
    torch.save(TENSORS, folder / "pytorch_model.bin")
    assert same(guess_load_checkpoint(folder))
    assert has_weights(folder)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_shards_behind_an_index(tmp_path, kind):
    names = [f"part-{k}.{kind}" for k in range(2)]
    for name, (key, tensor) in zip(names, TENSORS.items(), strict=True):
        save = torch.save if kind == "bin" else save_file
        save({key: tensor}, tmp_path / name)
    index = "pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json"
    (tmp_path / index).write_text(json.dumps({"weight_map": dict(zip(TENSORS, names, strict=True))}))
    assert same(guess_load_checkpoint(tmp_path))
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"shards are missing.*{names[1]}"):
        open_checkpoint(tmp_path)


def test_a_key_in_two_shards_or_twice_in_the_index_is_refused(tmp_path):
    for k in range(2):
        save_file(TENSORS, tmp_path / f"part-{k}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a.weight": "part-0.safetensors", "b": "part-1.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"a key is there twice.*part-0.*part-1.*a\.weight"):
        open_checkpoint(tmp_path)
    index.write_text('{"weight_map": {"a.weight": "part-0.safetensors", "a.weight": "part-1.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"a key is listed twice.*a\.weight"):
        open_checkpoint(tmp_path)


def test_an_index_cannot_point_outside_of_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"outside of its folder.*\.\./secret"):
        open_checkpoint(tmp_path)


class Malicious:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_with_code_is_refused_and_named(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": TENSORS, "x": Malicious()}, path)
    with pytest.raises(CheckpointError, match=r"could run code.*print"):
        guess_load_checkpoint(path)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"a": Malicious()}))
    with pytest.raises(CheckpointError, match=r"bare\.pth"):
        guess_load_checkpoint(tmp_path / "bare.pth")
    assert "code ran" not in capsys.readouterr().out


def test_damaged_and_foreign_files_are_named(tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save(TENSORS, whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"cannot be read.*cut\.pth"):
        open_checkpoint(tmp_path / "cut.pth")
    torch.save({"state_dict": {"a": 3}}, tmp_path / "numbers.pth")
    with pytest.raises(CheckpointError, match=r"no state dict.*a: int"):
        open_checkpoint(tmp_path / "numbers.pth")
    with pytest.raises(CheckpointError, match="weights not found"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights in this folder"):
        open_checkpoint(tmp_path / "empty")
    assert not has_weights(tmp_path / "empty")


def test_ddp_prefix_is_taken_off(tmp_path):
    torch.save({f"module.{k}": v for k, v in TENSORS.items()}, tmp_path / "ddp.pt")
    assert same(guess_load_checkpoint(tmp_path / "ddp.pt"))


def test_a_zero_folder_without_deepspeed_gives_the_command(tmp_path, monkeypatch):
    shard = tmp_path / "global_step10" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.parent.mkdir()
    shard.write_bytes(b"")
    (tmp_path / "latest").write_text("global_step10")
    assert is_zero_folder(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"deepspeed\.utils\.zero_to_fp32"):
        guess_load_checkpoint(tmp_path)
    (tmp_path / "zero_to_fp32.py").write_text("")
    with pytest.raises(CheckpointError, match=r"python \S+zero_to_fp32\.py"):
        consolidate_zero(tmp_path)


def test_a_zero_folder_goes_through_deepspeeds_own_consolidation(tmp_path, monkeypatch):
    import sys
    import types

    asked = []

    def consolidate(root, tag):
        asked.append((root, tag))
        return {f"module.{k}": v for k, v in TENSORS.items()}

    module = types.ModuleType("deepspeed.utils.zero_to_fp32")
    module.get_fp32_state_dict_from_zero_checkpoint = consolidate
    for name in ("deepspeed", "deepspeed.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "deepspeed.utils.zero_to_fp32", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (tmp_path / "latest").write_text("global_step10")
    assert same(consolidate_zero(tmp_path))
    assert asked == [(str(tmp_path), None)]

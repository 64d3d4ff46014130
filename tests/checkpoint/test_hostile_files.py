"""Files that are no weights, or more than weights: each is named for what it is, and nothing of it runs."""

from __future__ import annotations

import gzip
import json
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dual_loop.checkpoint.key_rules import ORIGINAL, place
from dual_loop.checkpoint.sources import guess_load_checkpoint, open_checkpoint
from dual_loop.checkpoint.store import _load_plain
from dual_loop.config import TRUST_VARIABLE
from dual_loop.errors import CheckpointError

TENSORS = {"mllm.a": torch.ones(2, 2), "text_hidden_fcs.0.bias": torch.zeros(2)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"


class Opens:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def torchscript(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


CASES = {
    "lfs.pth": (LFS, "Git LFS pointer.*git lfs pull"),
    "lfs.safetensors": (LFS, "Git LFS pointer.*git lfs pull"),
    "lfs.bin": (LFS, "Git LFS pointer"),
    "page.pth": (b"\n<!DOCTYPE html><html>429 Too Many Requests", "an HTML page"),
    "page.safetensors": (b"<html><body>log in", "an HTML page"),
    "xml.pth": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "json.pth": (b'{"error": "Repository not found"}', "a JSON document"),
    "empty.pth": (b"", "an empty file"),
    "empty.safetensors": (b"", "an empty file"),
    "packed.pth": (gzip.compress(b"weights"), "a gzip archive"),
    "model.pth": (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    "text.pth": (b"Entry not found", "no file that torch.save wrote"),
    "zeros.pth": (b"\0" * 4096, "cannot be read|no file that torch.save wrote"),
    "pickled.pth": (pickle.dumps({"a": Path("x")}, protocol=2), "could run code.*athlib"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_that_is_no_weights_says_what_it_is(tmp_path: Path, name: str) -> None:
    content, message = CASES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"(?s){message}") as caught:
        open_checkpoint(tmp_path / name)
    assert name in str(caught.value)
    assert "weights_only" not in str(caught.value)
    if not name.endswith(".safetensors"):
        with pytest.raises(CheckpointError) as caught:
            _load_plain(tmp_path / name)  # a state file of a run
        assert "weights_only" not in str(caught.value)


def test_files_under_another_ending_are_told_apart(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.pth")
    torch.save(TENSORS, tmp_path / "b.safetensors")
    torchscript(tmp_path / "c.pt")
    for name, message in (("a.pth", "rename it to .safetensors"), ("b.safetensors", "rename it to .pth")):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="TorchScript") as caught:
        open_checkpoint(tmp_path / "c.pt")
    assert "weights_only" not in str(caught.value)


def test_several_files_in_a_folder_are_named(tmp_path: Path) -> None:
    for number in (1000, 2000):
        torch.save(TENSORS, tmp_path / f"iter_{number}.pth")
    with pytest.raises(CheckpointError, match=r"several files of weights.*give the file itself.*iter_2000\.pth"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module.module.", "model.module."])
def test_names_are_freed_of_what_other_programs_put_before_them(tmp_path: Path, prefix: str) -> None:
    torch.save({"state_dict": {prefix + name: value for name, value in TENSORS.items()}}, tmp_path / "a.pth")
    assert guess_load_checkpoint(tmp_path / "a.pth").keys() == TENSORS.keys()


def test_names_that_only_look_wrapped_stay(tmp_path: Path) -> None:
    native = {"model.vision_tower.x": torch.ones(1), "a.module.b": torch.ones(1)}
    torch.save(native, tmp_path / "a.pth")
    assert guess_load_checkpoint(tmp_path / "a.pth").keys() == native.keys()
    torch.save({"mllm._orig_mod.a": torch.ones(1)}, tmp_path / "b.pth")
    assert list(guess_load_checkpoint(tmp_path / "b.pth")) == ["mllm.a"]


def test_adapters_of_another_name_counts_and_dora() -> None:
    layer = "mllm.model.language_model.base_model.model.model.layers.0.self_attn.q_proj."
    assert place(f"{layer}lora_A.policy.weight", ORIGINAL) == place(f"{layer}lora_A.default.weight", ORIGINAL)
    assert place(f"{layer}lora_A.weight", ORIGINAL) == place(f"{layer}lora_A.default.weight", ORIGINAL)
    assert place("mllm.model.vision_model.embeddings.position_ids", ORIGINAL) == (
        [],
        place("x.num_batches_tracked", ORIGINAL)[1],
    )
    magnitude = place(f"{layer}lora_magnitude_vector.default.weight", ORIGINAL)
    assert magnitude == place(f"{layer}lora_magnitude_vector.policy.weight", ORIGINAL)
    assert magnitude == place(f"{layer}lora_magnitude_vector", ORIGINAL)


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def zero_folder(root: Path, tag: str, poison: Path) -> Path:
    folder = root / tag
    folder.mkdir(parents=True)
    with (folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").open("wb") as stream:
        pickle.dump(Opens(poison), stream)
    return folder


@pytest.fixture
def deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for DeepSpeed with the arguments of its program, which notes what it was asked."""
    package = tmp_path / "site" / "deepspeed" / "utils"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package / "zero_to_fp32.py").write_text(
        "import argparse, pathlib, torch\n"
        "def get_fp32_state_dict_from_zero_checkpoint(root, tag=None):\n"
        "    tag = tag or (pathlib.Path(root) / 'latest').read_text()\n"
        "    assert list((pathlib.Path(root) / tag).glob('*_optim_states.pt')), (root, tag)\n"
        "    return {'module.mllm.a': torch.ones(2)}\n"
        "if __name__ == '__main__':\n"
        "    parser = argparse.ArgumentParser()\n"
        "    for name in ('checkpoint_dir', 'output_dir', '--tag'):\n"
        "        parser.add_argument(name)\n"
        "    args = parser.parse_args()\n"
        "    pathlib.Path(args.output_dir).mkdir()\n"
        "    found = get_fp32_state_dict_from_zero_checkpoint(args.checkpoint_dir, args.tag)\n"
        "    torch.save(found, args.output_dir + '/pytorch_model.bin')\n"
    )
    monkeypatch.syspath_prepend(str(package.parents[1]))
    monkeypatch.setenv("PYTHONPATH", str(package.parents[1]))
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", ["latest", "xtuner", "one tag", "own script"])
def test_a_deepspeed_folder_is_refused_with_a_command_that_works(
    tmp_path: Path, deepspeed: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    root, poison = tmp_path / "work dirs", tmp_path / "ran"
    path = zero_folder(root, "iter_10.pth" if kind == "xtuner" else "global_step10", poison)
    if kind != "xtuner":
        path = root
    if kind in ("latest", "own script"):
        (root / "latest").write_text("global_step10")
    if kind == "own script":
        (root / "zero_to_fp32.py").write_text((deepspeed / "zero_to_fp32.py").read_text())
    with pytest.raises(CheckpointError, match="--trust_deepspeed_pickles") as caught:
        guess_load_checkpoint(path)
    assert not poison.exists()
    words = shlex.split(str(caught.value).partition("installed): ")[2].partition("; then give ")[0])
    assert ("--tag" in words) == (kind in ("xtuner", "one tag"))
    subprocess.run([sys.executable, *words[1:]], check=True, timeout=120)
    out = str(caught.value).partition("; then give ")[2].partition(";")[0]
    assert list(guess_load_checkpoint(out)) == ["mllm.a"]
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    assert list(guess_load_checkpoint(path)) == ["mllm.a"]


def test_several_deepspeed_checkpoints_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)
    for number in (10, 20):
        zero_folder(tmp_path, f"iter_{number}.pth", tmp_path / "ran")
    with pytest.raises(CheckpointError, match=r"iter_10\.pth, iter_20\.pth.*give one of them"):
        guess_load_checkpoint(tmp_path)


def test_trust_is_asked_for_on_the_command_line_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse
    import os

    from dual_loop.config import Config, add_trust_flag

    monkeypatch.setenv(TRUST_VARIABLE, "")
    parser = argparse.ArgumentParser()
    add_trust_flag(parser)
    parser.parse_args([])
    assert not os.environ[TRUST_VARIABLE]
    parser.parse_args(["--trust_deepspeed_pickles"])
    assert os.environ[TRUST_VARIABLE] == "1"
    assert "deepspeed" not in json.dumps(Config().to_dict())

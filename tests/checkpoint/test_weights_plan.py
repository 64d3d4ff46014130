"""Which sources a run starts from."""

from __future__ import annotations

import dataclasses

import torch
from safetensors.torch import save_file

from dual_loop.checkpoint.key_rules import ORIGINAL, export_tensors
from dual_loop.checkpoint.weights_plan import brings_embeddings, tokenizer_folder, weights_sources
from dual_loop.model.build import TINY_WEIGHTS

from small_model import small_config, small_model


def with_paths(initial=None, **paths):
    config = small_config(initial_weights=initial)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **paths))


def written(tmp_path):
    model, prompter, _ = small_model()
    state = {k: v.clone() for k, v in export_tensors(model.state_dict(), ORIGINAL).items()}
    torch.save(state, tmp_path / "full.pth")
    torch.save({k: v for k, v in state.items() if "lora_" in k}, tmp_path / "trimmed.pth")
    (tmp_path / "base").mkdir()
    save_file({"vision_model.x": torch.zeros(1)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    return len(prompter.tokenizer)


def test_a_full_checkpoint_needs_no_base(tmp_path):
    written(tmp_path)
    full, base = str(tmp_path / "full.pth"), str(tmp_path / "base")
    assert weights_sources(with_paths(pretrained_pth=full, model_path=base, sam2_path=full)) == [tmp_path / "full.pth"]


def test_a_trimmed_checkpoint_goes_over_base_and_sam2(tmp_path):
    written(tmp_path)
    config = with_paths(
        pretrained_pth=str(tmp_path / "trimmed.pth"),
        model_path=str(tmp_path / "base"),
        sam2_path=str(tmp_path / "s.pt"),
    )
    assert [path.name for path in weights_sources(config)] == ["base", "s.pt", "trimmed.pth"]


def test_a_folder_with_only_a_tokenizer_brings_no_weights(tmp_path):
    written(tmp_path)
    config = with_paths(pretrained_pth=str(tmp_path / "trimmed.pth"), model_path=str(tmp_path / "words"))
    assert [path.name for path in weights_sources(config)] == ["trimmed.pth"]
    assert tokenizer_folder(config) == str(tmp_path / "words")
    assert tokenizer_folder(with_paths(pretrained_pth=str(tmp_path / "words"))) == str(tmp_path / "words")


def test_named_weights_and_none(tmp_path):
    assert weights_sources(with_paths("tiny")) == [TINY_WEIGHTS]
    assert weights_sources(with_paths()) == []


def test_rows_of_new_tokens_decide_what_trains(tmp_path):
    size = written(tmp_path)
    assert brings_embeddings([tmp_path / "full.pth"], size)
    assert not brings_embeddings([tmp_path / "trimmed.pth"], size)
    assert not brings_embeddings([], size)

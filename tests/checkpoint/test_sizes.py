"""The field's other sizes, on the meta device, and checkpoints as the original's newer code writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dual_loop.checkpoint.exporter import export_weights
from dual_loop.checkpoint.importer import brings_new_tokens, guess_load_checkpoint, load_weights, match_keys
from dual_loop.checkpoint.key_rules import HF_SA2VA, KEPT_ASIDE, ORIGINAL, iterate_export
from dual_loop.config import load_config, resolve_config_path
from dual_loop.model.build import build_model
from dual_loop.preflight.dry_run import meta_tokenizer

from small_model import small_model

SIZES = {
    "sa2va_1b": 1.23e9,
    "sa2va_4b_full": 4.17e9,
    "sa2va_internvl3_2b": 2.46e9,
    "sa2va_internvl3_8b": 8.82e9,
    "sa2va_internvl3_14b": 16.46e9,
}
"""Parameters with SAM 2 and LoRA. With adapters of rank 128 the last two are 8.50 and 15.9 billion."""


def newer(tensors: Iterator[tuple[str, Tensor]] | dict[str, Tensor], padding: int) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as peft writes them that trains the tables whole, with rows of padding behind the vocabulary."""
    for name, tensor in tensors.items() if isinstance(tensors, dict) else tensors:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            part = name.removesuffix(".weight")
            rows = torch.cat([tensor, torch.full_like(tensor[:1], 9.0).expand(padding, -1)]) if padding else tensor
            yield f"{part}.modules_to_save.default.weight", rows
            yield f"{part}.original_module.weight", torch.zeros_like(rows)
        else:
            yield name, tensor


@pytest.mark.parametrize("name", SIZES)
def test_every_key_of_a_size_is_accounted_for_both_ways(name: str) -> None:
    config = load_config(resolve_config_path(name))
    model = build_model(config, meta_tokenizer(config), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(SIZES[name], rel=3e-3)
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("new_token_rows.")}
    for layout in (ORIGINAL, HF_SA2VA):
        keys = {key: tuple(tensor.shape) for key, tensor in iterate_export(state.items(), layout)}
        problems, dropped, filled = match_keys(model, keys)
        assert (problems, dropped, filled) == ([], {}, len(state))
    keys = {key: tuple(tensor.shape) for key, tensor in newer(iterate_export(state.items(), ORIGINAL), 256)}
    problems, dropped, filled = match_keys(model, keys)
    padding = {"rows of padding behind the vocabulary": 2 * 256}
    assert (problems, dropped, filled) == ([], {KEPT_ASIDE: 2, **padding}, len(state))


@pytest.mark.parametrize("padding", [0, 7])
def test_the_newer_form_loads_to_the_same_model(tmp_path: Path, padding: int) -> None:
    model, prompter, config = small_model(seed=1)
    export_weights(model, tmp_path / "older.pth", "original", config, prompter.tokenizer)
    tensors = dict(newer(guess_load_checkpoint(tmp_path / "older.pth"), padding))
    torch.save({"state_dict": tensors}, tmp_path / "newer.pth")
    other, _, _ = small_model(seed=2)
    report = load_weights(other, tmp_path / "newer.pth", tokenizer=prompter.tokenizer)
    own = other.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert report.sources[0].dropped[KEPT_ASIDE] == 2
    assert report.num_new_rows == 0


def test_padding_of_a_base_is_no_row_of_a_new_token(tmp_path: Path) -> None:
    model, prompter, config = small_model(seed=1)
    export_weights(model, tmp_path / "all.pth", "original", config, prompter.tokenizer, merge_lora=True)
    base = {}
    for name, tensor in guess_load_checkpoint(tmp_path / "all.pth").items():
        if "grounding_encoder" in name or "text_hidden_fcs" in name:
            continue
        is_table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        base[name.removeprefix("mllm.model.")] = torch.cat([tensor, tensor[:3] * 0 + 9]) if is_table else tensor
    torch.save(base, tmp_path / "base.pth")
    size = len(prompter.tokenizer)
    assert not brings_new_tokens([tmp_path / "base.pth"], size)
    other, _, _ = small_model(seed=2)
    rest = [tmp_path / "all.pth", tmp_path / "base.pth"]
    load_weights(other, rest, tokenizer=prompter.tokenizer)
    report = load_weights(other, tmp_path / "base.pth", tokenizer=prompter.tokenizer, allow_missing=["grounding_*"])
    assert report.num_new_rows == 5
    table = other.state_dict()["mllm.lm_head.weight"]
    assert len(table) == size
    assert float(table.abs().max()) < 9


def test_more_rows_than_padding_are_another_vocabulary(tmp_path: Path) -> None:
    model, prompter, config = small_model(seed=1)
    export_weights(model, tmp_path / "older.pth", "original", config, prompter.tokenizer)
    torch.save(dict(newer(guess_load_checkpoint(tmp_path / "older.pth"), 2000)), tmp_path / "newer.pth")
    with pytest.raises(Exception, match="rows of the vocabulary"):
        load_weights(small_model(seed=2)[0], tmp_path / "newer.pth", tokenizer=prompter.tokenizer)

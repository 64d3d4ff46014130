"""Weights go where they belong or not at all."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from dual_loop.checkpoint.importer import load_weights
from dual_loop.errors import CheckpointError

from small_model import small_config, small_model


def written(tmp_path, change=lambda state: None):
    model, _, _ = small_model(seed=1)
    state = {k: v.clone() for k, v in model.state_dict().items() if ".lora_" not in k}
    change(state)
    save_file(state, tmp_path / "weights.safetensors")
    return model, tmp_path / "weights.safetensors"


def test_round_trip_with_fresh_adapters(tmp_path):
    source, path = written(tmp_path)
    model, _, _ = small_model(seed=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_weights(model, path)
    for name, tensor in model.state_dict().items():
        expected = before[name] if ".lora_" in name else source.state_dict()[name]
        assert torch.equal(tensor, expected), name
    assert report.num_fresh == sum(".lora_" in name for name in before)


def test_new_token_rows_follow_the_loaded_tables(tmp_path):
    source, path = written(tmp_path)
    model, _, _ = small_model(small_config(train_embeddings="new_tokens"), seed=2)
    load_weights(model, path)
    first = model.new_token_rows.first_id
    count = len(model.new_token_rows.input_rows)
    expected = source.mllm.get_input_embeddings().weight[first : first + count]
    assert torch.equal(model.new_token_rows.input_rows, expected)
    model.sync_new_tokens()
    assert torch.equal(model.mllm.get_input_embeddings().weight[first : first + count], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"mllm.lm_haed.weight": s.pop("mllm.lm_head.weight")}), "nearest: mllm.lm_head.weight"),
        (lambda s: s.update({"text_hidden_fcs.0.bias": torch.zeros(3)}), r"text_hidden_fcs.0.bias: shape \(3,\)"),
        (lambda s: s.pop("text_hidden_fcs.2.weight"), "missing text_hidden_fcs.2.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name_and_changes_nothing(tmp_path, change, message):
    _, path = written(tmp_path, change)
    model, _, _ = small_model(seed=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, path)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_missing_and_foreign_files_are_named(tmp_path):
    model, _, _ = small_model()
    with pytest.raises(CheckpointError, match="weights not found"):
        load_weights(model, tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(model, tmp_path / "text.safetensors")

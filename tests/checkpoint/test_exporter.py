"""What is written is what was there: names, bits, shards, and other programs' own loaders."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration, Sam2Model

from dual_loop.checkpoint import FORMATS
from dual_loop.checkpoint.exporter import collect_video, export_weights, merged
from dual_loop.checkpoint.importer import TABLES, brings_new_tokens, guess_load_checkpoint, load_weights, read_trained
from dual_loop.checkpoint.key_rules import place
from dual_loop.errors import CheckpointError
from dual_loop.model.adapters import trainable_parameters

from small_model import small_config, small_model

VIDEO = {
    "grounding_encoder.sam2_model.no_obj_ptr": torch.randn(1, 32),
    "grounding_encoder.sam2_model.memory_encoder.fuser.layers.0.gamma": torch.randn(32),
}


def exported(tmp_path, file_format, name="out", seed=1, **options):
    config = small_config(**options.pop("model_changes", {}))
    model, prompter, config = small_model(config, seed=seed)
    out = tmp_path / name
    count = export_weights(model, out, file_format, config, prompter.tokenizer, **options)
    return model, prompter, out, count


def assert_same(model, expected, skip=()):
    own, other = model.state_dict(), expected.state_dict()
    for name, tensor in own.items():
        if not any(part in name for part in skip):
            assert torch.equal(tensor, other[name]), name


def merged_twin(model):
    """The same model with LoRA folded in and B zero."""
    twin, _, _ = small_model(seed=9)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, tensor in merged(model.state_dict(), 2.0):
            twin.state_dict()[name].copy_(tensor)
    return twin


@pytest.mark.parametrize("name", ["out", "out.pth", "out.bin"])
def test_original_round_trip_is_bitwise(tmp_path, name):
    model, _, out, count = exported(tmp_path, "original", name, video=VIDEO, max_shard_bytes=200_000)
    other, _, _ = small_model(seed=2)
    report = load_weights(other, out)
    assert_same(other, model)
    assert report.sources[0].dropped == {"video memory: single images do not use it": 2}
    tensors = guess_load_checkpoint(out)
    assert len(tensors) == count
    assert all(torch.equal(tensors[key], value) for key, value in VIDEO.items())
    if name == "out":
        weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert weight_map.keys() == tensors.keys()
        assert len(set(weight_map.values())) > 3
    again = collect_video([out])
    assert again.keys() == VIDEO.keys()
    # And once more: what was read is written the same.
    export_weights(other, tmp_path / "twice.pth", "original", small_config(), None, video=again)
    twice = guess_load_checkpoint(tmp_path / "twice.pth")
    assert twice.keys() == tensors.keys()
    assert all(torch.equal(twice[key], tensors[key]) for key in tensors)


def test_trimmed_holds_what_trains_in_the_originals_order_over_a_base(tmp_path):
    model, _, out, _ = exported(tmp_path, "original-trimmed", "trimmed.pth")
    names = list(guess_load_checkpoint(out))
    marks = ["lora_", "mlp1", "sam_mask_decoder", "text_hidden_fcs", "lm_head", "embed_tokens"]
    order = [next(index for index, mark in enumerate(marks) if mark in name) for name in names]
    assert order == sorted(order)
    assert set(order) == set(range(6))
    _, _, base, _ = exported(tmp_path, "original", "base", seed=3)
    other, _, _ = small_model(seed=2)
    load_weights(other, [base, out])
    trained = (".lora_", "multi_modal_projector", "mask_decoder", "text_hidden_fcs", "lm_head", "embed_tokens")
    own, expected = other.state_dict(), model.state_dict()
    assert all(torch.equal(own[k], expected[k]) for k in own if any(part in k for part in trained))


def test_merged_original_and_released_folder_equal_the_merged_model(tmp_path):
    for file_format, options in (("original", {"merge_lora": True}), ("hf-sa2va", {})):
        model, prompter, out, _ = exported(tmp_path, file_format, file_format, video=VIDEO, **options)
        tensors = guess_load_checkpoint(out)
        assert not any("lora_" in name or "base_layer" in name or "base_model" in name for name in tensors)
        other, _, _ = small_model(seed=2)
        load_weights(other, out, tokenizer=prompter.tokenizer)
        assert_same(other, merged_twin(model), skip=(".lora_",))
    assert "grounding_encoder.sam2_model.memory_encoder.fuser.layers.0.g_weight" in tensors
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in tensors
    config = json.loads((out / "config.json").read_text())
    assert config["llm_config"]["vocab_size"] == len(prompter.tokenizer)
    assert (out / "tokenizer.json").is_file()


def test_native_folders_load_through_transformers_without_a_missing_key(tmp_path):
    model, _, out, _ = exported(tmp_path, "hf-native", max_shard_bytes=200_000)
    twin = merged_twin(model)
    for cls, folder, part in (
        (InternVLForConditionalGeneration, "mllm", twin.mllm),
        (Sam2Model, "sam2", twin.grounding_encoder),
    ):
        loaded, info = cls.from_pretrained(out / folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        expected = {k.replace(".base_layer.", "."): v for k, v in part.state_dict().items() if ".lora_" not in k}
        own = loaded.state_dict()
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[name], expected[name]) for name in own)
    other, _, _ = small_model(seed=2)
    load_weights(other, out)
    assert_same(other, twin, skip=(".lora_",))


KINDS = [{}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}]


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_loads_through_peft_and_over_the_base(tmp_path, kind):
    model, _, out, _ = exported(tmp_path, "adapter", model_changes=kind)
    hidden = torch.randn(1, 6, 32)
    expected = model.run_language(hidden, torch.ones(1, 6), None)
    plain, _, _ = small_model()
    plain.load_state_dict(model.state_dict(), strict=not kind.get("use_dora"))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".lora_B." in name:
                parameter.zero_()
    export_weights(plain, tmp_path / "native", "hf-native", small_config(), small_model()[1].tokenizer)
    mllm = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native" / "mllm")

    class Language(torch.nn.Module):
        """The adapter's own base: a causal language model has its layers under ``model``."""

        def __init__(self):
            super().__init__()
            self.model, self.config = mllm.model.language_model, mllm.config.text_config

        def forward(self, **inputs):
            return self.model(**inputs)

        def prepare_inputs_for_generation(self, *args, **kwargs):
            raise NotImplementedError

    wrapped = PeftModel.from_pretrained(Language(), out)
    found = wrapped.base_model.model.model(inputs_embeds=hidden, attention_mask=torch.ones(1, 6), use_cache=False)
    torch.testing.assert_close(found.last_hidden_state, expected, atol=1e-6, rtol=1e-5)
    _, _, base, _ = exported(tmp_path, "original", "base", seed=1, model_changes=kind)
    other, _, _ = small_model(small_config(**kind), seed=2)
    load_weights(other, [base, out])
    assert_same(other, model)
    assert not any("embed_tokens" in name for name in load_file(out / "trained.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_export_computes_what_the_adapters_do(tmp_path, kind):
    model, _, out, _ = exported(tmp_path, "original", merge_lora=True, model_changes=kind)
    twin, _, _ = small_model(seed=2)
    load_weights(twin, out)
    hidden, mask = torch.randn(1, 6, 32), torch.ones(1, 6)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".lora_B." in name:
                parameter.zero_()
        expected = model.run_language(hidden, mask, None)
        torch.testing.assert_close(twin.run_language(hidden, mask, None), expected, atol=1e-5, rtol=1e-4)
        other, _, _ = small_model(small_config(), seed=1)
        assert (other.run_language(hidden, mask, None) - expected).norm() > 0.01 * expected.norm() or not kind


@pytest.mark.usefixtures("precision")
def test_magnitudes_start_at_the_norms_of_the_rows_and_learn(tmp_path):
    """Over weights that bring none, fresh adapters change nothing, as a model or as a listener's values."""
    _, _, base, _ = exported(tmp_path, "original", merge_lora=True)
    plain, _, _ = small_model(seed=2)
    dora, _, _ = small_model(small_config(use_dora=True), seed=3)
    with torch.no_grad():
        for model in (plain, dora):
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.zero_()
    assert load_weights(dora, base).fresh["LoRA"] == 3 * 7 * 2  # layers x matrices
    load_weights(plain, base)
    hidden, mask = torch.randn(1, 6, 32), torch.ones(1, 6)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if torch.is_autocast_enabled("cpu") else {"atol": 1e-5, "rtol": 1e-4}
    found = dora.run_language(hidden, mask, None)
    torch.testing.assert_close(found, plain.run_language(hidden, mask, None), **tolerance)
    trained = trainable_parameters(dora)
    magnitudes = {name for name in trained if "lora_magnitude_vector" in name}
    found.float().square().sum().backward()
    assert all(trained[name].grad.abs().sum() > 0 for name in magnitudes)
    values = read_trained(dora, [base])
    assert len(magnitudes) == 7 * 2
    assert all(torch.equal(values[name], trained[name]) for name in magnitudes)


def test_adapters_of_another_kind_are_refused_with_the_flag(tmp_path):
    _, _, out, _ = exported(tmp_path, "original", model_changes={"use_dora": True})
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector.*--use_dora on"):
        load_weights(small_model()[0], out)
    _, _, plain, _ = exported(tmp_path, "original", "plain")
    with pytest.raises(CheckpointError, match=r"missing .*lora_magnitude_vector"):
        load_weights(small_model(small_config(use_dora=True))[0], plain)


def test_native_folders_bring_the_rows_of_the_new_tokens_back(tmp_path):
    """They look like a base model's, whose last rows are padding; the tokenizer beside them says that they are not."""
    model, prompter, out, _ = exported(tmp_path, "hf-native")
    other, _, _ = small_model(seed=2)
    assert load_weights(other, out, tokenizer=prompter.tokenizer).num_new_rows == 0
    for table in TABLES:
        assert torch.equal(other.state_dict()[table], model.state_dict()[table])
    assert brings_new_tokens([out], len(prompter.tokenizer))
    for file in (out / "mllm").glob("*token*"):
        file.unlink()
    assert not brings_new_tokens([out], len(prompter.tokenizer))


def test_trained_rows_of_new_tokens_reach_the_files(tmp_path):
    changes = {"train_embeddings": "new_tokens"}
    config = small_config(**changes)
    model, prompter, config = small_model(config, seed=1)
    with torch.no_grad():
        model.new_token_rows.input_rows.add_(1.0)
    first = model.new_token_rows.first_id
    export_weights(model, tmp_path / "out.pth", "original", config, prompter.tokenizer)
    export_weights(model, tmp_path / "adapter", "adapter", config, prompter.tokenizer)
    for path in (tmp_path / "out.pth", tmp_path / "adapter"):
        tensors = guess_load_checkpoint(path)
        [table] = [value for name, value in tensors.items() if "embed_tokens" in name]
        assert torch.equal(table[first : first + 5], model.new_token_rows.input_rows)


def test_dtype_and_rejections(tmp_path):
    _, _, out, _ = exported(tmp_path, "original", "half", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in guess_load_checkpoint(out).values()} == {torch.bfloat16}
    with pytest.raises(CheckpointError, match="unknown export format"):
        exported(tmp_path, "onnx")
    with pytest.raises(CheckpointError, match="a folder, not a file"):
        exported(tmp_path, "hf-native", "x.pth")
    with pytest.raises(CheckpointError, match="LoRA cannot be merged"):
        exported(tmp_path, "adapter", "y", merge_lora=True)
    assert len(FORMATS) == 5


@pytest.mark.slow
def test_the_reference_checkpoint_comes_out_as_it_went_in(golden, tmp_path):
    from dual_loop.model.build import build_model, load_tokenizer_file

    from parity.original_config import config_from_original

    folder = golden / "sa2va_tiny"
    config = config_from_original(json.loads((folder / "config.json").read_text()))
    tokenizer = load_tokenizer_file(folder / "tokenizer.json")
    model = build_model(config, tokenizer)
    source = folder / "checkpoint_full.pth"
    report = load_weights(model, source, tokenizer=tokenizer)
    assert (report.sources[0].layout, report.num_matched) == ("original", 380)
    out = tmp_path / "again.pth"
    export_weights(model, out, "original", config, tokenizer, video=collect_video([source]))
    before, after = guess_load_checkpoint(source), guess_load_checkpoint(out)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    export_weights(model, tmp_path / "trimmed.pth", "original-trimmed", config, tokenizer)
    listed = json.loads((folder / "keys.json").read_text())["trimmed"]
    assert set(guess_load_checkpoint(tmp_path / "trimmed.pth")) == set(listed)


def test_every_exported_key_is_known_on_the_way_back(tmp_path):
    _, _, out, _ = exported(tmp_path, "original", video=VIDEO)
    from dual_loop.checkpoint.key_rules import ORIGINAL

    assert all(place(name, ORIGINAL) is not None for name in guess_load_checkpoint(out))

"""Weights go where they belong or not at all, whatever layout they come in."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import save_file

from dual_loop.checkpoint.importer import (
    brings_new_tokens,
    load_weights,
    read_trained,
    tokenizer_folder,
    weights_sources,
)
from dual_loop.checkpoint.key_rules import HF_SA2VA, ORIGINAL, iterate_export
from dual_loop.errors import CheckpointError
from dual_loop.model.build import TINY_WEIGHTS

from small_model import small_config, small_model

LAYER = "mllm.model.language_model.base_model.model.model.layers.0.self_attn.q_proj"
EMBED = "mllm.model.language_model.base_model.model.model.embed_tokens.weight"
HEAD = "mllm.model.language_model.base_model.model.lm_head.weight"
TRAINED = ("lora_", "mlp1", "sam_mask_decoder", "text_hidden_fcs", "embed_tokens", "lm_head")


def clones(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def native(tmp_path, change=lambda state: None):
    """Write the package's own layout without LoRA; return (model, path)."""
    model, _, _ = small_model(seed=1)
    state = {k: v for k, v in clones(model.state_dict()).items() if ".lora_" not in k}
    change(state)
    save_file(state, tmp_path / "weights.safetensors")
    return model, tmp_path / "weights.safetensors"


def original(tmp_path, change=lambda state: None, name="weights.pth", wrap=lambda s: {"state_dict": s, "meta": {}}):
    """Write the original's training layout with made-up video memory; return (model, path)."""
    model, _, _ = small_model(seed=1)
    state = {k: v.clone() for k, v in iterate_export(model.state_dict().items(), ORIGINAL)}
    state["grounding_encoder.sam2_model.no_obj_ptr"] = torch.zeros(1, 32)
    change(state)
    torch.save(wrap(state), tmp_path / name)
    return model, tmp_path / name


def assert_same(model, expected, skip=()):
    for name, tensor in model.state_dict().items():
        if not any(part in name for part in skip):
            assert torch.equal(tensor, expected.state_dict()[name]), name


def test_native_round_trip_with_fresh_adapters(tmp_path):
    source, path = native(tmp_path)
    model, _, _ = small_model(seed=2)
    before = clones(model.state_dict())
    report = load_weights(model, path)
    assert_same(model, source, skip=(".lora_",))
    adapters = [name for name in before if ".lora_" in name]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in adapters)
    assert report.fresh == {"LoRA": len(adapters)}
    assert report.sources[0].extent == "full"


def test_new_token_rows_follow_the_loaded_tables(tmp_path):
    source, path = native(tmp_path)
    model, _, _ = small_model(small_config(train_embeddings="new_tokens"), seed=2)
    load_weights(model, path)
    first, count = model.new_token_rows.first_id, len(model.new_token_rows.input_rows)
    expected = source.mllm.get_input_embeddings().weight[first : first + count]
    assert torch.equal(model.new_token_rows.input_rows, expected)
    model.sync_new_tokens()
    assert torch.equal(model.mllm.get_input_embeddings().weight[first : first + count], expected)


def test_original_full_checkpoint_with_its_report(tmp_path):
    source, path = original(tmp_path)
    model, prompter, _ = small_model(seed=2)
    report = load_weights(model, path, tokenizer=prompter.tokenizer, hash_files=True)
    assert_same(model, source)
    [entry] = report.sources
    assert (entry.layout, entry.extent, entry.dtypes) == ("original", "full", {"float32": entry.num_tensors})
    assert entry.dropped == {"video memory: single images do not use it": 1}
    assert len(entry.sha256["weights.pth"]) == 64
    assert report.num_matched == len(model.state_dict())
    json.dumps(dataclasses.asdict(report))
    assert "1 dropped" in str(report)
    assert brings_new_tokens([path], len(prompter.tokenizer))


def older_peft(state):
    for name in list(state):
        new = (
            name.replace(".base_layer.", ".")
            .replace(".lora_A.default.", ".lora_A.")
            .replace(".lora_B.default.", ".lora_B.")
        )
        state[new] = state.pop(name)


def test_lora_names_of_older_peft(tmp_path):
    source, path = original(tmp_path, older_peft)
    model, _, _ = small_model(seed=2)
    load_weights(model, path)
    assert_same(model, source)


def merge(state):
    for name in list(state):
        if ".lora_A." in name:
            base = name.replace("lora_A.default", "base_layer")
            b = state.pop(name.replace("lora_A", "lora_B"))
            state[base] = state[base] + 2.0 * b @ state.pop(name)
    for name in list(state):
        state[name.replace("base_model.model.", "").replace(".base_layer.", ".")] = state.pop(name)


def test_a_file_with_merged_lora(tmp_path):
    source, path = original(tmp_path, merge)
    model, _, _ = small_model(seed=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.zero_()
    report = load_weights(model, path)
    assert report.fresh["LoRA"] > 0
    hidden = torch.randn(1, 5, 32)
    mask, merged = torch.ones(1, 5, dtype=torch.bool), model.run_language
    difference = merged(hidden, mask, None) - source.run_language(hidden, mask, None)
    assert difference.abs().max() < 1e-5


def test_trimmed_over_a_base_and_alone(tmp_path):
    base, base_path = original(tmp_path, name="base.pth")

    def trim(state):
        for name in list(state):
            if not any(part in name for part in TRAINED):
                del state[name]
            elif "lora" in name or "text_hidden" in name:
                state[name] = state[name] + 1

    _, path = original(tmp_path, trim, name="trimmed.pth")
    model, _, _ = small_model(seed=2)
    report = load_weights(model, [base_path, path])
    assert [source.extent for source in report.sources] == ["full", "trimmed"]
    assert_same(model, base, skip=(".lora_", "text_hidden_fcs"))
    own, old = model.state_dict(), base.state_dict()
    assert all(torch.equal(own[k], old[k] + 1) for k in own if ".lora_" in k or "text_hidden_fcs" in k)
    with pytest.raises(
        CheckpointError, match=r"trimmed checkpoint or adapter needs its base.*--model_path.*--sam2_path"
    ):
        load_weights(model, path)


@pytest.mark.parametrize("native_names", [False, True])
def test_base_models_separately_with_new_vocabulary_rows(tmp_path, native_names):
    model, prompter, _ = small_model(seed=1)
    full = {k: v.clone() for k, v in iterate_export(model.state_dict().items(), HF_SA2VA) if "lora_" not in k}
    if native_names:
        full = {k.removeprefix("mllm."): v for k, v in clones(model.state_dict()).items() if "lora_" not in k}
        full = {k.replace(".base_layer.", "."): v for k, v in full.items()}
    internvl = {k.replace(".base_layer.", "."): v for k, v in full.items() if not k.startswith(("grounding", "text_h"))}
    for name in internvl:
        if "embed_tokens" in name or "lm_head" in name:
            internvl[name] = internvl[name][:-5].clone()
    prefix = "grounding_encoder." if native_names else "grounding_encoder.sam2_model."
    sam = {k.removeprefix(prefix): v for k, v in full.items() if k.startswith("grounding")}
    (tmp_path / "internvl").mkdir()
    save_file(internvl, tmp_path / "internvl" / "model.safetensors")
    torch.save({"model": sam}, tmp_path / "sam2.pt")
    other, _, _ = small_model(seed=2)
    report = load_weights(other, [tmp_path / "internvl", tmp_path / "sam2.pt"], tokenizer=prompter.tokenizer)
    expected = ["internvl-native", "sam2-native"] if native_names else ["internvl", "sam2"]
    assert [source.layout for source in report.sources] == expected
    assert report.num_new_rows == 5
    assert set(report.fresh) == {"LoRA", "text_hidden_fcs"}
    assert_same(other, model, skip=(".lora_", "text_hidden_fcs", "embed_tokens", "lm_head"))
    table, old = other.mllm.get_input_embeddings().weight, model.mllm.get_input_embeddings().weight
    assert torch.equal(table[:-5], old[:-5])
    assert torch.isfinite(table).all()
    assert not torch.equal(table[-5], table[-4])
    assert not brings_new_tokens([tmp_path / "internvl"], len(prompter.tokenizer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({LAYER + ".base_layer.wieght": s.pop(LAYER + ".base_layer.weight")}),
            r"unknown key \S+q_proj\.base_layer\.wieght \(nearest: \S+q_proj\.base_layer\.weight\)",
        ),
        (lambda s: s.update({"mllm.model.mlp1.0.bias": torch.zeros(3)}), r"mlp1\.0\.bias: shape \(3,\) in the file"),
        (
            lambda s: s.update({LAYER + ".weight": s[LAYER + ".base_layer.weight"]}),
            r"doubled key: \S+q_proj\.weight and \S+q_proj\.base_layer\.weight",
        ),
        (lambda s: s.update({EMBED: torch.cat([s[EMBED], s[EMBED][:1]])}), r"embed_tokens\.weight: shape .*vocabulary"),
        (lambda s: s.pop("text_hidden_fcs.2.weight"), r"missing text_hidden_fcs\.2\.weight.*--allow_missing"),
        (
            lambda s: s.pop(LAYER + ".lora_A.default.weight"),
            r"missing \S+q_proj\.lora_A.*expected as mllm\S+base_model",
        ),
        (lambda s: s.pop(HEAD), r"missing mllm\.lm_head\.weight.*tie_word_embeddings"),
        (
            lambda s: s.pop("grounding_encoder.sam2_model.sam_prompt_encoder.point_embeddings.1.weight"),
            r"missing grounding_encoder\.prompt_encoder\.point_embed\.weight",
        ),
        (
            lambda s: s.update({LAYER + ".lora_A.default.weight": torch.zeros(9, 32)}),
            r"lora_A\.default\.weight: shape \(9, 32\).*--lora_r",
        ),
    ],
    ids=["renamed", "shape", "doubled", "row", "missing", "lora", "head", "piece", "rank"],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(tmp_path, change, message):
    _, path = original(tmp_path, change)
    model, _, _ = small_model(seed=2)
    before = clones(model.state_dict())
    with pytest.raises(CheckpointError, match=r"(?s)" + message):
        load_weights(model, path)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_missing_by_permission_keeps_the_initial_values_and_says_so(tmp_path):
    _, path = original(tmp_path, lambda s: s.pop("text_hidden_fcs.2.weight"))
    model, _, _ = small_model(seed=2)
    before = model.state_dict()["text_hidden_fcs.2.weight"].clone()
    report = load_weights(model, path, allow_missing=["text_hidden_fcs.*"])
    assert report.missing == ["text_hidden_fcs.2.weight"]
    assert "missing by permission: text_hidden_fcs.2.weight" in str(report)
    assert torch.equal(model.state_dict()["text_hidden_fcs.2.weight"], before)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("mllm.model.language_model.model.layers.0.attention.wqkv.weight", "InternLM2.*not supported.*wqkv"),
        ("mllm.model.visual.blocks.0.attn.qkv.weight", "Qwen-VL.*not supported.*visual"),
        ("encoder.weight", "no known layout.*encoder.weight"),
    ],
)
def test_other_architectures_are_refused_before_anything_is_loaded(tmp_path, key, message):
    torch.save({key: torch.zeros(2)}, tmp_path / "other.pth")
    model, _, _ = small_model()
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, tmp_path / "other.pth")


def test_ids_of_new_tokens_are_compared_with_the_folders_own_tokenizer(tmp_path):
    _, _path = original(tmp_path, name="pytorch_model.bin")
    model, prompter, _ = small_model(seed=2)
    right = {t: prompter.tokenizer.convert_tokens_to_ids(t) for t in ("[SEG]", "<p>", "</p>", "<vp>", "</vp>")}
    (tmp_path / "added_tokens.json").write_text(json.dumps(right))
    load_weights(model, tmp_path, tokenizer=prompter.tokenizer)
    (tmp_path / "added_tokens.json").write_text(json.dumps({**right, "[SEG]": 7}))
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: \[SEG\] has id 7, the tokenizer in use says"):
        load_weights(model, tmp_path, tokenizer=prompter.tokenizer)


def test_values_are_cast_to_the_models_dtype(tmp_path):
    source, path = original(tmp_path)
    model, _, _ = small_model(small_config(dtype="bfloat16"), seed=2)
    load_weights(model, path)
    table = model.mllm.get_input_embeddings().weight
    assert table.dtype == torch.bfloat16
    assert torch.equal(table, source.mllm.get_input_embeddings().weight.bfloat16())


# --- what a run starts from -------------------------------------------------------------------------------------------


def starting_from(initial=None, **paths):
    config = small_config(initial_weights=initial)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **paths))


def write_sources(tmp_path):
    model, prompter, _ = small_model()
    state = {k: v.clone() for k, v in iterate_export(model.state_dict().items(), ORIGINAL)}
    torch.save(state, tmp_path / "full.pth")
    torch.save({k: v for k, v in state.items() if "lora_" in k}, tmp_path / "trimmed.pth")
    (tmp_path / "base").mkdir()
    save_file({"vision_model.x": torch.zeros(1)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    return len(prompter.tokenizer)


def test_a_full_checkpoint_needs_no_base(tmp_path):
    write_sources(tmp_path)
    full, base = str(tmp_path / "full.pth"), str(tmp_path / "base")
    assert weights_sources(starting_from(pretrained_pth=full, model_path=base, sam2_path=full)) == [
        tmp_path / "full.pth"
    ]


def test_a_trimmed_checkpoint_goes_over_base_and_sam2(tmp_path):
    write_sources(tmp_path)
    config = starting_from(
        pretrained_pth=str(tmp_path / "trimmed.pth"),
        model_path=str(tmp_path / "base"),
        sam2_path=str(tmp_path / "s.pt"),
    )
    assert [path.name for path in weights_sources(config)] == ["base", "s.pt", "trimmed.pth"]


def test_a_folder_with_only_a_tokenizer_brings_no_weights(tmp_path):
    write_sources(tmp_path)
    config = starting_from(pretrained_pth=str(tmp_path / "trimmed.pth"), model_path=str(tmp_path / "words"))
    assert [path.name for path in weights_sources(config)] == ["trimmed.pth"]
    assert tokenizer_folder(config) == str(tmp_path / "words")
    assert tokenizer_folder(starting_from(pretrained_pth=str(tmp_path / "words"))) == str(tmp_path / "words")


def test_named_weights_and_none(tmp_path):
    assert weights_sources(starting_from("tiny")) == [TINY_WEIGHTS]
    assert weights_sources(starting_from()) == []


def test_rows_of_new_tokens_decide_what_trains(tmp_path):
    size = write_sources(tmp_path)
    assert brings_new_tokens([tmp_path / "full.pth"], size)
    assert not brings_new_tokens([tmp_path / "trimmed.pth"], size)
    assert not brings_new_tokens([], size)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mlp1.", "text_hidden_fcs.0.weight", "sam_mask_decoder", ".base_layer.", "vision"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, name, value):
    broken = []

    def spoil(state):
        broken.append(next(key for key in state if name in key and state[key].is_floating_point()))
        state[broken[0]].view(-1)[-1] = value

    _, path = original(tmp_path, spoil)
    model, _, _ = small_model(seed=2)
    with pytest.raises(CheckpointError, match=f"not finite.*{re.escape(broken[0])}"):
        load_weights(model, path)
    with pytest.raises(CheckpointError, match=f"not finite.*{re.escape(broken[0])}"):
        read_trained(small_model(seed=1)[0], [path])


def test_video_memory_that_is_dropped_may_hold_anything(tmp_path):
    _, path = original(tmp_path, lambda state: state["grounding_encoder.sam2_model.no_obj_ptr"].fill_(float("nan")))
    load_weights(small_model(seed=2)[0], path)

"""The key map: each operation alone, traps by name, and the way back."""

from __future__ import annotations

import pytest
import torch

from dual_loop.checkpoint.key_rules import (
    CANONICAL_RULES,
    HF_SA2VA,
    INTERNVL,
    INTERNVL_NATIVE,
    NATIVE,
    ORIGINAL,
    SAM2,
    SAM2_NATIVE,
    Placement,
    detect_layout,
    find_refused,
    iterate_export,
    place,
    rows,
)

from small_model import small_model

DECODER = "grounding_encoder.sam2_model.sam_mask_decoder."
LANGUAGE = "mllm.model.language_model.base_model.model."


def targets(name, layout=ORIGINAL):
    found = place(name, layout)
    assert found is not None, name
    return [placement.target for placement in found[0]]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("mllm.model.vision_model.encoder.layers.11.ls2", "mllm.model.vision_tower.encoder.layer.11.lambda_2"),
        ("mllm.model.mlp1.3.bias", "mllm.model.multi_modal_projector.linear_2.bias"),
        (LANGUAGE + "lm_head.weight", "mllm.lm_head.weight"),
        (
            LANGUAGE + "model.layers.3.mlp.up_proj.lora_B.default.weight",
            "mllm.model.language_model.layers.3.mlp.up_proj.lora_B.default.weight",
        ),
        # The trap: layers.1 is in the middle of three and at the end of two.
        (
            DECODER + "iou_prediction_head.layers.1.weight",
            "grounding_encoder.mask_decoder.iou_prediction_head.layers.0.weight",
        ),
        (
            DECODER + "transformer.layers.1.mlp.layers.1.bias",
            "grounding_encoder.mask_decoder.transformer.layers.1.mlp.proj_out.bias",
        ),
        (
            DECODER + "transformer.final_attn_token_to_image.out_proj.weight",
            "grounding_encoder.mask_decoder.transformer.final_attn_token_to_image.o_proj.weight",
        ),
        ("text_hidden_fcs.2.weight", "text_hidden_fcs.2.weight"),
    ],
)
def test_copies(name, target):
    assert targets(name) == [target]


def test_split_concatenate_and_share():
    split, _ = place("mllm.model.vision_model.encoder.layers.0.attn.qkv.bias", ORIGINAL)
    assert [(p.target.rsplit(".", 2)[1], p.source_part) for p in split] == [
        ("q_proj", (0, 3)),
        ("k_proj", (1, 3)),
        ("v_proj", (2, 3)),
    ]
    point, _ = place("grounding_encoder.sam2_model.sam_prompt_encoder.point_embeddings.2.weight", ORIGINAL)
    assert point == [Placement("grounding_encoder.prompt_encoder.point_embed.weight", None, (2, 4))]
    matrix = "grounding_encoder.sam2_model.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    assert len(targets(matrix)) == 2
    assert rows(torch.arange(12), (1, 3)).tolist() == [4, 5, 6, 7]


def test_older_and_merged_spellings():
    plain = LANGUAGE + "model.layers.0.self_attn.q_proj"
    base = "mllm.model.language_model.layers.0.self_attn.q_proj"
    assert targets(plain + ".weight") == targets(plain + ".base_layer.weight") == [base + ".base_layer.weight"]
    assert targets(plain + ".lora_A.weight") == [base + ".lora_A.default.weight"]
    merged = "mllm.model.language_model.model.layers.0.self_attn.q_proj.bias"
    assert targets(merged) == [base + ".base_layer.bias"]
    assert targets("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight") == [
        base + ".lora_B.default.weight"
    ]


def test_video_memory_is_dropped_with_its_reason():
    for name in ("memory_attention.norm.weight", "no_obj_ptr", "obj_ptr_proj.layers.0.bias", "maskmem_tpos_enc"):
        placements, reason = place("grounding_encoder.sam2_model." + name, ORIGINAL)
        assert placements == []
        assert "video memory" in reason
    # What SAM 2.1 added to 2.
    assert place("no_obj_embed_spatial", SAM2)[1]
    assert place("obj_ptr_tpos_proj.weight", SAM2)[1]
    assert place("memory_encoder.fuser.layers.0.gamma", SAM2)[1]
    assert place("grounding_encoder.sam2_model.memory_encoder.fuser.layers.0.g_weight", HF_SA2VA)[1]
    assert place("occlusion_spatial_embedding_parameter", SAM2_NATIVE)[1]


def test_an_unknown_key_has_no_place():
    assert place("mllm.model.vision_model.encoder.layers.0.attn.rel_pos", ORIGINAL) is None
    assert place(DECODER + "transformer.layers.0.self_attn.out_proj.scale", ORIGINAL) is None


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (LANGUAGE + "model.norm.weight", ORIGINAL),
        ("mllm.model.vision_tower.embeddings.cls_token", NATIVE),
        ("grounding_encoder.sam2_model.no_mem_embed", HF_SA2VA),
        ("vision_model.embeddings.class_embedding", INTERNVL),
        ("model.vision_tower.embeddings.cls_token", INTERNVL_NATIVE),
        ("vision_tower.embeddings.cls_token", INTERNVL_NATIVE),
        ("image_encoder.trunk.pos_embed", SAM2),
        ("vision_encoder.backbone.pos_embed", SAM2_NATIVE),
    ],
)
def test_layouts_are_told_by_their_names(name, layout):
    assert detect_layout([name]) is layout


def test_other_architectures_are_told_and_unknown_files_are_none():
    assert "InternLM2" in find_refused([LANGUAGE + "model.layers.0.attention.wqkv.weight"])[0]
    assert "Qwen-VL" in find_refused(["mllm.model.visual.blocks.0.attn.qkv.weight"])[0]
    assert find_refused([LANGUAGE + "model.norm.weight"]) is None
    assert detect_layout(["encoder.weight"]) is None


@pytest.mark.parametrize("layout", [ORIGINAL, HF_SA2VA], ids=lambda layout: layout.name)
def test_the_way_there_and_back_is_bitwise_the_same(layout):
    model, _, _ = small_model()
    state = model.state_dict()
    written = dict(iterate_export(state.items(), layout))
    back = {}
    for name, tensor in written.items():
        placements, _ = place(name, layout)
        for p in placements:
            target = back.setdefault(p.target, torch.full_like(state[p.target], float("nan")))
            rows(target, p.target_part).copy_(rows(tensor, p.source_part))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_native_tensor_without_a_rule_is_an_error_on_the_way_out():
    with pytest.raises(KeyError, match="surprise"):
        dict(iterate_export({"surprise.weight": torch.zeros(1)}.items(), ORIGINAL))


def test_every_rule_has_a_purpose():
    assert all(bool(rule.placements) != bool(rule.dropped) for rule in CANONICAL_RULES)

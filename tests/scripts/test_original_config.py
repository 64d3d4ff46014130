"""From an original config.json to ours: every silent flag is carried over or refused."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dual_loop.checkpoint.importer import match_keys
from dual_loop.checkpoint.key_rules import ORIGINAL, iterate_export
from dual_loop.config import LossConfig, load_config, resolve_config_path
from dual_loop.errors import CheckpointError
from dual_loop.model.build import build_model, build_tokenizer
from dual_loop.preflight.dry_run import PlaceholderTokenizer

from parity.original_config import config_from_original

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))
from synthetic_case import original_config, with_vocabulary


def changed(dotted: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = copy.deepcopy(with_vocabulary(original_config(), 600))
    *parents, leaf = dotted.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
    if value is None:
        del node[leaf]
    else:
        node[leaf] = value
    return tree


def released_4b() -> dict[str, Any]:
    """A released folder's file: the keys of ``mllm`` on top, no LoRA, no SAM 2."""
    vision = {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_size": 1024}
    vision.update(num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=448, patch_size=14)
    vision.update(norm_type="layer_norm", qk_normalization=False, qkv_bias=True, layer_norm_eps=1e-6)
    text = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151679, "hidden_size": 2048}
    text.update(num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008)
    text.update(rope_theta=1000000.0, rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=32768)
    return {
        "architectures": ["Sa2VAChatModel"],
        "model_type": "sa2va_chat",
        "vision_config": vision,
        "llm_config": text,
        **{"downsample_ratio": 0.5, "force_image_size": 448, "ps_version": "v2", "select_layer": -1},
        **{"template": "phi3_chat", "torch_dtype": "bfloat16", "use_llm_lora": 0},
    }


def test_every_size_and_silent_flag_is_carried_over():
    config = config_from_original(with_vocabulary(original_config(), 600))
    model, backbone = config.model, config.model.sam2["backbone"]
    assert model.vision["image_size"] == [56, 56]
    assert model.text["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}
    assert (model.lora_r, model.lora_alpha, model.text_hidden_dim) == (4, 12, 40)
    assert backbone["num_attention_heads_per_stage"] == [1, 2, 4, 8]
    assert backbone["embed_dim_per_stage"] == [8, 16, 32, 64]
    assert backbone["mlp_ratio"] == 3.0
    assert model.sam2["mask_decoder"]["num_attention_heads"] == 4
    assert model.sam2["fpn_top_down_levels"] == [3]
    assert config.loss == LossConfig(1.5, 0.25, 1.0, 20, 3.0, 0.75, num_objects=3, points_from="grid")
    assert config.data.grid_pooling == "nearest"


def test_the_model_has_the_originals_names_and_shapes():
    tokenizer = build_tokenizer(load_config(resolve_config_path("tiny_cpu")).model)
    config = config_from_original(with_vocabulary(original_config(), len(tokenizer)))
    with torch.device("meta"):
        model = build_model(config, tokenizer, device="meta")
    shapes = {name: tuple(t.shape) for name, t in iterate_export(model.state_dict().items(), ORIGINAL)}
    problems, _, num_filled = match_keys(model, shapes)
    assert problems == []
    assert num_filled == len(model.state_dict())
    sam = "grounding_encoder.sam2_model."
    trunk, decoder = f"{sam}image_encoder.trunk.", f"{sam}sam_mask_decoder."
    expected = {
        f"{trunk}pos_embed": (1, 8, 5, 5),
        f"{trunk}pos_embed_window": (1, 8, 8, 8),
        f"{trunk}blocks.1.attn.qkv.weight": (48, 8),
        f"{trunk}blocks.4.mlp.layers.0.weight": (192, 64),
        f"{decoder}transformer.layers.0.mlp.layers.0.weight": (24, 32),
        f"{decoder}iou_prediction_head.layers.1.weight": (20, 20),
        f"{sam}sam_prompt_encoder.mask_downscaling.6.weight": (32, 8, 1, 1),
        "mllm.model.vision_model.encoder.layers.0.attn.qkv.bias": (72,),
        "mllm.model.mlp1.1.weight": (48, 96),
        "mllm.model.language_model.base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight": (4, 64),
        "text_hidden_fcs.0.weight": (40, 48),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert f"{decoder}transformer.layers.1.mlp.layers.0.weight" not in shapes


def test_a_released_folder_describes_the_4b_configuration():
    released, ours = config_from_original(released_4b()), load_config(resolve_config_path("sa2va_4b_full"))
    tokenizer = PlaceholderTokenizer(151679)
    models = [build_model(config, tokenizer, device="meta") for config in (released, ours)]
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    flags = ("window_size_per_stage", "global_attention_blocks", "num_attention_heads")
    assert [released.model.sam2["backbone"][f] for f in flags] == [ours.model.sam2["backbone"][f] for f in flags]
    assert released.model.text["rope_parameters"] == ours.model.text["rope_parameters"]
    assert (released.model.dtype, released.model.template) == (ours.model.dtype, ours.model.template)
    assert (released.model.lora_r, released.loss.num_objects) == (128, 5)


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("mllm.ps_version", "v1", "ps_version: seen 'v1', supported is 'v2'"),
        ("mllm.select_layer", -4, "select_layer"),
        ("mllm.template", "vicuna", "template: seen 'vicuna'"),
        (
            "llm_config.architectures",
            ["InternLM2ForCausalLM"],
            "InternLM2 .*is not supported.*seen: InternLM2ForCausalLM",
        ),
        ("llm_config.hidden_size", None, r"llm_config\.hidden_size: missing"),
        ("llm_config.rope_scaling", {"type": "yarn", "factor": 4.0}, "yarn"),
        ("llm_config.vocab_size", "many", "vocab_size: seen 'many', expected a number"),
        ("vision_config.qk_normalization", True, "qk_normalization"),
        ("mllm.force_image_size", 112, "force_image_size: seen 112"),
        ("text_hidden_fcs.out_dim", 64, "text_hidden_fcs.out_dim: seen 64, but sam2 d_model gives 32"),
        ("lora.target_modules", ["q_proj", "v_proj"], "lora.target_modules"),
        ("special_tokens", ["[SEG]"], "special_tokens"),
        ("image_mean", [0.5, 0.5, 0.5], "image_mean"),
        ("arch_type", "qwen", "arch_type"),
        ("dtype", "float8", "dtype"),
        ("sam2.pred_obj_scores", False, "pred_obj_scores: seen False"),
        ("sam2.image_encoder.scalp", 0, "scalp"),
        ("sam2.image_encoder.trunk.stages", [1, 1, 2], "stages"),
        ("sam2.image_encoder.trunk.q_pool", 2, "q_pool"),
        ("sam2.image_encoder.neck.backbone_channel_list", [32, 16, 8, 4], "backbone_channel_list"),
        ("sam2.mask_decoder.iou_head_depth", 2, "iou_head_depth"),
        ("losses.loss_dice.naive_dice", False, "naive_dice"),
    ],
)
def test_what_would_load_and_compute_something_else_is_refused(dotted: str, value: Any, message: str):
    with pytest.raises(CheckpointError, match=message):
        config_from_original(changed(dotted, value))


def test_all_problems_are_listed_at_once():
    tree = changed("mllm.ps_version", "v1")
    tree["sam2"]["image_encoder"]["scalp"] = 2
    with pytest.raises(CheckpointError, match=r"2 problem\(s\)(.|\n)*ps_version(.|\n)*scalp"):
        config_from_original(tree)


@pytest.mark.parametrize(
    ("width", "template"), [(896, "phi3_chat"), (2048, "phi3_chat"), (1536, "qwen_chat"), (3584, "qwen_chat")]
)
def test_a_base_folder_has_the_template_that_sa2va_trained_over_it(width: int, template: str):
    folder = released_4b() | {"template": "internvl2_5"}
    folder["llm_config"] |= {"hidden_size": width, "num_attention_heads": width // 64}
    assert config_from_original(folder).model.template == template


def test_a_qwen_vl_model_is_refused_in_one_sentence():
    tree = {"architectures": ["Sa2VAChatModelQwen2_5_VL"], "model_type": "sa2va_chat", "text_config": {}}
    with pytest.raises(CheckpointError) as caught:
        config_from_original(tree)
    message = str(caught.value)
    assert "\n" not in message
    assert "Qwen-VL" in message
    assert "expected: InternVL2.5 or InternVL3" in message


def test_options_that_are_choices_here():
    config = config_from_original(changed("frozen_sam2_decoder", True))
    assert "mask_decoder" not in config.model.trainable
    assert config_from_original(changed("sam2.multimask_min_pt_num", 1)).model.single_mask
    assert config_from_original(changed("mllm.template", "internvl2_5")).model.template == "phi3_chat"
    scaled = config_from_original(changed("llm_config.rope_scaling", {"type": "dynamic", "factor": 2.0}))
    assert scaled.model.text["rope_parameters"]["rope_type"] == "dynamic"
    neck = changed("sam2.image_encoder.neck.fpn_top_down_levels", None)
    assert config_from_original(neck).model.sam2["fpn_top_down_levels"] == [0, 1, 2, 3]

"""``config.json`` of the released Sa2VA chat folder, from this package's configuration."""

from __future__ import annotations

from typing import Any

from dual_loop.config import Config


def chat_config(config: Config, vocab_size: int) -> dict[str, Any]:
    """Return what the release's ``configuration_sa2va_chat.py`` reads.

    The classes named in ``auto_map`` are files of the release's own folder and are not written here.
    """
    model, text = config.model, dict(config.model.text)
    vision = dict(model.vision)
    side = vision["image_size"][0] if isinstance(vision["image_size"], (list, tuple)) else vision["image_size"]
    patch = vision["patch_size"][0] if isinstance(vision["patch_size"], (list, tuple)) else vision["patch_size"]
    rope = text.pop("rope_parameters", {"rope_theta": text.pop("rope_theta", 10000.0)})
    return {
        "model_type": "sa2va_chat",
        "architectures": ["Sa2VAChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_sa2va_chat.Sa2VAChatConfig",
            "AutoModel": "modeling_sa2va_chat.Sa2VAChatModel",
            "AutoModelForCausalLM": "modeling_sa2va_chat.Sa2VAChatModel",
        },
        "template": model.template,
        "downsample_ratio": model.downsample_ratio,
        "force_image_size": side,
        "ps_version": "v2",
        "select_layer": -1,
        "dynamic_image_size": config.data.max_tiles > 1,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": max(config.data.max_tiles, 1),
        "use_thumbnail": True,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
        "torch_dtype": model.dtype,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": vision["hidden_size"],
            "num_hidden_layers": vision["num_hidden_layers"],
            "num_attention_heads": vision["num_attention_heads"],
            "intermediate_size": vision["intermediate_size"],
            "image_size": side,
            "patch_size": patch,
            "qkv_bias": True,
            "qk_normalization": False,
            "norm_type": "layer_norm",
            "layer_norm_eps": vision.get("layer_norm_eps", 1e-6),
            "hidden_act": vision.get("hidden_act", "gelu"),
        },
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "tie_word_embeddings": bool(text.pop("tie_word_embeddings", False)),
            **text,
            "rope_theta": rope["rope_theta"],
            "vocab_size": vocab_size,
        },
    }

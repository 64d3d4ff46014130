"""From the ``config.json`` of an original Sa2VA model to this package's configuration.

Two files are understood. The one that accompanies a training checkpoint has groups ``mllm``, ``vision_config``,
``llm_config``, ``lora``, ``text_hidden_fcs``, ``sam2`` and ``losses``. The one of a released folder has the keys of
``mllm`` at the top, and neither ``lora`` (merged) nor ``sam2`` (always Hiera-L). Many settings do not change any
shape, so weights would load and give other numbers; whatever is set to something that the native classes do not
compute is refused, never ignored.

Formats: InternVL2.5 and Sa2VA configuration files; SAM 2's ``sam2.1_hiera_l.yaml`` for the names below ``sam2``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from dual_loop.config import Config, DataConfig, LossConfig, ModelConfig, load_config, resolve_config_path
from dual_loop.data.prepare import IMAGENET_MEAN, IMAGENET_STD
from dual_loop.errors import CheckpointError, explain
from dual_loop.model.adapters import LORA_TARGETS
from dual_loop.model.prompts import NEW_TOKENS, TEMPLATES

Tree: TypeAlias = Mapping[str, Any]
"""JSON values by name, nested."""

TRUNK_DEFAULTS: Tree = {
    "q_pool": 3,
    "q_stride": [2, 2],
    "dim_mul": 2.0,
    "head_mul": 2.0,
    "mlp_ratio": 4.0,
    "patch_kernel": [7, 7],
    "patch_stride": [4, 4],
    "patch_padding": [3, 3],
    "norm_eps": 1e-6,
    "window_pos_embed_bkg_spatial_size": [14, 14],
}
"""What Hiera's constructor takes where a file is silent."""

FIXED: Tree = {
    "ps_version": "v2",
    "select_layer": -1,
    "use_backbone_lora": 0,
    "vision_config.qk_normalization": False,
    "vision_config.num_channels": 3,
    "llm_config.use_sliding_window": False,
    "lora.bias": "none",
    "lora.use_dora": False,
    "lora.use_rslora": False,
    "text_hidden_fcs.activation": "relu",
    "text_hidden_fcs.dropout": 0.0,
    "losses.loss_mask.reduction": "mean",
    "losses.loss_dice.use_sigmoid": True,
    "losses.loss_dice.activate": True,
    "losses.loss_dice.reduction": "mean",
    "losses.loss_dice.naive_dice": True,
    "losses.loss_dice.eps": 1.0,
    "arch_type": "intern_vl",
    "sam2.directly_add_no_mem_embed": True,
    "sam2.use_high_res_features_in_sam": True,
    "sam2.iou_prediction_use_sigmoid": True,
    "sam2.pred_obj_scores": True,
    "sam2.pred_obj_scores_mlp": True,
    "sam2.backbone_stride": 16,
    "sam2.image_encoder.scalp": 1,
    "sam2.image_encoder.neck.fpn_interp_model": "nearest",
    "sam2.image_encoder.neck.fuse_type": "sum",
    "sam2.image_encoder.neck.kernel_size": 1,
    "sam2.prompt_encoder.num_point_embeddings": 4,
    "sam2.mask_decoder.iou_head_depth": 3,
    "sam2.mask_decoder.transformer.activation": "relu",
    "sam2.mask_decoder.use_high_res_features": True,
    "sam2.mask_decoder.iou_prediction_use_sigmoid": True,
    "sam2.mask_decoder.pred_obj_scores": True,
    "sam2.mask_decoder.pred_obj_scores_mlp": True,
}
"""Settings that the native classes compute one way only."""

KNOWN = {
    "llm_config.": ("llm_config: the language model is", ("Qwen2ForCausalLM", "qwen2")),
    "vision_config.": ("vision_config: the vision tower is", ("InternVisionModel", "intern_vit_6b")),
    "": ("architectures:", ("InternVLChatModel", "Sa2VAChatModel", "internvl_chat", "sa2va_chat")),
}
"""What ``architectures`` and ``model_type`` may say, by group."""
REFUSED = {
    "InternLM2 (Sa2VA-8B and -26B)": r"internlm",
    "Qwen-VL (Sa2VA-Qwen2.5-VL, Sa2VA-Qwen3-VL)": r"qwen[\d._]*vl",
}
"""Language models that are not supported, by a pattern of what a file calls them."""
QWEN_CHAT_WIDTHS = (1536, 3584, 5120)
"""Widths of the language models of InternVL3-2B, -8B and -14B, over which Sa2VA trained ``qwen_chat``; InternVL2.5's
with Qwen2 are 896 (1B) and 2,048 (4B) wide, and have ``phi3_chat``."""
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
"""Of the vision tower and of the language model, under the names of the native classes."""

_ABSENT = object()


class _Reader:
    """Reads dotted keys of a nested mapping and collects what is wrong, under the names ``where`` and key."""

    def __init__(self, tree: Tree, where: str = "", problems: list[str] | None = None) -> None:
        self.tree, self.where = tree, where
        self.problems: list[str] = [] if problems is None else problems

    def below(self, key: str, defaults: Tree | None = None) -> _Reader:
        """Return a reader of the group at ``key``, over ``defaults``."""
        group = self.get(key, None)
        tree = {**(defaults or {}), **(group if isinstance(group, Mapping) else {})}
        return _Reader(tree, f"{self.where}{key}.", self.problems)

    def note(self, key: str, problem: str) -> None:
        self.problems.append(f"{self.where}{key}: {problem}")

    def get(self, key: str, default: Any = _ABSENT) -> Any:
        """Return the value at ``key``; without it ``default``, or a problem and 0."""
        node: Any = self.tree
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                if default is _ABSENT:
                    self.note(key, "missing")
                return 0 if default is _ABSENT else default
            node = node[part]
        return node

    def number(self, key: str, default: object = _ABSENT, kind: Callable[[Any], Any] = int) -> Any:
        """:meth:`get` as an integer (or ``kind``)."""
        value = self.get(key, default)
        if value is None or isinstance(value, bool) or not isinstance(value, (int, float)) or kind(value) != value:
            self.note(key, f"seen {value!r}, expected a number")
            return kind(0)
        return kind(value)

    def numbers(self, key: str) -> list[int]:
        """:meth:`get` as a list of integers."""
        value = self.get(key)
        if isinstance(value, Sequence) and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return list(value)
        if value != 0:
            self.note(key, f"seen {value!r}, expected a list of integers")
        return []

    def expect(self, key: str, allowed: Any, default: object = _ABSENT) -> None:
        """Note a problem where ``key`` is there with another value than ``allowed`` (one, or a tuple of several)."""
        value = self.get(key, allowed if default is _ABSENT else default)
        choices = allowed if isinstance(allowed, tuple) else (allowed,)
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices):
            expected = " or ".join(repr(choice) for choice in choices)
            self.note(key, f"seen {value!r}, supported is {expected}")

    def same(self, key: str, expected: object, other: str) -> None:
        """Note a problem where ``key`` is there and says another thing than ``other``, a place of the file or ours."""
        seen = self.get(key, expected)
        self.agree(key, type(expected)(seen) if isinstance(expected, (list, tuple)) else seen, expected, other)

    def agree(self, key: str, seen: object, expected: object, other: str) -> None:
        """Note a problem where two places of the file contradict each other."""
        if seen != expected:
            self.note(key, f"seen {seen!r}, but {other} gives {expected!r}")


def config_from_original(original: Tree) -> Config:
    """Translate an original ``config.json`` (parsed) to a configuration that builds the same model.

    Region prompts are pooled as the original does (nearest). ``model.tokenizer`` is left None, for the caller to set;
    ``model.dtype`` is the file's ``dtype`` or ``torch_dtype``, and the language part computes attention eagerly in
    float32 and by sdpa otherwise. All token embeddings train, as in the original.

    Raises:
        CheckpointError: a needed key is missing, two keys contradict each other, or a setting is one that the native
            classes do not compute (another pixel shuffle, InternLM2, ...); all problems are listed.
    """
    released = dict(original.get("mllm") or {})
    reader = _Reader({**released, **original})
    for what, pattern in REFUSED.items():
        if found := [name for name in _names_of(reader) if re.search(pattern, name, re.IGNORECASE)]:
            expected = "InternVL2.5 or InternVL3 with Qwen2 (Sa2VA-1B, -4B, -InternVL3-2B, -8B, -14B)"
            raise CheckpointError(explain(f"{what} is not supported", "config.json", found[0], expected))
    for group, (what, known) in KNOWN.items():
        for name in (*(reader.get(group + "architectures", None) or ()), reader.get(group + "model_type", None)):
            if name is not None and name not in known:
                reader.problems.append(f"{what} {name}, supported is {' or '.join(known)}")
    for key, value in FIXED.items():
        reader.expect(key, value)
    config = Config(
        model=_model(reader), data=DataConfig(grid_pooling="nearest", target_pooling="nearest"), loss=_loss(reader)
    )
    if reader.problems:
        listing = "".join(f"\n  - {problem}" for problem in reader.problems)
        what = f"{len(reader.problems)} problem(s) in the original's configuration:{listing}\n"
        expected = "InternVL2.5 or InternVL3 with Qwen2, and SAM 2, as in Sa2VA-4B"
        fix = "choose such a checkpoint, or mend config.json where it is wrong"
        raise CheckpointError(explain(what, expected=expected, fix=fix))
    return config


def _names_of(reader: _Reader) -> Iterator[str]:
    """Yield what the file calls the model and its parts."""
    for group in ("", "llm_config.", "text_config.", "vision_config."):
        for key in ("model_type", "arch_type", "architectures"):
            value = reader.get(group + key, None)
            yield from (name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str))


def _model(reader: _Reader) -> ModelConfig:
    vision, text, sam2 = _vision(reader), _text(reader), _sam2(reader)
    rank = reader.number("lora.r", ModelConfig.lora_r)
    _check_joints(reader, vision, text, sam2)
    for key, own in (("special_tokens", NEW_TOKENS), ("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        reader.same(key, own, "this package")
    targets = sorted(reader.get("lora.target_modules", LORA_TARGETS))
    reader.agree("lora.target_modules", targets, sorted(LORA_TARGETS), "this package")
    template = str(reader.get("template", ModelConfig.template))
    if template.startswith("internvl2_5"):
        # The base model's own, over which Sa2VA trained another.
        template = "qwen_chat" if text["hidden_size"] in QWEN_CHAT_WIDTHS else ModelConfig.template
    if template not in TEMPLATES:
        reader.problems.append(f"template: seen {template!r}, supported are {', '.join(TEMPLATES)}")
    # Whether a prompt without points takes the arg-max of three candidates, as SAM 2 decides it.
    least, most = reader.number("sam2.multimask_min_pt_num", 0), reader.number("sam2.multimask_max_pt_num", 1)
    best_of_three = reader.get("sam2.multimask_output_in_sam", True) and least <= 0 <= most
    is_frozen = reader.get("frozen_sam2_decoder", False)
    dtype = str(reader.get("dtype", reader.get("torch_dtype", "float32")))
    if dtype not in ("float32", "bfloat16", "float16"):
        reader.problems.append(f"dtype: seen {dtype!r}, supported are float32, bfloat16 and float16")
    return ModelConfig(
        name="original",
        vision=vision,
        text=text,
        downsample_ratio=reader.number("downsample_ratio", 0.5, float),
        sam2=sam2,
        text_hidden_dim=reader.number("text_hidden_fcs.hidden_dim", text["hidden_size"]),
        template=template,
        single_mask=not best_of_three,
        dtype=dtype,
        attn_implementation="eager" if dtype == "float32" else "sdpa",
        trainable=tuple(part for part in ModelConfig.trainable if part != "mask_decoder" or not is_frozen),
        train_embeddings="all",
        lora_r=rank,
        lora_alpha=reader.number("lora.lora_alpha", 2 * rank),
        lora_dropout=reader.number("lora.lora_dropout", ModelConfig.lora_dropout, float),
        gradient_checkpointing=False,
    )


def _vision(reader: _Reader) -> Tree:
    own = reader.below("vision_config")
    size, patch = own.number("image_size"), own.number("patch_size")
    side = reader.get("force_image_size", None) or size
    reader.agree("force_image_size", side, size, "vision_config.image_size")
    own.expect("norm_type", ("layer_norm", "rms_norm"), default="layer_norm")
    return {
        **{key: own.number(key) for key in SIZES},
        "image_size": [size, size],
        "patch_size": [patch, patch],
        "attention_bias": bool(own.get("qkv_bias", True)),
        "hidden_act": own.get("hidden_act", "gelu"),
        "norm_type": own.get("norm_type", "layer_norm"),
        "layer_norm_eps": own.number("layer_norm_eps", 1e-6, float),
        "hidden_dropout_prob": own.number("dropout", 0.0, float),
        "attention_dropout": own.number("attention_dropout", 0.0, float),
    }


def _text(reader: _Reader) -> Tree:
    own = reader.below("llm_config")
    sizes = {key: own.number(key) for key in ("vocab_size", *SIZES)}
    rope = {"rope_type": "default", "rope_theta": own.number("rope_theta", 1e6, float)}
    # Scaling of the kinds that one factor describes is known.
    if scaling := own.get("rope_scaling", None):
        kind = rope["rope_type"] = scaling.get("rope_type", scaling.get("type", "default"))
        if kind in ("linear", "dynamic"):
            rope["factor"] = float(scaling.get("factor", 1.0))
        elif kind != "default":
            own.note("rope_scaling", f"seen {kind!r}, supported are default, linear, dynamic")
    return {
        **sizes,
        "num_key_value_heads": own.number("num_key_value_heads", sizes["num_attention_heads"]),
        "hidden_act": own.get("hidden_act", "silu"),
        "max_position_embeddings": own.number("max_position_embeddings", 32768),
        "rms_norm_eps": own.number("rms_norm_eps", 1e-6, float),
        "attention_dropout": own.number("attention_dropout", 0.0, float),
        "tie_word_embeddings": bool(own.get("tie_word_embeddings", False)),
        "rope_parameters": rope,
    }


def _sam2(reader: _Reader) -> Tree:
    if "sam2" not in reader.tree:
        # SAM 2's large model, which every released Sa2VA holds and no released file describes.
        return load_config(resolve_config_path("sa2va_4b_full")).model.sam2
    own = reader.below("sam2")
    neck, decoder = own.below("image_encoder").below("neck"), own.below("mask_decoder")
    transformer = decoder.below("transformer")
    width = neck.number("d_model")
    for key in ("hidden_dim", "prompt_encoder.embed_dim", "mask_decoder.transformer_dim"):
        own.same(key, width, "sam2.image_encoder.neck.d_model")
    backbone = _trunk(own)
    neck.same("backbone_channel_list", backbone["embed_dim_per_stage"][::-1], "sam2.image_encoder.trunk")
    # Levels that get the next coarser one added; SAM 2 reads null as all of them.
    has_levels = neck.get("fpn_top_down_levels", None) is not None
    return {
        "image_size": own.number("image_size", 1024),
        "fpn_hidden_size": width,
        "fpn_top_down_levels": neck.numbers("fpn_top_down_levels") if has_levels else [0, 1, 2, 3],
        "backbone": backbone,
        "mask_decoder": {
            "num_hidden_layers": transformer.number("depth", 2),
            "mlp_dim": transformer.number("mlp_dim", 2048),
            "num_attention_heads": transformer.number("num_heads", 8),
            "attention_downsample_rate": transformer.number("attention_downsample_rate", 2),
            "num_multimask_outputs": decoder.number("num_multimask_outputs", 3),
            "iou_head_hidden_dim": decoder.number("iou_head_hidden_dim", 256),
        },
        "mask_input_channels": own.number("prompt_encoder.mask_in_chans", 16),
    }


def _trunk(sam2: _Reader) -> Tree:
    """Return the arguments of ``Sam2HieraDetConfig``: a trunk of four stages that halves the side three times."""
    own = sam2.below("image_encoder").below("trunk", {**TRUNK_DEFAULTS, **sam2.get("trunk_defaults", {})})
    stages, windows = own.numbers("stages"), own.numbers("window_spec")
    own.agree("stages", len(stages), 4, "SAM 2's neck, in number,")
    own.agree("window_spec", len(windows), len(stages), "stages, in number,")
    for key, value in (("q_pool", 3), ("q_stride", [2, 2]), ("patch_stride", [4, 4])):
        own.expect(key, value)
    # Each stage has int(factor * the one before), as Hiera computes it.
    widths, heads = [own.number("embed_dim")], [own.number("num_heads")]
    for values, factor in ((widths, own.number("dim_mul", kind=float)), (heads, own.number("head_mul", kind=float))):
        for _ in range(3):
            values.append(int(values[-1] * factor))
    return {
        "hidden_size": widths[0],
        "num_attention_heads": heads[0],
        "blocks_per_stage": stages,
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": heads,
        "window_size_per_stage": windows,
        "global_attention_blocks": own.numbers("global_att_blocks"),
        "window_positional_embedding_background_size": own.numbers("window_pos_embed_bkg_spatial_size"),
        "patch_kernel_size": own.numbers("patch_kernel"),
        "patch_padding": own.numbers("patch_padding"),
        "mlp_ratio": own.number("mlp_ratio", kind=float),
        "layer_norm_eps": own.number("norm_eps", kind=float),
    }


def _check_joints(reader: _Reader, vision: Tree, text: Tree, sam2: Tree) -> None:
    """Check the sizes of what lies between the three parts: projector, ``text_hidden_fcs``, grids."""
    ratio = reader.number("downsample_ratio", 0.5, float)
    merged = round(1 / ratio) ** 2 if ratio > 0 else 0
    reader.same("mlp1.in_features", vision["hidden_size"] * merged, "vision_config")
    for key in ("mlp1.hidden_features", "mlp1.out_features", "text_hidden_fcs.in_dim"):
        reader.same(key, text["hidden_size"], "llm_config.hidden_size")
    reader.same("text_hidden_fcs.out_dim", sam2["fpn_hidden_size"], "sam2 d_model")
    side = int(vision["image_size"][0] // max(vision["patch_size"][0], 1) * ratio)
    reader.same("grid_size", side, "vision_config")
    reader.same("num_image_token", side**2, "vision_config")
    size = sam2["image_size"]
    reader.same("sam2.prompt_encoder.input_image_size", [size, size], "sam2.image_size")
    reader.same("sam2.prompt_encoder.image_embedding_size", [size // 16, size // 16], "sam2.image_size")


def _loss(reader: _Reader) -> LossConfig:
    default, own = LossConfig(), reader.below("losses")
    return LossConfig(
        mask_weight=own.number("loss_mask.loss_weight", default.mask_weight, float),
        dice_weight=own.number("loss_dice.loss_weight", default.dice_weight, float),
        num_points=own.number("num_points", default.num_points),
        points_from="grid",
        oversample_ratio=own.number("oversample_ratio", default.oversample_ratio, float),
        importance_sample_ratio=own.number("importance_sample_ratio", default.importance_sample_ratio, float),
        num_objects=own.number("fix_number", 5),
    )

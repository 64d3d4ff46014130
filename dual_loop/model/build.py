"""From a configuration to a model: transformers configs, strict about names, then adapters and freeze policy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype

from dual_loop.config import Config, ModelConfig, how_to_get
from dual_loop.data.prepare import IMAGENET_MEAN, IMAGENET_STD, Geometry
from dual_loop.errors import CheckpointError, ConfigError, explain
from dual_loop.model.adapters import NewTokenRows, add_lora, apply_freeze_policy
from dual_loop.model.prompts import IMAGE_CONTEXT, NEW_TOKENS, SEG, Prompter
from dual_loop.model.quantize import quantize_frozen
from dual_loop.model.recompute import checkpoint_first, requested_layers
from dual_loop.model.sa2va_api import VideoLLaVASAMModel

TINY_ASSETS = Path(str(files("dual_loop") / "assets" / "tiny"))
TINY_WEIGHTS = TINY_ASSETS / "model.safetensors"

SAM_KEYS = ("image_size", "fpn_hidden_size", "fpn_top_down_levels", "backbone", "mask_decoder", "mask_input_channels")


def build_tokenizer(config: ModelConfig, model_path: str | None = None) -> Any:
    """Load the tokenizer and append the five new tokens where they are missing.

    Args:
        config: ``config.tokenizer`` is ``"tiny"``, a folder, or None for ``model_path``.
        model_path: folder of the base model.

    Raises:
        CheckpointError: no tokenizer files there (nothing is ever downloaded).
    """
    if config.tokenizer == "tiny":
        return load_tokenizer_file(TINY_ASSETS / "tokenizer.json")
    folder = config.tokenizer or model_path
    if folder is None or not Path(folder).is_dir():
        expected = "a folder with tokenizer files (InternVL2_5-4B/)"
        fix = how_to_get(folder) if folder else "set --model_path (MODEL_PATH for scripts)"
        raise CheckpointError(explain("no tokenizer", str(folder), None, expected, fix))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        what = "tokenizer cannot be read"
        raise CheckpointError(explain(what, folder, f"{error}", fix="check the folder")) from error
    tokenizer.add_tokens([token for token in NEW_TOKENS if token not in tokenizer.get_vocab()], special_tokens=True)
    return tokenizer


def load_tokenizer_file(path: Path) -> PreTrainedTokenizerFast:
    """Load a ``tokenizer.json`` whose end-of-text and padding token is ``<|endoftext|>``."""
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def geometry(config: Config) -> Geometry:
    """Return the sizes that data preparation needs, all derived from the model's configuration."""
    vision, sam_size = config.model.vision, int(config.model.sam2["image_size"])
    image_size = _side(vision["image_size"])
    grid = image_size // _side(vision["patch_size"]) * config.model.downsample_ratio
    return Geometry(
        vision_image_size=image_size,
        grid_size=int(grid),
        grounding_size=sam_size,
        mask_size=sam_size // 4,
        max_tiles=config.data.max_tiles,
        grid_pooling=config.data.grid_pooling,
        target_pooling=config.data.target_pooling,
        keeps_full_masks=config.loss.points_from == "full" and config.loss.num_points > 0,
    )


def build_prompter(config: Config, tokenizer: Any) -> Prompter:
    """Return the prompter that fits the model's template and number of image tokens."""
    return Prompter(tokenizer, config.model.template, geometry(config).grid_size ** 2)


def build_model(
    config: Config, tokenizer: Any, *, device: str = "cpu", weights_imported: bool = True, drawn: bool = True
) -> VideoLLaVASAMModel:
    """Build the model with LoRA and freeze policy; weights are random (on ``meta``: not even that).

    Args:
        config: the whole configuration; ``model`` and ``loss`` are read.
        tokenizer: gives the vocabulary size and the ids of special tokens.
        device: where parameters are created.
        weights_imported: whether pretrained weights will follow; decides ``train_embeddings = auto``.
        drawn: False leaves the memory of pretrained parts as it comes, for ``load_weights`` to fill whole: no random
            numbers are drawn for them, and on a CPU no page of theirs is touched. LoRA and ``text_hidden_fcs`` are.
    """
    settings = config.model
    empty = nullcontext if drawn else no_init_weights
    # In its own dtype at once: a float32 copy of a 4B model would not fit beside it.
    with torch.device(device), local_torch_dtype(getattr(torch, settings.dtype)):
        with empty():
            mllm = InternVLForConditionalGeneration(internvl_config(settings, tokenizer))
            mllm.tie_weights()  # part of the drawing
        add_lora(mllm.model.language_model, settings)
    with torch.device(device), local_torch_dtype(torch.float32), empty():
        sam = Sam2Model(sam2_config(settings.sam2))
        # One random matrix encodes positions of prompts and of the image; transformers draws it twice.
        sam.prompt_encoder.shared_embedding.positional_embedding = sam.shared_image_embedding.positional_embedding
    with torch.device(device), local_torch_dtype(torch.float32):
        width, prompt_width = int(settings.text["hidden_size"]), int(settings.sam2["fpn_hidden_size"])
        inner = settings.text_hidden_dim or width
        model = VideoLLaVASAMModel(
            mllm,
            sam,
            nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, prompt_width)),  # as LISA and Sa2VA
            seg_id=tokenizer.convert_tokens_to_ids(SEG),
            image_context_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
            single_mask=settings.single_mask,
        )
        model.loss_config = config.loss
    groups, mode = list(settings.trainable), settings.train_embeddings
    if mode == "auto":
        mode = "none" if weights_imported else "new_tokens"
    if mode == "new_tokens":
        ids = tokenizer.convert_tokens_to_ids(list(NEW_TOKENS))
        if ids != list(range(ids[0], ids[0] + len(ids))):
            expected = "five ids that follow each other"
            raise ConfigError(explain("new tokens are not consecutive", "tokenizer", ids, expected))
        model.new_token_rows = NewTokenRows(ids[0], len(ids), model.mllm.get_input_embeddings(), model.mllm.lm_head)
        groups.append("new_tokens")
    elif mode == "all":
        groups.append("embeddings")
    apply_freeze_policy(model, groups, settings.single_mask)
    wanted = requested_layers(config, model.num_layers)
    # Where memory decides, all layers are recomputed until it is known.
    checkpoint_first(model, model.num_layers if wanted is None else wanted)
    if settings.quantize != "none":
        model.after_loading.append(partial(quantize_frozen, model))
    if config.speed.accelerate:
        from dual_loop import accelerate  # here, so that the plain model needs nothing of it

        accelerate.apply(model, config)
    return model


def internvl_config(settings: ModelConfig, tokenizer: Any) -> InternVLConfig:
    """Return the native InternVL config with the flags of Sa2VA that are silent when wrong."""
    vision_values = {"use_mean_pooling": True, "attention_bias": True, "use_qk_norm": False, **settings.vision}
    vision = _strict(InternVLVisionConfig, vision_values, "model.vision")
    text_values = {"vocab_size": len(tokenizer), "tie_word_embeddings": False, **settings.text}
    text = _strict(Qwen2Config, text_values, "model.text")
    if text.vocab_size < len(tokenizer):
        what = "the vocabulary is smaller than the tokenizer"
        raise ConfigError(explain(what, "model.text", text.vocab_size, f">= {len(tokenizer)}"))
    grid = _side(vision.image_size) // _side(vision.patch_size) * settings.downsample_ratio
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT),
        image_seq_length=int(grid) ** 2,
        downsample_ratio=settings.downsample_ratio,
        vision_feature_layer=-1,
        # This flag overrides the text config's; its default would tie the head to the embeddings.
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config._attn_implementation = settings.attn_implementation
    return config


def sam2_config(settings: Mapping[str, Any]) -> Sam2Config:
    """Return the native SAM 2 config from a few numbers.

    Args:
        settings: ``image_size`` S, ``fpn_hidden_size`` C, ``backbone`` with ``hidden_size``, ``num_attention_heads``,
            ``blocks_per_stage``, ``window_size_per_stage``, ``global_attention_blocks`` and optionally others of
            ``Sam2HieraDetConfig``; ``mask_decoder`` as in ``Sam2MaskDecoderConfig``; ``fpn_top_down_levels``, the
            levels of the neck that get the next coarser one added.
    """
    unknown = [key for key in settings if key not in SAM_KEYS]
    if unknown:
        raise ConfigError(explain("unknown key", "model.sam2", unknown, ", ".join(SAM_KEYS)))
    size, width = int(settings["image_size"]), int(settings["fpn_hidden_size"])
    backbone = dict(settings["backbone"])
    stem, heads = int(backbone["hidden_size"]), int(backbone.pop("num_attention_heads", 1))
    widths = [stem * 2**stage for stage in range(4)]
    backbone.setdefault("embed_dim_per_stage", widths)
    # transformers does not derive these from num_attention_heads; left alone they would be 1, 2, 4, 8.
    backbone.setdefault("num_attention_heads_per_stage", [heads * 2**stage for stage in range(4)])
    trunk = _strict(Sam2HieraDetConfig, {"image_size": [size, size], **backbone}, "model.sam2.backbone")
    vision = Sam2VisionConfig(
        backbone_config=trunk,
        backbone_channel_list=list(backbone["embed_dim_per_stage"])[::-1],
        backbone_feature_sizes=[[size // stride, size // stride] for stride in (4, 8, 16)],
        fpn_hidden_size=width,
        fpn_top_down_levels=list(settings.get("fpn_top_down_levels", (2, 3))),
    )
    prompt = Sam2PromptEncoderConfig(
        hidden_size=width, image_size=size, mask_input_channels=int(settings.get("mask_input_channels", 16))
    )
    decoder_values = {"hidden_size": width, "iou_head_hidden_dim": width, "dynamic_multimask_via_stability": False}
    decoder_values.update(settings.get("mask_decoder", {}))
    decoder = _strict(Sam2MaskDecoderConfig, decoder_values, "model.sam2.mask_decoder")
    return Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


def _strict(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """Make a transformers config, refusing names that it would silently keep as extra attributes."""
    known = set(inspect.signature(cls.__init__).parameters) | {"rope_theta"}
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ConfigError(explain("unknown key", where, unknown, f"arguments of {cls.__name__}"))
    return cls(**values)


def _side(value: Any) -> int:
    return int(value[0]) if isinstance(value, (list, tuple)) else int(value)

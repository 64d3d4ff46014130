"""From a configuration to a model: names that are unknown are refused, and sizes follow from the configuration."""

from __future__ import annotations

import pytest
import torch

from dual_loop.errors import CheckpointError, ConfigError
from dual_loop.model.build import build_model, build_tokenizer, geometry, sam2_config

from small_model import small_config, small_model


def test_sizes_of_images_and_masks_follow_from_the_model():
    sizes = geometry(small_config())
    assert (sizes.vision_image_size, sizes.grid_size, sizes.grounding_size, sizes.mask_size) == (64, 8, 64, 16)
    assert geometry(small_config(downsample_ratio=0.5)).grid_size == 4


def test_parameters_are_made_in_their_own_dtype_and_those_that_train_in_float32():
    config = small_config(dtype="bfloat16")
    model = build_model(config, build_tokenizer(config.model))
    language = [p for name, p in model.named_parameters() if name.startswith("mllm.")]
    assert {p.dtype for p in language if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32


def test_unknown_config_names_are_refused():
    config = small_config(text={**small_config().model.text, "hiden_size": 3})
    with pytest.raises(ConfigError, match="hiden_size"):
        build_model(config, build_tokenizer(config.model))
    with pytest.raises(ConfigError, match="unknown key"):
        sam2_config({"image_sise": 3})
    with pytest.raises(ConfigError, match="unknown parameter group"):
        build_model(small_config(trainable=("loar",)), build_tokenizer(config.model))


def test_a_missing_tokenizer_is_named():
    with pytest.raises(CheckpointError, match="no tokenizer"):
        build_tokenizer(small_config(tokenizer=None).model, "nowhere/at/all")


def test_prompt_and_image_positions_use_one_matrix():
    model, _, _ = small_model()
    sam = model.grounding_encoder
    assert torch.equal(
        sam.prompt_encoder.shared_embedding.positional_embedding, sam.shared_image_embedding.positional_embedding
    )

"""From a configuration to a model: names that are unknown are refused, and sizes follow from the configuration."""

from __future__ import annotations

import subprocess
import sys

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
    with pytest.raises(ConfigError, match=r"is empty in this model.*loar"):
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


def test_what_weights_will_fill_is_not_drawn(monkeypatch):
    """20 seconds of random numbers, and 9 GB of host memory that is written, for each of eight ranks of a 4B model."""
    config = small_config()
    drawn = set()
    for name in ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_"):
        make = getattr(torch.nn.init, name)
        noted = lambda tensor, *a, make=make, **k: [drawn.add(tensor.data_ptr()), make(tensor, *a, **k)][1]  # noqa: E731
        monkeypatch.setattr(torch.nn.init, name, noted)
    model = build_model(config, build_tokenizer(config.model), drawn=False)
    own = [p for n, p in model.named_parameters() if ".lora_" in n or n.startswith("text_hidden_fcs.")]
    assert drawn <= {p.data_ptr() for p in own}
    assert all(torch.isfinite(p).all() for p in own)


@pytest.mark.slow
def test_an_empty_model_takes_no_memory_before_it_is_filled():
    code = """
import dataclasses, torch
from dual_loop.config import load_config, resolve_config_path
from dual_loop.model.build import build_model, build_tokenizer

def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024

config = load_config(resolve_config_path("bench_mid"))
text = {**config.model.text, "intermediate_size": 2**15}
config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text, lora_r=1))
tokenizer, before = build_tokenizer(config.model), resident()
model = build_model(config, tokenizer, drawn=False)
print(sum(p.numel() * 4 for p in model.parameters()) / 2**20, resident() - before)
"""
    size, grown = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split()[-2:])
    assert size > 1500
    assert grown < 150, f"{grown:.0f} MiB of {size:.0f} are written"

"""A very small model of the package's own code, for tests: random weights, seconds to build, every path."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from dual_loop.config import Config, LossConfig, load_config, resolve_config_path
from dual_loop.data.prepare import batch_from_samples
from dual_loop.model.build import build_model, build_prompter, build_tokenizer, geometry
from dual_loop.model.decode import Prompt
from dual_loop.testing.scenes import generate_pair, generate_scene
from dual_loop.types import Batch, RegionSample


def small_config(**model_changes: Any) -> Config:
    """The tiny configuration, smaller still: 64-pixel images on an 8 x 8 grid."""
    config = load_config(resolve_config_path("tiny_cpu"))
    vision = {**config.model.vision, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    vision.update(image_size=[64, 64], patch_size=[8, 8], num_attention_heads=2)
    text = {**config.model.text, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    sam2 = {
        "image_size": 64,
        "fpn_hidden_size": 32,
        "backbone": {**config.model.sam2["backbone"], "hidden_size": 8},
        "mask_decoder": {"mlp_dim": 32, "num_attention_heads": 2},
    }
    model = dataclasses.replace(
        config.model, vision=vision, text=text, sam2=sam2, lora_r=4, lora_alpha=8, initial_weights=None
    )
    model = dataclasses.replace(model, **model_changes)
    return dataclasses.replace(config, model=model, loss=LossConfig(num_points=0))


def small_model(config: Config | None = None, seed: int = 0) -> tuple[Any, Any, Config]:
    """Return (model, prompter, config) with every parameter random, LoRA B among them."""
    config = config or small_config()
    tokenizer = build_tokenizer(config.model)
    torch.manual_seed(seed)
    model = build_model(config, tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
            elif parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif "grounding_encoder" in name and parameter.dim() >= 2:
                # transformers' scale is so small that masks of all prompts would be the same.
                parameter.normal_(std=0.7 / parameter[0].numel() ** 0.5)
    return model.eval(), build_prompter(config, tokenizer), config


def scene_samples(count: int, source: str = "refcoco", captions: bool = True) -> list[RegionSample]:
    """Generated scenes as region samples, with or without their captions."""
    samples = []
    for seed in range(count):
        scene = generate_scene(1000 + seed)
        texts = tuple((caption,) if captions else () for caption in scene.captions)
        names = tuple(str(k) for k in range(len(scene.objects)))
        samples.append(RegionSample(source, f"scene{seed}", scene.image, np.asarray(scene.masks), names, texts))
    return samples


def pair_samples(count: int) -> list[RegionSample]:
    """Frame pairs with one region each."""
    samples = []
    for seed in range(count):
        first, second = generate_pair(2000 + seed)
        samples.append(
            RegionSample(
                *("sav", f"pair{seed}", first.image, np.asarray(first.masks)[:1], ("0",), ((),)),
                target_image=second.image,
                target_masks=np.asarray(second.masks)[:1],
            )
        )
    return samples


def small_batch(config: Config, samples: list[RegionSample]) -> Batch:
    return batch_from_samples(samples, geometry(config), seed=0)


def caption_prompts(prompter: Any, batch: Batch, question: str) -> list[Prompt]:
    """Prompts that ask for the caption of every region of a batch of one-tile images."""
    cells, seeds = batch.prompt_masks.flatten(1).sum(1).tolist(), batch.region_seeds.tolist()
    questions = [prompter.caption_question(size, question, seed) for size, seed in zip(cells, seeds, strict=True)]
    return [Prompt(*one) for one in zip(questions, batch.region_image.tolist(), batch.prompt_masks, strict=True)]


def recomputed_layers(model: Any) -> int:
    """Return how many decoder layers recompute their activations."""
    return sum(layer.gradient_checkpointing for layer in model.mllm.model.language_model.layers)

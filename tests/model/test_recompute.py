"""Recomputing some decoder layers: the same numbers, exactly as many layers, and the memory that was foreseen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dual_loop.config import LoopConfig
from dual_loop.loop.segmentation_loss import compute_segmentation_loss
from dual_loop.model import hardware
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.build import build_model, build_tokenizer
from dual_loop.model.recompute import checkpoint_first, requested_layers
from dual_loop.training.memory import measure_layer, measure_mask_decoder
from dual_loop.types import RegionCaption

from small_model import recomputed_layers, scene_samples, small_batch, small_config, small_model

LAYERS = 4


def config_of(**model_changes: Any) -> Any:
    base = small_config().model.text
    return small_config(text={**base, "num_hidden_layers": LAYERS}, lora_dropout=0.1, **model_changes)


def captions_of(batch: Any) -> list[RegionCaption]:
    return [RegionCaption(caption or "a star", is_reference=True) for caption in batch.captions]


def step(model: Any, prompter: Any, config: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss sums and gradients of one micro-batch, with the same dropout at every call."""
    batch = small_batch(config, scene_samples(2))
    model.train()
    model.zero_grad()
    torch.manual_seed(5)
    terms = compute_segmentation_loss(model, batch, captions_of(batch), prompter, LoopConfig(), config.loss).terms
    torch.stack([term.total for term in terms.values()]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in trainable_parameters(model).items() if p.grad is not None}
    return {name: float(term.total.detach()) for name, term in terms.items()}, gradients


def count_runs(model: Any) -> list[int]:
    """Let every decoder layer count how often its feed-forward part starts (a repetition ends as soon as it can)."""
    runs = [0] * LAYERS
    for index, layer in enumerate(model.mllm.model.language_model.layers):

        def add(module: Any, inputs: Any, index: int = index) -> None:
            runs[index] += 1

        layer.mlp.register_forward_pre_hook(add)
    return runs


@pytest.mark.parametrize("count", [0, LAYERS // 2, LAYERS])
def test_exactly_the_first_layers_run_again_and_nothing_else_changes(count: int) -> None:
    model, prompter, config = small_model(config_of())
    checkpoint_first(model, 0)
    # All rows in one pass, so that passes count recomputations.
    model.group_rows = False
    expected_terms, expected = step(model, prompter, config)
    checkpoint_first(model, count)
    runs = count_runs(model)
    terms, gradients = step(model, prompter, config)
    assert runs == [2] * count + [1] * (LAYERS - count)
    assert recomputed_layers(model) == count
    assert terms == expected_terms
    assert gradients.keys() == expected.keys()
    assert sum(bool(gradient.abs().max() > 0) for gradient in gradients.values()) > len(gradients) / 2
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


def real_bytes(model: Any, run: Any) -> int:
    """Bytes of all storages that ``run`` saves for its backward pass, parameters and buffers left out."""
    own = [*model.parameters(), *model.buffers()]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_foreseen_bytes_of_a_layer_are_those_of_a_real_forward_pass(dtype: str) -> None:
    model, _, _ = small_model(config_of(dtype=dtype))
    model.train()
    layer = measure_layer(model, 2, 96, dtype)
    language = model.mllm.model.language_model
    kind = language.embed_tokens.weight.dtype
    embeds = torch.randn(2, 96, language.config.hidden_size).to(kind).requires_grad_()
    mask = torch.ones(2, 1, 96, 96, dtype=torch.bool).tril()

    def real(layers: int) -> int:
        language.config.num_hidden_layers = layers
        with hardware.autocast("cpu", dtype):
            return real_bytes(model, lambda: model.run_language(embeds * 1, mask, None))

    # Mask, rotary tables and the last norm are there whatever the number of layers.
    one_layer = (real(LAYERS) - real(1)) / (LAYERS - 1)
    assert layer.kept == pytest.approx(one_layer, rel=0.02)
    assert layer.entry == 2 * 96 * language.config.hidden_size * kind.itemsize


def test_the_measurement_needs_no_memory_and_leaves_the_model_alone() -> None:
    config = config_of()
    hollow = build_model(config, build_tokenizer(config.model), device="meta")
    model, _, _ = small_model(config)
    checkpoint_first(model, 3)
    assert measure_layer(model, 2, 50, "no") == measure_layer(hollow, 2, 50, "no")
    assert recomputed_layers(model) == 3
    assert not model.training
    values = [tensor.device.type for tensor in (*model.parameters(), *model.buffers())]
    assert set(values) == {"cpu"}
    assert {type(parameter) for parameter in model.parameters()} == {torch.nn.Parameter}


def test_the_foreseen_bytes_of_the_mask_decoder_are_those_of_a_real_one() -> None:
    model, _, config = small_model(config_of())
    batch = small_batch(config, scene_samples(2))
    with torch.no_grad():
        features = model.encode_grounding(batch.g_pixel_values)
    width = config.model.sam2["fpn_hidden_size"]
    embeds = torch.randn(5, width).requires_grad_()
    index = torch.tensor([0, 0, 1, 1, 1])

    def run() -> None:
        grounding = model.grounding
        grounding.decode_candidates(grounding.sparse_prompts(embeds * 1), grounding.finish(features), index)

    assert measure_mask_decoder(model, 2, 5) == pytest.approx(real_bytes(model, run), rel=0.02)


def test_the_setting_is_read() -> None:
    config = config_of(gradient_checkpointing=True)

    def wanted(choice: str, is_on: bool = True) -> int | None:
        model = dataclasses.replace(config.model, gradient_checkpointing=is_on)
        speed = dataclasses.replace(config.speed, checkpoint_layers=choice)
        return requested_layers(dataclasses.replace(config, model=model, speed=speed), LAYERS)

    assert [wanted(choice) for choice in ("auto", "all", "none", "3", "99")] == [None, LAYERS, 0, 3, LAYERS]
    assert [wanted(choice, False) for choice in ("auto", "all", "3")] == [0, 0, 0]
    for choice, count in (("3", 3), ("auto", LAYERS), ("none", 0)):
        chosen = dataclasses.replace(config, speed=dataclasses.replace(config.speed, checkpoint_layers=choice))
        assert recomputed_layers(small_model(chosen)[0]) == count

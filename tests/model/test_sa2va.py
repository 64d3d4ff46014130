"""The model: what gets gradient, what trains, that losses fit hand-made ones, and where region tokens stand."""

from __future__ import annotations

import pytest
import torch

from dual_loop.config import LoopConfig
from dual_loop.errors import PromptError
from dual_loop.loop.captioner import generate_caption_from_mask
from dual_loop.loop.segmentation_loss import compute_segmentation_loss
from dual_loop.model.adapters import group_of, trainable_parameters, trainable_table
from dual_loop.model.sa2va import insert_image_tokens
from dual_loop.types import RegionCaption

from small_model import scene_samples, small_batch, small_config, small_model

pytestmark = pytest.mark.usefixtures("precision")


def given(captions):
    return [RegionCaption(caption, is_reference=True) for caption in captions]


def loss_of(model, prompter, config, batch, **changes):
    return compute_segmentation_loss(model, batch, given(batch.captions), prompter, LoopConfig(**changes), config.loss)


def test_every_trained_parameter_gets_gradient_and_no_frozen_one():
    model, prompter, config = small_model()
    model.train()
    output = loss_of(model, prompter, config, small_batch(config, scene_samples(6)))
    sum(term.mean for term in output.terms.values()).backward()
    chosen = set(output.masks.chosen.tolist())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        unpicked = [f"output_hypernetworks_mlps.{k + 1}." for k in range(3) if k not in chosen]
        # The bias of a key projection shifts all scores of a softmax alike: its true gradient is zero.
        if not any(part in name for part in unpicked) and "k_proj.bias" not in name:
            assert parameter.grad.abs().max() > 0, name


def test_single_mask_option_trains_candidate_zero():
    model, prompter, config = small_model(small_config(single_mask=True))
    names = set(trainable_parameters(model))
    assert any("output_hypernetworks_mlps.0." in name for name in names)
    assert not any("output_hypernetworks_mlps.1." in name for name in names)
    output = loss_of(model, prompter, config, small_batch(config, scene_samples(2)))
    assert output.masks.predicted_iou.shape[1] == 1


def test_vision_tower_and_language_backbone_are_frozen_and_the_table_says_so():
    model, _, _ = small_model()
    groups = {group_of(name) for name in trainable_parameters(model)}
    assert groups == {"lora", "mlp1", "mask_decoder", "text_hidden_fcs"}
    table = trainable_table(model)
    assert "vision_tower" in table
    assert f"{sum(p.numel() for p in trainable_parameters(model).values()):,}" in table


def test_new_token_rows_train_alone_and_reach_the_tables():
    model, prompter, config = small_model(small_config(train_embeddings="new_tokens"))
    names = set(trainable_parameters(model))
    assert {"new_token_rows.input_rows", "new_token_rows.output_rows"} <= names
    assert not any("embed_tokens" in name or "lm_head" in name for name in names)
    batch = small_batch(config, scene_samples(2))
    output = loss_of(model, prompter, config, batch)
    sum(term.mean for term in output.terms.values()).backward()
    assert model.new_token_rows.input_rows.grad.abs().sum() > 0
    before = float(output.terms["llm_loss"].total.detach())
    with torch.no_grad():
        model.new_token_rows.output_rows[0] += 1.0
    assert float(loss_of(model, prompter, config, batch).terms["llm_loss"].total) != pytest.approx(before)
    model.sync_new_tokens()
    first = model.new_token_rows.first_id
    assert torch.equal(model.mllm.lm_head.weight[first], model.new_token_rows.output_rows[0])


def test_images_of_another_size_are_refused():
    model, _, _ = small_model()
    with pytest.raises(PromptError, match="wrong size"):
        model.encode_vision(torch.zeros(1, 3, 32, 32))


def test_batched_left_padded_generation_equals_one_by_one():
    model, prompter, config = small_model()
    batch = small_batch(config, scene_samples(4, captions=False))
    loop = LoopConfig(max_new_tokens=5, max_rejected_fraction=1.0)
    together = generate_caption_from_mask(model, prompter, batch, loop)
    alone = generate_caption_from_mask(model, prompter, batch, LoopConfig(**{**loop.__dict__, "rollout_batch_size": 1}))
    assert len(together) == batch.num_regions
    assert all(caption.token_ids for caption in together)
    assert [caption.token_ids for caption in together] == [caption.token_ids for caption in alone]


def test_region_tokens_are_copies_of_image_tokens_in_row_major_order():
    features = torch.arange(2 * 4 * 3, dtype=torch.float32).reshape(2, 4, 3)
    mask = torch.tensor([[[0, 1], [1, 1]]], dtype=torch.bool)
    embedded = torch.full((2, 8, 3), -1.0)
    placeholder = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    out = insert_image_tokens(embedded, placeholder, features, torch.tensor([1]), mask)
    assert torch.equal(out[0, 1:5], features[0])
    assert torch.equal(out[1, :4], features[1])
    assert torch.equal(out[1, 5:], features[1, 1:])
    assert torch.equal(out[0, 0], torch.full((3,), -1.0))


def test_a_wrong_number_of_placeholders_is_refused():
    features, mask = torch.zeros(1, 4, 3), torch.ones(1, 2, 2, dtype=torch.bool)
    with pytest.raises(PromptError, match="differ in number"):
        insert_image_tokens(torch.zeros(1, 5, 3), torch.ones(1, 5, dtype=torch.bool), features, torch.tensor([0]), mask)

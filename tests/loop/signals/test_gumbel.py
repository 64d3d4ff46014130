"""Straight-through captions: discrete forward, a gradient that points the right way, noise with the right law."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dual_loop.loop.signals import gumbel as gumbel_module
from dual_loop.loop.signals.gumbel import (
    conditioned_perturbation,
    soft_embeddings,
    straight_through,
    straight_through_turn,
    straight_through_weights,
    temperature_at,
    with_space,
)
from dual_loop.losses import map_chunks
from dual_loop.model.prompts import clean_caption
from dual_loop.types import WrittenCaption

from loop_settings import MASK_TERMS, build, captioner_rows, gradients, masks_only, setting
from small_model import small_batch, small_model

pytestmark = pytest.mark.usefixtures("precision")


@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 30.0, 1000.0]))
@example(533, 1000.0)
def test_the_chosen_entry_is_always_the_largest(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(6, 5, generator=generator)
    chosen = torch.randint(0, 5, (6,), generator=generator)
    perturbed = conditioned_perturbation(logits, chosen, torch.rand(6, 5, generator=generator))
    assert torch.isfinite(perturbed).all()
    best = perturbed.gather(1, chosen[:, None])[:, 0]
    assert torch.equal(best, perturbed.amax(1))


def test_extreme_random_numbers_stay_finite():
    logits = torch.tensor([[0.0, -80.0, 80.0]])
    for value in (0.0, 1.0):
        for chosen in range(3):
            found = conditioned_perturbation(logits, torch.tensor([chosen]), torch.full((1, 3), value))
            assert torch.isfinite(found).all()


def test_noise_mixed_over_sampled_tokens_is_plain_gumbel_noise():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.5]).expand(200_000, 3)
    chosen = torch.multinomial(logits[0].softmax(0), len(logits), replacement=True, generator=generator)
    perturbed = conditioned_perturbation(logits, chosen, torch.rand(logits.shape, generator=generator))
    noise = perturbed - logits.log_softmax(-1)
    euler = 0.5772156649
    assert noise.mean(0).tolist() == pytest.approx([euler] * 3, abs=0.02)
    assert noise.var(0).tolist() == pytest.approx([math.pi**2 / 6] * 3, abs=0.05)
    # Independent between entries, as unconditioned noise is.
    assert float(torch.corrcoef(noise.T)[0, 1].abs()) < 0.01


def draw(num: int, vocabulary: int, top_k: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num, vocabulary, generator=generator, requires_grad=True)
    tokens = torch.randint(0, vocabulary, (num,), generator=generator)
    return logits, tokens, torch.rand(num, top_k + 1, generator=generator)


@pytest.mark.parametrize(("vocabulary", "top_k"), [(50, 8), (5, 8), (2, 1)])
def test_forward_is_the_look_up_and_the_table_gets_no_gradient(vocabulary, top_k):
    logits, tokens, uniform = draw(7, vocabulary, top_k)
    table = torch.randn(vocabulary, 4, requires_grad=True)
    ids, weights = straight_through_weights(logits, tokens, uniform, 0.7, top_k)
    values = soft_embeddings(table, ids, weights)
    assert torch.equal(values, table.detach()[tokens])
    values.square().sum().backward()
    assert table.grad is None
    assert float(logits.grad.abs().sum()) > 0


def test_gradient_reaches_the_likeliest_tokens_alone():
    logits, tokens, uniform = draw(3, 40, 4)
    ids, weights = straight_through_weights(logits, tokens, uniform, 1.0, 4)
    (weights * torch.randn(weights.shape)).sum().backward()
    touched = logits.grad != 0
    # Normalising over the chosen support keeps the others out.
    assert torch.equal(touched.sum(1) <= 5, torch.ones(3, dtype=torch.bool))
    for row in range(3):
        others = [int(k) for k in logits.detach()[row].argsort(descending=True) if k != tokens[row]][:4]
        assert set(ids[row].tolist()) == {int(tokens[row]), *others}


def test_points_along_the_exact_gradient():
    """A linear listener on four tokens: the exact gradient of the expected loss is known."""
    generator = torch.Generator().manual_seed(1)
    table, listener = torch.randn(4, 3, generator=generator), torch.randn(3, generator=generator)
    start = torch.tensor([0.2, -0.3, 0.5, 0.0])
    exact_logits = start.clone().requires_grad_()
    (exact_logits.softmax(0) @ table @ listener).backward()
    count = 20_000
    logits = start.clone().requires_grad_()
    tokens = torch.multinomial(start.softmax(0), count, replacement=True, generator=generator)
    uniform = torch.rand(count, 4, generator=generator)
    ids, weights = straight_through_weights(logits.expand(count, 4), tokens, uniform, 1.0, 3)
    (soft_embeddings(table, ids, weights) @ listener).mean().backward()
    assert float(torch.cosine_similarity(logits.grad, exact_logits.grad, dim=0)) > 0.95


def test_wrong_arguments():
    logits, tokens, uniform = draw(2, 9, 3)
    with pytest.raises(ValueError, match="temperature"):
        straight_through_weights(logits, tokens, uniform, 0.0, 3)
    with pytest.raises(ValueError, match="uniform"):
        straight_through_weights(logits, tokens, uniform, 1.0, 6)


def test_temperature_schedule():
    assert [temperature_at(p, 1.0, 0.25) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([1, 1, 0.5, 0.25, 0.25])


def test_straight_through_captions_carry_the_mask_loss_to_the_captioner():
    model, _ = gradients(setting("gumbel"), [masks_only()], MASK_TERMS)
    assert (captioner_rows(model) > 0).all()


def test_straight_through_captions_give_the_masks_of_the_discrete_ones():
    config = setting("gumbel")
    model, task = build(config)
    (signal,) = task.signals
    (packed,) = task.prepare([small_batch(config, masks_only())])
    captioning = packed.lessons["gumbel"]
    assert len(captioning.targets) > 0
    with torch.no_grad():
        soft = task(packed).masks.mask_logits
        hard = model.predict(packed).mask_logits
        values = signal.soft_captions(model, captioning)
        ids = packed.input_ids[captioning.into[0], captioning.into[1]]
        looked_up = model.mllm.get_input_embeddings()(ids)
    torch.testing.assert_close(values, looked_up, atol=1e-6, rtol=0)
    torch.testing.assert_close(soft, hard, atol=1e-5, rtol=0)


def test_the_logits_of_a_chunk_alone_exist_at_once(monkeypatch):
    config, results, sizes = setting("gumbel"), [], []
    for chunk in (1000, 3):
        monkeypatch.setattr(gumbel_module, "map_chunks", partial(map_chunks, chunk=chunk))
        model, task = build(config)
        (signal,) = task.signals
        (packed,) = task.prepare([small_batch(config, masks_only())])
        make = model.answer_logits
        monkeypatch.setattr(model, "answer_logits", lambda rows, make=make: [sizes.append(len(rows)), make(rows)][1])
        values = signal.soft_captions(model, packed.lessons["gumbel"])
        largest, _ = max(sizes), sizes.clear()
        assert largest <= chunk
        values.square().sum().backward()
        adapter = model.mllm.model.language_model.layers[0].mlp.up_proj.lora_A.default
        results.append((values.detach(), adapter.weight.grad))
    for seen, expected in zip(*results, strict=True):
        assert (seen - expected).norm() <= 0.02 * expected.norm()  # in bfloat16 parts of a product round differently


def test_straight_through_ids_read_as_the_caption():
    _, prompter, _ = small_model()
    ids = prompter.encode(' "red circle".<|end|>')
    caption = WrittenCaption("red circle", tuple(ids), None, False)
    found = straight_through(prompter, with_space(prompter), 0, caption)
    assert found is not None
    assert prompter.decode_caption(list(found.reading_ids))[0] == " red circle"
    other = WrittenCaption("red circle", tuple(prompter.encode("red  circle")), None, False)
    assert straight_through(prompter, with_space(prompter), 0, other) is None


@pytest.mark.parametrize("text", ["The RED Circle.", "A star"])
def test_straight_through_ids_are_read_as_every_expression(text):
    _, prompter, _ = small_model()
    table = with_space(prompter)
    caption = WrittenCaption(clean_caption(text), tuple(prompter.encode(f" {text}<|end|>")), None, False)
    found = straight_through(prompter, table, 0, caption)
    assert found is not None
    turn, _ = straight_through_turn(prompter, found.reading_ids, "segment", "sure", 0)
    plain = prompter.segment_turn(text, "segment", "sure")
    assert prompter.tokenizer.decode(turn.input_ids) == prompter.tokenizer.decode(plain.input_ids)
    assert table[0, prompter.seg_id] == table[1, prompter.seg_id] == prompter.seg_id


@pytest.mark.parametrize(("text", "unreadable"), [("red [SEG] circle", "special_token"), ("", "empty")])
def test_a_caption_that_step_two_cannot_read_has_no_straight_through_turn(text, unreadable):
    _, prompter, _ = small_model()
    caption = WrittenCaption(text, tuple(prompter.encode(text or ".")), unreadable, False, unreadable)
    assert straight_through(prompter, with_space(prompter), 0, caption) is None

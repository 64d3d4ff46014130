"""Many prompts continued at once: what transformers' generate would write, whatever rows stand beside each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dual_loop.model import decode
from dual_loop.model.decode import (
    CPU_TOKENS,
    IMAGES_AT_ONCE,
    Decoder,
    Prompt,
    left_pad,
    prefixes_at_once,
)

from small_model import caption_prompts, scene_samples, small_batch, small_model

NEW = 6


def test_left_padding():
    assert left_pad([[1]], 9, 3)[0].tolist() == [[9, 9, 1]]
    ids, mask = left_pad([[1], [2, 3]], 9)
    assert ids.tolist() == [[9, 1], [2, 3]]
    assert mask.tolist() == [[False, True], [True, True]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def test_a_cpu_reads_as_many_prefixes_as_keep_it_busy_and_a_gpu_a_fixed_number():
    assert [prefixes_at_once(length, "cpu") for length in (1, CPU_TOKENS // 4, CPU_TOKENS, 10 * CPU_TOKENS)] == [
        IMAGES_AT_ONCE, 4, 1, 1
    ]  # fmt: skip
    assert prefixes_at_once(0, "cpu") == prefixes_at_once(10 * CPU_TOKENS, "cuda") == IMAGES_AT_ONCE


@pytest.fixture(scope="module")
def scene():
    """A model whose texts differ from region to region, four images, and the prompts of all their regions."""
    model, prompter, config = small_model()
    with torch.no_grad():
        for module in (model.mllm.model.language_model, model.mllm.model.multi_modal_projector):
            for parameter in module.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(6.0)
    model.double()
    batch = small_batch(config, scene_samples(4, captions=False))
    prompts = caption_prompts(prompter, batch, "any")
    with torch.no_grad():
        features = model.project_vision(model.encode_vision(batch.pixel_values))
    return model, prompter, batch, prompts, features


def write(scene, prompts):
    """Continue prompts about the four images in one generation."""
    model, prompter, _, _, features = scene
    decoder = Decoder(model, prompter, prompts, features[:, None], NEW)
    return decoder.write(range(len(prompts)))


def test_greedy_texts_are_those_of_transformers_on_whole_prompts(scene):
    model, prompter, batch, prompts, features = scene
    written = write(scene, prompts)
    assert len({tuple(ids) for ids in written}) > 2
    end = prompter.tokenizer.eos_token_id
    for row, ids in enumerate(written):
        image, masks = prompts[row].image, batch.prompt_masks[row][None]
        whole = torch.tensor([[*prompter.image_prefix(1), *prompts[row].question]])
        embeds = model.embed_prompt(whole, features[image : image + 1], torch.zeros(1, dtype=torch.long), masks)
        expected = model.mllm.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(whole),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=prompter.tokenizer.pad_token_id,
        )[0].tolist()
        # What ends a turn as text is no single token, so transformers may go on behind it.
        assert ids == expected[: len(ids)]
        assert len(ids) == NEW or ids[-1] == end or prompter.ends_turn(ids)


def test_a_text_does_not_depend_on_the_rows_beside_it(scene):
    model, prompter, _, greedy, features = scene
    prompts = [replace(one, temperature=1.0, seed=100 + n, top_p=0.9 if n % 2 else 1.0) for n, one in enumerate(greedy)]
    decoder = Decoder(model, prompter, prompts, features[:, None], NEW)
    together = decoder.write(range(len(prompts)))
    for size in (1, 3):
        assert decoder.write_all(size) == together
    assert decoder.write(list(reversed(range(len(prompts))))) == together[::-1]
    assert write(scene, [replace(one, seed=900 + n) for n, one in enumerate(prompts)]) != together


def test_temperature_zero_is_greedy_beside_sampled_rows(scene):
    first, second = scene[3][:2]
    mixed = write(scene, [first, replace(first, temperature=1.0, seed=3), second])
    assert [mixed[0], mixed[2]] == write(scene, [first, second])


def test_images_of_unlike_size_share_a_generation(scene):
    """Prefixes of one and of two tiles are padded, and each text is that of its image alone."""
    model, prompter, batch, prompts, features = scene
    images = [features[:1], features[1:3], features[3:]]
    rows = [batch.region_image.tolist().index(image) for image in (0, 2, 3)]
    mixed = [replace(prompts[row], image=number) for number, row in enumerate(rows)]
    together = Decoder(model, prompter, mixed, images, NEW).write(range(3))
    for number, image in enumerate(images):
        alone = Decoder(model, prompter, [replace(mixed[number], image=0)], [image], NEW)
        assert alone.write([0])[0] == together[number]


def test_a_question_without_a_region_is_answered_too(scene):
    question = scene[1].segment_question("the red star", "segment")
    assert 1 <= len(write(scene, [Prompt(question, 0)])[0]) <= NEW


def test_looking_seldom_and_padding_as_on_a_gpu_write_the_same(scene, monkeypatch):
    """Rows and columns in blocks, tokens looked at in groups: texts that end in between are cut where they ended."""
    prompts = [replace(one, temperature=float(n % 2), seed=n) for n, one in enumerate(scene[3])]
    monkeypatch.setattr(type(scene[1]), "ends_turn", lambda self, ids: sum(ids) % 3 == 0)
    expected = write(scene, prompts)
    assert len({len(ids) for ids in expected}) > 1
    monkeypatch.setattr(decode, "round_rows", lambda count, device: -(-count // 4) * 4)
    monkeypatch.setattr(decode, "round_columns", lambda count, device: -(-count // 64) * 64)
    for every in (2, 4, 8):
        monkeypatch.setattr(
            Decoder, "look_every", property(lambda self, n=every: n, lambda self, value: None), raising=False
        )
        assert write(scene, prompts) == expected


def test_rows_are_as_many_as_the_memory_holds(scene, monkeypatch):
    model, prompter, _, prompts, features = scene
    decoder = Decoder(model, prompter, prompts, features[:, None], NEW)
    few, many = (decoder.rows_that_fit(length) for length in (10**7, 10))
    assert 1 <= few < many <= 160
    monkeypatch.setattr(decode, "CACHE_SHARE", 0.0)
    assert decoder.rows_that_fit(10) == 1
    assert decoder.write_all() == decoder.write_all(len(prompts))


def test_samples_have_the_frequencies_of_the_softmax(scene, monkeypatch):
    """The first token of many draws of one prompt, against its probabilities."""
    model, prompter, _, prompts, features = scene
    draws = [replace(prompts[0], temperature=2.0, seed=seed) for seed in range(4000)]
    decoder = Decoder(model, prompter, draws, features[:, None], 1)
    found = []
    choose = Decoder._choose

    def seen(self, hidden, state):
        found.append(hidden)
        choose(self, hidden, state)

    monkeypatch.setattr(Decoder, "_choose", seen)
    ids = torch.tensor(decoder.write_all(4000))[:, 0]
    expected = (model.mllm.lm_head(found[0][:1]).float() / 2.0).softmax(-1)[0]
    counts = torch.bincount(ids, minlength=len(expected)) / len(draws)
    error = (expected * (1 - expected) / len(draws)).sqrt()
    assert ((counts - expected).abs() < 5 * error + 1e-3).all()

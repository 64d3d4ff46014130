"""Packed rows compute what separate rows compute, and prompts are the strings that Sa2VA was trained on."""

from __future__ import annotations

import json

import pytest
import torch

from dual_loop.errors import PromptError
from dual_loop.model.packing import branch_attention_mask, left_pad, pack_rows
from dual_loop.model.prompts import Branch
from dual_loop.model.visual_prompt import insert_image_tokens

from small_model import scene_samples, small_batch, small_model


def test_attention_mask_shows_prefix_and_own_branch_only():
    mask = branch_attention_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0]
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    # The padded position may see the prefix too; what counts is that nobody sees it and it sees itself.
    assert mask[:5].int().tolist() == expected[:5]
    assert bool(mask[5, 5])
    assert not mask[:5, 5].any()


def test_positions_restart_in_every_branch():
    packed = pack_rows([[7, 8]], [[Branch((1, 2), (-100, 2)), Branch((3,), (-100,))]], pad_id=0)
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert packed["labels"].tolist() == [[-100, -100, -100, 2, -100]]


def test_packed_branches_equal_rows_of_their_own():
    model, prompter, config = small_model()
    batch = small_batch(config, scene_samples(1))
    features = model.project_vision(model.encode_vision(batch.pixel_values))
    texts = ["the red star", "the big blue heart on the left", "a cloud"]
    branches = [prompter.segment_branch(text, "segment") for text in texts]
    packed = pack_rows([prompter.image_prefix(1)], [branches], 0)
    none = torch.zeros(0, 8, 8, dtype=torch.bool)
    nothing = torch.zeros(0, dtype=torch.long)
    embedded = model.embed_prompt(packed["input_ids"], features, nothing, none)
    hidden = model.run_language(embedded, packed["attention_mask"], packed["position_ids"])[0]
    start = len(prompter.image_prefix(1))
    for branch in branches:
        ids = torch.tensor([[*prompter.image_prefix(1), *branch.input_ids]])
        alone = model.run_language(model.embed_prompt(ids, features, nothing, none), torch.ones_like(ids), None)[0]
        length = len(branch.input_ids)
        torch.testing.assert_close(hidden[start : start + length], alone[-length:], atol=2e-5, rtol=1e-4)
        start += length


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


def test_left_padding():
    ids, mask = left_pad([[1], [2, 3]], 9)
    assert ids.tolist() == [[9, 1], [2, 3]]
    assert mask.tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("caption", ["a [SEG] thing", "x</vp>", "stop<|end|>here", "<img>"])
def test_a_caption_with_a_marker_is_refused(caption):
    _, prompter, _ = small_model()
    with pytest.raises(PromptError, match="special token"):
        prompter.segment_branch(caption, "segment")


def test_any_text_goes_in_and_comes_out():
    _, prompter, _ = small_model()
    for text in ("the red star", "日本語 é ß", "tab\tand 🎈"):
        assert prompter.decode_caption(prompter.encode(text)) == (text, False)
    ids = prompter.encode("the star<|end|>")
    assert prompter.decode_caption(ids) == ("the star", True)


def test_prompt_strings_are_those_of_sa2va():
    _, prompter, _ = small_model()
    text = prompter.tokenizer.decode(prompter.image_prefix(1) + prompter.caption_question(2, "short"))
    picture = "<img>" + "<IMG_CONTEXT>" * 64 + "</img>"
    assert text == (
        f"<|user|>\n{picture}\nThere are 1 part regions in the picture: region1<vp><IMG_CONTEXT><IMG_CONTEXT></vp>.\n\n"
        "Please give me a short description of the region in the picture marked by region1.<|end|>\n<|assistant|>\n"
    )
    branch = prompter.segment_branch("the red star", "segment")
    assert prompter.tokenizer.decode(list(branch.input_ids)) == (
        "\nPlease segment the red star in this image.<|end|><|assistant|>\nSure, [SEG].<|end|>"
    )
    carried = [i for i in branch.labels if i != -100]
    assert prompter.tokenizer.decode(carried) == "Sure, [SEG].<|end|>"


def test_caption_prompt_equals_the_reference(golden):
    _, prompter, _ = small_model()
    reference = json.loads((golden / "sa2va_tiny" / "inputs.json").read_text())["caption_texts"][0]
    ours = prompter.tokenizer.decode(prompter.image_prefix(1) + prompter.caption_question(30, "short"))
    assert ours.replace("<IMG_CONTEXT>" * 64, "{256 x <IMG_CONTEXT>}", 1) == reference


def short(text, prompter, cells):
    """Undo the reference's abbreviation of the image tokens."""
    return text.replace("<IMG_CONTEXT>" * cells, "{256 x <IMG_CONTEXT>}", 1)


TURNS = [
    [
        ("Can you segment the red circle in this image?", "It is [SEG]."),
        ("Please segment the left blue square in this image.", "Sure, [SEG]."),
    ],
    [
        ("Please segment region1 in this image.", "Sure, the segmentation result is [SEG]."),
        ("What is region2 in this image? Please respond with segmentation mask.", "[SEG]."),
        ("Please segment region1 in this image", "It is [SEG]."),
    ],
]


def test_conversations_equal_the_reference_in_text_ids_and_labels(golden):
    from safetensors.torch import load_file

    from dual_loop.model.build import load_tokenizer_file
    from dual_loop.model.prompts import Prompter

    folder = golden / "sa2va_tiny"
    prompter = Prompter(load_tokenizer_file(folder / "tokenizer.json"), "phi3_chat", 256)
    inputs, texts = load_file(folder / "inputs.safetensors"), json.loads((folder / "inputs.json").read_text())
    for row, turns in enumerate(TURNS):
        cells = texts["region_token_counts"].get(str(row), [])
        branch = prompter.conversation(turns, 1, cells)
        length = int(inputs["attention_mask"][row].sum())
        assert list(branch.input_ids) == inputs["input_ids"][row, :length].tolist()
        assert list(branch.labels) == inputs["labels"][row, :length].tolist()
        assert short(prompter.tokenizer.decode(list(branch.input_ids)), prompter, 256) == texts["loss_texts"][row]


def test_conversation_strings_of_both_forms():
    _, prompter, _ = small_model()
    turns = [("Q1?", "A [SEG]."), ("Q2?", "B.")]
    picture = "<img>" + "<IMG_CONTEXT>" * 64 + "</img>"
    ours = prompter.conversation(turns, 1, [2, 1])
    regions = "region1<vp><IMG_CONTEXT><IMG_CONTEXT></vp>, region2<vp><IMG_CONTEXT></vp>"
    assert prompter.tokenizer.decode(list(ours.input_ids)) == (
        f"<|user|>\n{picture}\nThere are 2 part regions in the picture: {regions}.\nQ1?<|end|><|assistant|>\nA [SEG]."
        "<|end|><|user|>\nQ2?<|end|><|assistant|>\nB.<|end|>"
    )
    assert prompter.tokenizer.decode([i for i in ours.labels if i != -100]) == "A [SEG].<|end|>B.<|end|>"
    stock = prompter.conversation(turns, 1, stock=True)
    assert prompter.tokenizer.decode(list(stock.input_ids)) == (
        f"<|user|>\n{picture}\nQ1?<|end|>\n<|assistant|>\nA [SEG].<|end|>\n"
        "<|user|>\nQ2?<|end|>\n<|assistant|>\nB.<|end|>"
    )
    assert prompter.tokenizer.decode([i for i in stock.labels if i != -100]) == "A [SEG].<|end|>B.<|end|>"


@pytest.mark.parametrize("template", ["internlm2_chat", "internvl2_5", "qwen_chat"])
def test_stock_templates(template):
    from dual_loop.model.prompts import TEMPLATES

    form = TEMPLATES[template]
    assert form.caption_turn == "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert form.system_turn.format(system="S") == "<|im_start|>system\nS<|im_end|>\n"
    assert form.stop_texts[0] == form.answer_end == "<|im_end|>"


def test_banks_by_name_and_by_seed():
    from dual_loop.model.prompts import SEGMENT_ANSWERS, SEGMENT_QUESTIONS, choose

    assert choose(SEGMENT_ANSWERS, "bare") == "[SEG]."
    drawn = {choose(SEGMENT_QUESTIONS, "any", seed) for seed in range(200)}
    assert drawn == set(SEGMENT_QUESTIONS.values())
    assert choose(SEGMENT_QUESTIONS, "any", 7) == choose(SEGMENT_QUESTIONS, "any", 7)
    with pytest.raises(PromptError, match="nosuch"):
        choose(SEGMENT_QUESTIONS, "nosuch")
    _, prompter, _ = small_model()
    texts = {
        prompter.tokenizer.decode(list(prompter.segment_branch("it", "any", "any", s).input_ids)) for s in range(50)
    }
    assert len(texts) > 10

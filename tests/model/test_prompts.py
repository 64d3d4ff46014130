"""Prompts are the strings, ids and labels that Sa2VA was trained on."""

from __future__ import annotations

import json

import pytest

from dual_loop.data.captions import MARKERS
from dual_loop.errors import PromptError
from dual_loop.model.prompts import NEW_TOKENS, SEGMENT_QUESTIONS, TEMPLATES, Prompter

from small_model import small_model


@pytest.mark.parametrize("caption", ["a [SEG] thing", "x</vp>", "stop<|end|>here", "<img>", "a <VP> car"])
def test_a_caption_with_a_marker_is_refused(caption):
    _, prompter, _ = small_model()
    with pytest.raises(PromptError, match="special token"):
        prompter.segment_turn(caption, "segment")


def test_the_data_knows_every_marker():
    _, prompter, _ = small_model()
    stops = {text for template in TEMPLATES.values() for text in template.stop_texts}
    assert {*NEW_TOKENS, *prompter.markers, *stops} <= set(MARKERS)
    assert all(prompter.find_marker(f"a {marker} car") for marker in (*prompter.markers, "<|user|>", "<|im_start|>"))


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
    turn = prompter.segment_turn("the red star", "segment")
    assert prompter.tokenizer.decode(list(turn.input_ids)) == (
        "\nPlease segment the red star in this image.<|end|><|assistant|>\nSure, [SEG].<|end|>"
    )
    carried = [i for i in turn.labels if i != -100]
    assert prompter.tokenizer.decode(carried) == "Sure, [SEG].<|end|>"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("The Red Star.", "the red star"),
        ("left of Mr. T..", "left of mr. t."),
        ("ÉTOILE", "étoile"),
        ("a star", "a star"),
    ],
)
def test_an_expression_is_read_in_lower_case_without_a_final_full_stop(text, read):
    _, prompter, _ = small_model()
    for question in ("segment", "respond", "mission"):
        plain = prompter.encode(f"\n{SEGMENT_QUESTIONS[question].format(caption=read)}<|end|><|assistant|>\n")
        assert prompter.segment_question(text, question) == plain
        assert list(prompter.segment_turn(text, question).input_ids[: len(plain)]) == plain
    answered = [i for i in prompter.caption_turn(2, text, "short").labels if i != -100]
    assert prompter.decode_caption(answered) == (text, True), "an answer stays as it was written"


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

    folder = golden / "sa2va_tiny"
    prompter = Prompter(load_tokenizer_file(folder / "tokenizer.json"), "phi3_chat", 256)
    inputs, texts = load_file(folder / "inputs.safetensors"), json.loads((folder / "inputs.json").read_text())
    for row, turns in enumerate(TURNS):
        cells = texts["region_token_counts"].get(str(row), [])
        turn = prompter.conversation(turns, 1, cells)
        length = int(inputs["attention_mask"][row].sum())
        assert list(turn.input_ids) == inputs["input_ids"][row, :length].tolist()
        assert list(turn.labels) == inputs["labels"][row, :length].tolist()
        assert short(prompter.tokenizer.decode(list(turn.input_ids)), prompter, 256) == texts["loss_texts"][row]


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


def test_the_newer_code_ends_every_turn_with_a_line_break_without_loss():
    _, prompter, _ = small_model()
    newer = Prompter(prompter.tokenizer, "qwen_chat", 64)
    picture, end = "<img>" + "<IMG_CONTEXT>" * 64 + "</img>", "<|im_end|>\n"
    turn = newer.conversation([("Q1?", "A [SEG]."), ("Q2?", "B.")], 1)
    user, assistant = "<|im_start|>user\n", "<|im_start|>assistant\n"
    decoded = [prompter.tokenizer.decode(list(ids)) for ids in (turn.input_ids, [i for i in turn.labels if i != -100])]
    expected = f"{user}{picture}\nQ1?{end}{assistant}A [SEG].{end}{user}Q2?{end}{assistant}B.{end}"
    assert decoded == [expected, "A [SEG].<|im_end|>B.<|im_end|>"]
    later = newer.segment_turn("a cat", "segment", is_first=False)
    assert prompter.tokenizer.decode(list(later.input_ids)).startswith(f"\n{user}")


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
    texts = {prompter.tokenizer.decode(list(prompter.segment_turn("it", "any", "any", s).input_ids)) for s in range(50)}
    assert len(texts) > 10

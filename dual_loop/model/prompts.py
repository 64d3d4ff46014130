"""Prompt strings and token ids: chat templates, question banks, and the pieces of a packed sequence.

The forms under ``phi3_chat`` are those that Sa2VA was trained on. Its language model is Qwen2, so ``<|user|>``,
``<|end|>`` and ``<|assistant|>`` are plain text there, cut by byte-pair encoding; only the image and region markers
are single tokens. An image always comes first, so that every question about it shares the same prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dual_loop.errors import PromptError, explain

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
SEG = "[SEG]"
REGION_START, REGION_END = "<vp>", "</vp>"
NEW_TOKENS = (SEG, "<p>", "</p>", REGION_START, REGION_END)
"""The five tokens that Sa2VA appends to the vocabulary, in the order of their ids."""


@dataclass(frozen=True)
class ChatTemplate:
    """One turn of a conversation, split where the question and the answer go.

    Attributes:
        segment_turn: text around the question of a segmentation turn, up to where the answer starts.
        caption_turn: the same for a captioning turn.
        answer_end: text that closes an answer; it carries loss.
        stop_texts: generation ends where one of these appears.
    """

    segment_turn: str
    caption_turn: str
    answer_end: str
    stop_texts: tuple[str, ...]


def _chat_ml(user: str, end: str, assistant: str) -> ChatTemplate:
    turn = f"{user}{{question}}{end}\n{assistant}"
    return ChatTemplate(segment_turn=turn, caption_turn=turn, answer_end=end, stop_texts=(end,))


TEMPLATES: Mapping[str, ChatTemplate] = {
    # Sa2VA writes no newline before <|assistant|> when it trains segmentation, and one when it asks for a caption.
    "phi3_chat": ChatTemplate(
        segment_turn="<|user|>\n{question}<|end|><|assistant|>\n",
        caption_turn="<|user|>\n{question}<|end|>\n<|assistant|>\n",
        answer_end="<|end|>",
        stop_texts=("<|end|>",),
    ),
    "internlm2_chat": _chat_ml("<|im_start|>user\n", "<|im_end|>", "<|im_start|>assistant\n"),
    "qwen_chat": _chat_ml("<|im_start|>user\n", "<|im_end|>", "<|im_start|>assistant\n"),
}

REGION_LIST = "There are 1 part regions in the picture: region1{region}.\n\n"

CAPTION_QUESTIONS: Mapping[str, str] = {
    "short": "Please give me a short description of the region in the picture marked by region1.",
    "detailed": "Please describe region1 in the picture in detail.",
    "refer": "Describe region1 so that nobody could take another object in the picture for it.",
}

SEGMENT_QUESTIONS: Mapping[str, str] = {
    "segment": "Please segment {caption} in this image.",
    "can_you": "Can you segment {caption} in this image?",
    "mission": "Please segment: {caption}",
}

SEGMENT_ANSWER = f"Sure, {SEG}."


@dataclass(frozen=True)
class Branch:
    """Token ids that follow an image prefix, with the part that carries loss.

    Attributes:
        input_ids: token ids of question and answer.
        labels: the same length; the token id where it carries loss, -100 elsewhere.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


class Prompter:
    """Turns captions and region sizes into token ids with one tokenizer and one template.

    Args:
        tokenizer: a transformers tokenizer that holds the image tokens and :data:`NEW_TOKENS` as single tokens.
        template: key of :data:`TEMPLATES`.
        image_tokens_per_tile: M, the number of tokens of one image tile.
    """

    def __init__(self, tokenizer: Any, template: str, image_tokens_per_tile: int) -> None:
        if template not in TEMPLATES:
            raise PromptError(explain("unknown chat template", seen=template, expected=", ".join(TEMPLATES)))
        self.tokenizer = tokenizer
        self.template = TEMPLATES[template]
        self.image_tokens_per_tile = image_tokens_per_tile
        self.markers = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, *NEW_TOKENS)
        self.seg_id, self.image_context_id = self.token_id(SEG), self.token_id(IMAGE_CONTEXT)
        for marker in self.markers:
            self.token_id(marker)

    def token_id(self, marker: str) -> int:
        """Return the id of a marker that must be exactly one token.

        Raises:
            PromptError: the tokenizer cuts the marker into several tokens or does not know it.
        """
        ids = self.tokenizer.encode(marker, add_special_tokens=False)
        if len(ids) != 1:
            raise PromptError(
                explain(
                    "a special token is not a single token of the tokenizer",
                    where=marker,
                    seen=f"ids {ids}",
                    expected="one id",
                    fix="add the tokens of dual_loop.model.prompts.NEW_TOKENS to the tokenizer",
                )
            )
        return int(ids[0])

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]

    def find_marker(self, text: str) -> str | None:
        """Return the first image or region marker or turn delimiter inside ``text``, None where there is none."""
        forbidden = (*self.markers, *self.template.stop_texts, "<|user|>", "<|assistant|>", "<|im_start|>")
        return next((marker for marker in forbidden if marker in text), None)

    def _split_turn(self, turn: str) -> tuple[str, str]:
        before, after = turn.split("{question}")
        return before, after

    def image_prefix(self, num_tiles: int) -> list[int]:
        """Return the ids from the start of the turn to the end of the image: the part that questions share."""
        before, _ = self._split_turn(self.template.segment_turn)
        count = num_tiles * self.image_tokens_per_tile
        start, end = self.token_id(IMAGE_START), self.token_id(IMAGE_END)
        return [*self.encode(before), start, *[self.image_context_id] * count, end]

    def caption_question(self, num_cells: int, question: str) -> list[int]:
        """Return the ids that ask for the caption of a region of ``num_cells`` grid cells, after the image prefix."""
        if num_cells < 1:
            raise PromptError(explain("a region prompt needs at least one grid cell", seen=num_cells, expected=">= 1"))
        _, after = self._split_turn(self.template.caption_turn)
        region = f"{REGION_START}{IMAGE_CONTEXT * num_cells}{REGION_END}"
        return self.encode("\n" + REGION_LIST.format(region=region) + CAPTION_QUESTIONS[question] + after)

    def caption_branch(self, num_cells: int, caption: str, question: str) -> Branch:
        """Return the captioning turn with ``caption`` as the answer; the answer and its end carry loss."""
        self._refuse_markers(caption)
        return self._branch(self.caption_question(num_cells, question), caption)

    def segment_branch(self, caption: str, question: str) -> Branch:
        """Return the segmentation turn for ``caption`` with the answer that holds [SEG]."""
        self._refuse_markers(caption)
        _, after = self._split_turn(self.template.segment_turn)
        text = SEGMENT_QUESTIONS[question].format(caption=caption)
        return self._branch(self.encode("\n" + text + after), SEGMENT_ANSWER)

    def _branch(self, question_ids: list[int], answer: str) -> Branch:
        answer_ids = self.encode(answer + self.template.answer_end)
        labels = [-100] * len(question_ids) + answer_ids
        return Branch(tuple(question_ids + answer_ids), tuple(labels))

    def _refuse_markers(self, caption: str) -> None:
        marker = self.find_marker(caption)
        if marker is not None:
            raise PromptError(
                explain(
                    "a caption holds a special token",
                    where=repr(caption),
                    seen=marker,
                    expected="plain text",
                    fix="reject the caption (the captioner does) or clean the data set's text",
                )
            )

    def decode_caption(self, token_ids: list[int]) -> tuple[str, bool]:
        """Return the text of generated ids and whether a stop text or end token closed it."""
        end_id = self.tokenizer.eos_token_id
        ended = end_id is not None and end_id in token_ids
        ids = token_ids[: token_ids.index(end_id)] if ended else token_ids
        text = str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for stop in self.template.stop_texts:
            if stop in text:
                text, ended = text.split(stop)[0], True
        return text, ended

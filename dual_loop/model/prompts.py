"""Prompt strings and token ids: chat templates, question banks, and the pieces of a packed sequence.

The forms under ``phi3_chat`` are those that Sa2VA was trained on. Its language model is Qwen2, so ``<|user|>``,
``<|end|>`` and ``<|assistant|>`` are plain text there, cut by byte-pair encoding; only the image and region markers
are single tokens. An image always comes first, so that every question about it shares the same prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dual_loop.errors import PromptError, explain
from dual_loop.types import Turn, WrittenCaption

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
SEG = "[SEG]"
REGION_START, REGION_END = "<vp>", "</vp>"
NEW_TOKENS = (SEG, "<p>", "</p>", REGION_START, REGION_END)
"""The five tokens that Sa2VA appends to the vocabulary, in the order of their ids."""


@dataclass(frozen=True)
class ChatTemplate:
    """The texts around one turn of a conversation.

    Attributes:
        segment_turn: around the question of a segmentation turn, up to where the answer starts.
        caption_turn: the same for a captioning turn; the stock form of the template.
        answer_end: closes an answer; it carries loss.
        stop_texts: generation ends where one of these appears.
        system_turn: around a system message, before the first turn; Sa2VA sends none.
        turn_separator: between the turns of a stock conversation, without loss.
        segment_separator: behind every answer of a segmentation turn, without loss. Sa2VA's code on InternVL2.5 writes
            none; its newer code, on InternVL3, does.
    """

    segment_turn: str
    caption_turn: str
    answer_end: str
    stop_texts: tuple[str, ...]
    system_turn: str
    turn_separator: str = "\n"
    segment_separator: str = ""


def _chat_ml(stop_texts: tuple[str, ...] = ("<|im_end|>",), segment_separator: str = "") -> ChatTemplate:
    turn = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\n{system}<|im_end|>\n"
    return ChatTemplate(turn, turn, "<|im_end|>", stop_texts, system, segment_separator=segment_separator)


TEMPLATES: Mapping[str, ChatTemplate] = {
    # Sa2VA writes no newline before <|assistant|> when it trains segmentation, and one when it asks for a caption.
    "phi3_chat": ChatTemplate(
        segment_turn="<|user|>\n{question}<|end|><|assistant|>\n",
        caption_turn="<|user|>\n{question}<|end|>\n<|assistant|>\n",
        answer_end="<|end|>",
        stop_texts=("<|end|>",),
        system_turn="<|system|>\n{system}<|end|>\n",
    ),
    "internlm2_chat": _chat_ml(),
    "internvl2_5": _chat_ml(),
    "qwen_chat": _chat_ml(("<|im_end|>", "<|endoftext|>"), "\n"),
}
"""Stock forms after xtuner's templates of these names; ``internvl2_5`` is InternVL2.5's, without its system text."""

ANY = "any"
"""In place of a question's or answer's name: each region draws one from the bank by its seed, as Sa2VA trains."""

CAPTION_QUESTIONS: Mapping[str, str] = {
    "short": "Please give me a short description of the region in the picture marked by region1.",
    "detailed": "Please describe region1 in the picture in detail.",
    "refer": "Describe region1 so that nobody could take another object in the picture for it.",
    "what": "What is in region1? Answer with one noun phrase.",
    "distinct": "Which words set region1 apart from everything else in the picture?",
}
"""``short`` is the form of Sa2VA's region captions; the others are this package's own."""

SEGMENT_QUESTIONS: Mapping[str, str] = {
    "segment": "Please segment {caption} in this image.",
    "segment_bare": "Please segment {caption} in this image",
    "can_you": "Can you segment {caption} in this image?",
    "can_you_bare": "Can you segment {caption} in this image",
    "respond": "What is {caption} in this image? Please respond with segmentation mask.",
    "output": "What is {caption} in this image? Please output segmentation mask.",
    "mission": "Please segment: {caption}",
}
"""The forms that the checkpoint was trained on, and ``mission``, the short one."""

SEGMENT_ANSWERS: Mapping[str, str] = {
    "sure": f"Sure, {SEG}.",
    "it_is": f"It is {SEG}.",
    "sure_it_is": f"Sure, it is {SEG}.",
    "result": f"Sure, the segmentation result is {SEG}.",
    "bare": f"{SEG}.",
}


def choose(bank: Mapping[str, str], name: str, seed: int = 0) -> str:
    """Return the text called ``name``; for :data:`ANY` one that ``seed`` (a region's) decides.

    Raises:
        PromptError: the bank has no such name.
    """
    if name == ANY:
        # Knuth's multiplicative hash: seeds of neighbouring regions differ little.
        return list(bank.values())[(seed * 2654435761 % 2**32) * len(bank) >> 32]
    if name not in bank:
        raise PromptError(explain("unknown question or answer", seen=name, expected=", ".join((*bank, ANY))))
    return bank[name]


def list_regions(num_cells: Sequence[int]) -> str:
    """Return the sentence that introduces regions with their placeholder tokens, in Sa2VA's words.

    The grammar stays as it was trained, also for one region.

    Raises:
        PromptError: a region has no grid cell.
    """
    if min(num_cells) < 1:
        what = "a region prompt needs at least one grid cell"
        raise PromptError(explain(what, seen=list(num_cells), expected=">= 1 each"))
    parts = [f"region{n}{REGION_START}{IMAGE_CONTEXT * count}{REGION_END}" for n, count in enumerate(num_cells, 1)]
    return f"There are {len(parts)} part regions in the picture: {', '.join(parts)}."


class Prompter:
    """Turns captions and region sizes into token ids with one tokenizer and one template.

    Args:
        tokenizer: a transformers tokenizer that holds the image tokens and :data:`NEW_TOKENS` as single tokens.
        template: key of :data:`TEMPLATES`.
        image_tokens_per_tile: M, the number of tokens of one image tile.

    Raises:
        PromptError: an unknown template, or a marker that the tokenizer cuts into several tokens.
    """

    def __init__(self, tokenizer: Any, template: str, image_tokens_per_tile: int) -> None:
        if template not in TEMPLATES:
            raise PromptError(explain("unknown chat template", seen=template, expected=", ".join(TEMPLATES)))
        self.tokenizer = tokenizer
        self.template = TEMPLATES[template]
        self.image_tokens_per_tile = image_tokens_per_tile
        self.segment_parts = self.template.segment_turn.split("{question}")
        self.caption_parts = self.template.caption_turn.split("{question}")
        self.markers = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, *NEW_TOKENS)
        self.marker_ids: dict[str, int] = {}
        for marker in self.markers:
            ids = self.encode(marker)
            if len(ids) != 1:
                what = "a special token is not a single token of the tokenizer"
                fix = "add the tokens of dual_loop.model.prompts.NEW_TOKENS to the tokenizer"
                raise PromptError(explain(what, marker, f"ids {ids}", "one id", fix))
            self.marker_ids[marker] = ids[0]
        self.seg_id, self.image_context_id = self.marker_ids[SEG], self.marker_ids[IMAGE_CONTEXT]

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def find_marker(self, text: str) -> str | None:
        """Return the first image or region marker or turn delimiter inside ``text``, None where there is none.

        One that reading in lower case would make of it counts as well.
        """
        forbidden = (*self.markers, *self.template.stop_texts, "<|user|>", "<|assistant|>", "<|im_start|>")
        forms = (text, read_expression(text))
        return next((marker for marker in forbidden if any(marker in form for form in forms)), None)

    def image_prefix(self, *num_tiles: int) -> list[int]:
        """Return the ids from the start of the turn to the end of the image: the part that questions share.

        ``num_tiles``: of the image, or of each frame of a clip; a line break stands between two frames.
        """
        before, _ = self.segment_parts
        start, end = self.marker_ids[IMAGE_START], self.marker_ids[IMAGE_END]
        ids = self.encode(before)
        for number, tiles in enumerate(num_tiles):
            ids += [*(self.encode("\n") if number else ()), start]
            ids += [*[self.image_context_id] * (tiles * self.image_tokens_per_tile), end]
        return ids

    def caption_question(self, num_cells: int, question: str, seed: int = 0) -> list[int]:
        """Return the ids that ask for the caption of a region of ``num_cells`` grid cells, after the image prefix."""
        _, after = self.caption_parts
        text = choose(CAPTION_QUESTIONS, question, seed)
        return self.encode(f"\n{list_regions([num_cells])}\n\n{text}{after}")

    def caption_turn(self, num_cells: int, caption: str, question: str, seed: int = 0) -> Turn:
        """Return the captioning turn with ``caption`` as the answer; the answer and its end carry loss."""
        self._refuse_markers(caption)
        return self.answered(self.caption_question(num_cells, question, seed), caption)

    def segment_turn(
        self, caption: str, question: str, answer: str = "sure", seed: int = 0, is_first: bool = True
    ) -> Turn:
        """Return the segmentation turn for ``caption`` with the answer that holds [SEG].

        ``is_first``: the turn follows the image directly; else it is a later turn of the same conversation.
        """
        ids = self.segment_question(caption, question, seed, is_first)
        return self.answered(ids, choose(SEGMENT_ANSWERS, answer, seed + 1))

    def segment_question(self, caption: str, question: str, seed: int = 0, is_first: bool = True) -> list[int]:
        """Return the ids that ask for the mask of ``caption``, after the image prefix or an earlier turn.

        The one place where a text becomes an expression: it goes in as :func:`read_expression` says.

        Raises:
            PromptError: the caption holds a special token.
        """
        self._refuse_markers(caption)
        before, after = self.segment_parts
        text = choose(SEGMENT_QUESTIONS, question, seed).format(caption=read_expression(caption))
        start = "\n" if is_first else self.template.segment_separator + before
        return self.encode(f"{start}{text}{after}")

    def conversation(
        self, turns: Sequence[tuple[str, str]], num_tiles: int = 1, num_cells: Sequence[int] = (), stock: bool = False
    ) -> Turn:
        """Return a whole conversation over one image, image prefix included.

        Args:
            turns: (question, answer) pairs in plain text; answers may hold [SEG]. Each answer and its end carry loss.
            num_tiles: image tiles.
            num_cells: grid cells of the regions listed before the first question.
            stock: the template's stock form, with its separator between turns; else Sa2VA's segmentation form, with its
                own behind every turn.
        """
        template = self.template
        before, after = self.caption_parts if stock else self.segment_parts
        ids, labels = self.image_prefix(num_tiles), [-100] * len(self.image_prefix(num_tiles))
        listing = f"{list_regions(num_cells)}\n" if num_cells else ""
        for number, (question, answer) in enumerate(turns):
            start = f"\n{listing}" if number == 0 else (template.turn_separator if stock else "") + before
            turn = self.answered(self.encode(start + question + after), answer)
            end = [] if stock else self.encode(template.segment_separator)
            ids += [*turn.input_ids, *end]
            labels += [*turn.labels, *[-100] * len(end)]
        return Turn(tuple(ids), tuple(labels))

    def answer_length(self, token_ids: Sequence[int], looked_at: int = 0, is_caption: bool = False) -> int | None:
        """Return how many generated ids there are up to and with what ended the answer; None where nothing did.

        A caption also ends with its first special token: from there on the text is no caption, whatever follows, so
        what follows teaches nothing. In another answer special tokens such as [SEG] stay.

        ``looked_at``: nothing ended it among so many first ids.
        """
        ends = {self.tokenizer.eos_token_id, *(self.marker_ids.values() if is_caption else ())}
        lengths = range(looked_at + 1, len(token_ids) + 1)
        return next((n for n in lengths if token_ids[n - 1] in ends or self.ends_turn(token_ids[:n])), None)

    def answered(self, question_ids: list[int], answer: str) -> Turn:
        """Return the turn of a question and its answer in plain text; the answer and its end carry loss."""
        answer_ids = self.encode(answer + self.template.answer_end)
        labels = [-100] * len(question_ids) + answer_ids
        return Turn(tuple(question_ids + answer_ids), tuple(labels))

    def _refuse_markers(self, caption: str) -> None:
        marker = self.find_marker(caption)
        if marker is not None:
            fix = "reject the caption (the captioner does) or clean the data set's text"
            raise PromptError(explain("a caption holds a special token", repr(caption), marker, "plain text", fix))

    def read_captions(self, rows: Iterable[Sequence[int]]) -> list[WrittenCaption]:
        """Return what generated ids say, up to what ended them; no gate was asked yet."""
        found = []
        for token_ids in rows:
            ids = list(token_ids[: self.answer_length(token_ids, is_caption=True)])
            text, ended = self.decode_caption(ids)
            text = clean_caption(text)
            found.append(WrittenCaption(text, tuple(ids), None, not ended, self.unreadable(text)))
        return found

    def unreadable(self, text: str) -> str | None:
        """Return why step 2 cannot read a caption: ``empty``, ``special_token``, or None where it can."""
        if not any(character.isalnum() for character in text):
            return "empty"
        return "special_token" if self.find_marker(text) else None

    def ends_turn(self, token_ids: Sequence[int]) -> bool:
        """Tell whether generated ids end with a stop text, however the tokenizer cuts it.

        Sa2VA's ``<|end|>`` is plain text to its tokenizer, so no single token id marks the end of an answer.
        """
        # A token holds at least one byte, so a text of n bytes spans at most n tokens.
        window = max(len(text.encode()) for text in self.template.stop_texts)
        tail = self._decode(token_ids[-window:])
        return any(text in tail for text in self.template.stop_texts)

    def decode_caption(self, token_ids: list[int]) -> tuple[str, bool]:
        """Return the text of generated ids and whether a stop text or end token closed it."""
        end_id = self.tokenizer.eos_token_id
        ended = end_id is not None and end_id in token_ids
        text = self._decode(token_ids[: token_ids.index(end_id)] if ended else token_ids)
        for stop in self.template.stop_texts:
            if stop in text:
                text, ended = text.split(stop)[0], True
        return text, ended


def clean_caption(text: str) -> str:
    """Collapse white space and drop quotes and a final full stop, which the question brings itself."""
    return " ".join(text.split()).strip(" \"'").rstrip(".").strip()


def read_expression(text: str) -> str:
    """Return a caption as a segmentation question reads it: in lower case, without a final full stop.

    Sa2VA's training does so with every referring expression, whoever wrote it. Answers that are captions stay as given.
    """
    return text.lower().removesuffix(".")


def prompt_texts() -> list[str]:
    """Return the texts that a caption must not repeat: every question, and how regions are listed."""
    questions = [text.replace("{caption}", "").strip() for text in SEGMENT_QUESTIONS.values()]
    return [*CAPTION_QUESTIONS.values(), *questions, "There are 1 part regions in the picture: region1"]

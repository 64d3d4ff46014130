"""Greedy or sampled continuation of left-padded prompts with images: what captions and answers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from dual_loop.model.packing import left_pad
from dual_loop.model.prompts import Prompter
from dual_loop.model.video_llava_sam import VideoLLaVASAMModel


class StopOnText(StoppingCriteria):
    """Stop a row where one of the texts appears at its end, however the tokenizer cuts it.

    Sa2VA's ``<|end|>`` is plain text to its tokenizer, so no single token id marks the end of an answer.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, tuple(texts)
        # A token holds at least one byte, so a text of n bytes spans at most n tokens.
        self.window = max(len(text.encode()) for text in texts)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        tails = self.tokenizer.batch_decode(input_ids[:, -self.window :], skip_special_tokens=False)
        done = [any(text in tail for text in self.texts) for tail in tails]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def generate_ids(
    model: VideoLLaVASAMModel,
    prompter: Prompter,
    prompts: Sequence[Sequence[int]],
    image_features: Tensor,
    region_tile: Tensor,
    prompt_masks: Tensor,
    max_new_tokens: int,
    processors: LogitsProcessorList | None = None,
) -> list[list[int]]:
    """Return the ids that follow each prompt, new ones only; rows that ended early are padded.

    Args:
        prompts: R lists of token ids with placeholders for images and regions.
        image_features: (T, M, D) projected features of all tiles, prompt by prompt.
        region_tile: (P,) int64, the tile that each region prompt refers to.
        prompt_masks: (P, G, G) bool, the region prompts in the order of their placeholders.
        max_new_tokens: longest continuation.
        processors: turn arg-max decoding into something else.
    """
    tokenizer, device = prompter.tokenizer, model.device
    input_ids, attention_mask = left_pad(list(prompts), tokenizer.pad_token_id or 0)
    embedded = model.embed_prompt(input_ids.to(device), image_features, region_tile.to(device), prompt_masks.to(device))
    output = model.generate(
        embedded,
        attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id or 0,
        eos_token_id=tokenizer.eos_token_id,
        stopping_criteria=StoppingCriteriaList([StopOnText(tokenizer, prompter.template.stop_texts)]),
        logits_processor=processors or LogitsProcessorList(),
    )
    return [[int(i) for i in row] for row in output.tolist()]

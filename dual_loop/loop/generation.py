"""Greedy or sampled continuation of left-padded prompts with images: what captions and answers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import TopPLogitsWarper

from dual_loop.iteration import in_chunks
from dual_loop.loop.decoding import PrefixCache, PromptRows, decode_rows, encode_prefixes
from dual_loop.model.packing import left_pad
from dual_loop.model.prompts import Prompter
from dual_loop.model.video_llava_sam import VideoLLaVASAMModel

IMAGES_AT_ONCE = 8
"""Most image prefixes that one forward pass reads."""
CPU_TOKENS = 1024
"""Tokens that keep a CPU's products busy; more at a time would hold memory for no speed."""


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


class RowSampler(LogitsProcessor):
    """Turns the arg-max of greedy decoding into sampling for the rows that ask for it, with random numbers of the row.

    Adding Gumbel noise to log-probabilities and taking the arg-max draws from the softmax (Gumbel-max trick). Each row
    has its own generator, so a sampled caption does not depend on how regions are spread over batches and ranks.

    Args:
        seeds: R seeds.
        temperatures: R temperatures; a row of 0 stays greedy.
        top_ps: R shares of probability to sample from (1.0: all of it).
    """

    def __init__(self, seeds: Sequence[int], temperatures: Sequence[float], top_ps: Sequence[float]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperatures, self.top_ps = list(temperatures), list(top_ps)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return perturbed scores (R, V) of all rows, as transformers' ``generate`` asks for them."""
        return torch.cat([self._perturb(row, scores[row : row + 1]) for row in range(len(scores))])

    def choose(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Return the next tokens (r,) of those R rows that ``rows`` (r,) names, given their logits (r, V)."""
        scores = [self._perturb(row, logits[k : k + 1]) for k, row in enumerate(rows.tolist())]
        return torch.cat(scores).argmax(-1)

    def _perturb(self, row: int, values: Tensor) -> Tensor:
        if self.temperatures[row] > 0:
            if self.top_ps[row] < 1.0:
                # This warper looks at the scores alone.
                values = TopPLogitsWarper(self.top_ps[row])(values.new_zeros(1, 0, dtype=torch.long), values)
            uniform = torch.rand(values.shape[-1], generator=self.generators[row]).to(values.device).clamp_min(1e-20)
            values = values.float() / self.temperatures[row] - torch.log(-torch.log(uniform))
        return values.float()


@dataclass
class Prompts:
    """R prompts, each an image and a question about it.

    Attributes:
        questions: R lists of token ids that follow the image.
        images: (R,) the number of each prompt's image.
        prefixes: I lists of token ids, the image prefixes.
        tiles: I lists of tile indices of each image.
        masks: R region prompts (G, G) bool, or None for a question without one.
    """

    questions: Sequence[Sequence[int]]
    images: Sequence[int]
    prefixes: Sequence[Sequence[int]]
    tiles: Sequence[Sequence[int]]
    masks: Sequence[Tensor | None]

    def __len__(self) -> int:
        return len(self.questions)

    def choose(self, rows: Sequence[int]) -> Prompts:
        """Return the prompts ``rows`` alone; images stay."""
        questions, images = [self.questions[row] for row in rows], [self.images[row] for row in rows]
        return Prompts(questions, images, self.prefixes, self.tiles, [self.masks[row] for row in rows])


def prefixes_at_once(length: int, device_type: str) -> int:
    """Return how many image prefixes of ``length`` tokens one forward pass reads on this kind of device."""
    most = CPU_TOKENS // max(1, length) if device_type == "cpu" else IMAGES_AT_ONCE
    return max(1, min(IMAGES_AT_ONCE, most))


class Generator:
    """Continues prompts about the same images as often as asked; an image's prefix is computed once.

    Use it while the weights stay as they are.

    Args:
        model: the unwrapped model, in eval mode.
        prompter: tokenizer and ends of turns.
        prompts: all of them.
        image_features: (T, M, D) projected features of all tiles.
        max_new_tokens: longest continuation.
    """

    def __init__(
        self,
        model: VideoLLaVASAMModel,
        prompter: Prompter,
        prompts: Prompts,
        image_features: Tensor,
        max_new_tokens: int,
    ) -> None:
        self.model, self.prompter, self.prompts = model, prompter, prompts
        self.image_features, self.max_new_tokens = image_features, max_new_tokens
        self.pad_id = prompter.tokenizer.pad_token_id or 0
        is_shared = model.speed.share_prefix and model.speed.own_decoder and not model.speed.static_cache
        self.prefix = self._encode_prefixes() if is_shared else None

    def write(self, rows: Sequence[int], sampler: RowSampler | None = None) -> list[list[int]]:
        """Return the new ids of prompts ``rows``; ``sampler`` draws for them, None takes the arg-max."""
        chosen, speed = self.prompts.choose(rows), self.model.speed
        stop = StopOnText(self.prompter.tokenizer, self.prompter.template.stop_texts)
        if speed.static_cache or not speed.own_decoder:
            return self._generate(chosen, stop, sampler)
        decoded = self._with_prefix(chosen) if self.prefix is not None else self._whole(chosen)
        return decode_rows(
            self.model,
            decoded,
            self.max_new_tokens,
            eos_token_id=self.prompter.tokenizer.eos_token_id,
            stop=stop,
            choose=sampler.choose if sampler is not None else None,
            drop_finished=speed.drop_finished,
        )

    def _encode_prefixes(self) -> PrefixCache:
        """Run all image prefixes, a few images at a time."""
        ids, valid = left_pad(self.prompts.prefixes, self.pad_id)
        parts = []
        for part in in_chunks(range(len(ids)), prefixes_at_once(ids.shape[1], self.model.device.type)):
            tiles = [tile for image in part for tile in self.prompts.tiles[image]]
            embeds = self._embed(ids[part], self.image_features[tiles], torch.zeros(0, dtype=torch.long), None)
            parts.append(encode_prefixes(self.model, embeds, valid[part].bool().to(embeds.device)))
        return PrefixCache.joined(parts)

    def _with_prefix(self, chosen: Prompts) -> PromptRows:
        ids, valid = left_pad(chosen.questions, self.pad_id)
        device, asked = self.model.device, [row for row, mask in enumerate(chosen.masks) if mask is not None]
        # A region refers to the last tile of its image: the thumbnail, or the only tile.
        last = torch.tensor([chosen.tiles[chosen.images[row]][-1] for row in asked], dtype=torch.long, device=device)
        masks = _stack([chosen.masks[row] for row in asked], self.image_features.shape[1]).to(device)
        embeds = self.model.embed_regions(ids.to(device), self.image_features, last, masks)
        index = torch.tensor(list(chosen.images), device=device)
        return PromptRows(embeds, valid.bool().to(device), self.prefix, index)

    def _whole(self, chosen: Prompts) -> PromptRows:
        prompts = [[*chosen.prefixes[i], *ids] for i, ids in zip(chosen.images, chosen.questions, strict=True)]
        ids, valid = left_pad(prompts, self.pad_id)
        tiles = [chosen.tiles[image] for image in chosen.images]
        last = torch.tensor([len(group) for group in tiles]).cumsum(0) - 1
        asked = [row for row, mask in enumerate(chosen.masks) if mask is not None]
        masks = _stack([chosen.masks[row] for row in asked], self.image_features.shape[1])
        features = self.image_features[[tile for group in tiles for tile in group]]
        embeds = self._embed(ids, features, last[asked], masks)
        return PromptRows(embeds, valid.bool().to(embeds.device))

    def _embed(self, ids: Tensor, features: Tensor, region_tile: Tensor, masks: Tensor | None) -> Tensor:
        device = self.model.device
        masks = masks if masks is not None else _stack([], features.shape[1])
        return self.model.embed_prompt(ids.to(device), features, region_tile.to(device), masks.to(device))

    def _generate(self, chosen: Prompts, stop: StopOnText, sampler: RowSampler | None) -> list[list[int]]:
        """Continue with transformers' ``generate``; with its static cache, compiled, where that is asked for."""
        rows, tokenizer, speed = self._whole(chosen), self.prompter.tokenizer, self.model.speed
        cache: dict[str, Any] = {}
        if speed.static_cache:
            cache = {"cache_implementation": "static", "disable_compile": not speed.compile_decode}
        if not speed.last_hidden_only:
            cache.update(output_hidden_states=True, output_logits=True, return_dict_in_generate=True)
        output = self.model.generate(
            rows.embeds,
            rows.valid.long(),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.pad_id,
            eos_token_id=tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList([stop]),
            logits_processor=LogitsProcessorList([sampler] if sampler is not None else []),
            **cache,
        )
        return [[int(i) for i in row] for row in output.tolist()]


def generate_ids(
    model: VideoLLaVASAMModel, prompter: Prompter, prompts: Prompts, image_features: Tensor, max_new_tokens: int
) -> list[list[int]]:
    """Return the ids that follow each prompt, new ones only, by arg-max, all rows at once."""
    generator = Generator(model, prompter, prompts, image_features, max_new_tokens)
    return generator.write(range(len(prompts)))


def _stack(masks: Sequence[Tensor | None], num_cells: int) -> Tensor:
    side = int(num_cells**0.5)
    given = [mask for mask in masks if mask is not None]
    return torch.stack(given).bool() if given else torch.zeros(0, side, side, dtype=torch.bool)

"""Step 1: image + mask -> caption. No graph; captions of a whole accumulation window are generated together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import TopPLogitsWarper

from dual_loop.config import LoopConfig
from dual_loop.errors import DualLoopError, explain
from dual_loop.model.packing import left_pad
from dual_loop.model.prompts import Prompter
from dual_loop.model.video_llava_sam import VideoLLaVASAMModel, evaluating
from dual_loop.types import Batch, CaptionRollout

logger = logging.getLogger("dual_loop")

EMPTY, SPECIAL_TOKEN = "empty", "special_token"
WARN_FIRST, WARN_EVERY = 5, 100


@dataclass
class _Request:
    """One caption to be generated: where it belongs and what the prompt needs."""

    batch: int
    region: int
    prompt: list[int]
    tiles: list[int]
    mask: Tensor
    seed: int


class CaptionRejected(DualLoopError):
    """A generated caption was refused and the policy ``on_rejected`` is ``error``."""


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


class SeededGumbelNoise(LogitsProcessor):
    """Turns the arg-max of greedy decoding into sampling, with random numbers that belong to the row.

    Adding Gumbel noise to log-probabilities and taking the arg-max draws from the softmax (Gumbel-max trick). Each row
    has its own generator, so a sampled caption does not depend on how regions are spread over batches and ranks.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = [torch.rand(scores.shape[-1], generator=generator) for generator in self.generators]
        uniform = torch.stack(noise).to(scores.device).clamp_min(1e-20)
        return scores.float() / self.temperature - torch.log(-torch.log(uniform))


class Captioner:
    """Writes a caption for every region that has no text of its own.

    Args:
        model: the unwrapped model.
        prompter: builds the region prompts.
        config: decoding, rejection policy and batch size of the roll-out.
    """

    def __init__(self, model: VideoLLaVASAMModel, prompter: Prompter, config: LoopConfig) -> None:
        self.model, self.prompter, self.config = model, prompter, config
        self.num_generated = 0
        self.num_rejected = 0

    @torch.no_grad()
    def roll_out(
        self, batches: Sequence[Batch], vision_features: Sequence[Tensor], *, use_references: bool = True
    ) -> list[CaptionRollout]:
        """Caption all regions of all batches in as few generations as ``rollout_batch_size`` allows.

        Args:
            batches: the micro-batches of one accumulation window.
            vision_features: for each batch (T, M, D_vision), from ``model.encode_vision``.
            use_references: take the data set's own caption where there is one, without generating.

        Raises:
            CaptionRejected: under ``on_rejected = error``, or when more than ``max_rejected_fraction`` were rejected.
        """
        rollouts = [_empty_rollout(batch, use_references) for batch in batches]
        requests = [
            request
            for index, batch in enumerate(batches)
            for request in self._requests(index, batch, rollouts[index].from_reference)
        ]
        # Rows of like length share a generation, so little is spent on padding.
        requests.sort(key=lambda request: len(request.prompt))
        with evaluating(self.model):
            projected = [self.model.project_vision(features) for features in vision_features]
            for start in range(0, len(requests), self.config.rollout_batch_size):
                chunk = requests[start : start + self.config.rollout_batch_size]
                for request, ids in zip(chunk, self._generate(chunk, projected), strict=True):
                    self._store(rollouts[request.batch], request.region, ids, batches[request.batch])
        return rollouts

    def _requests(self, index: int, batch: Batch, from_reference: Sequence[bool]) -> list[_Request]:
        offsets = tile_offsets(batch.tiles_per_view)
        requests = []
        for region, image in enumerate(batch.region_image.tolist()):
            if from_reference[region]:
                continue
            view, mask = batch.caption_view[image], batch.prompt_masks[region]
            tiles = list(range(offsets[view], offsets[view] + batch.tiles_per_view[view]))
            seed = int(batch.region_seeds[region])
            question = self.prompter.caption_question(int(mask.sum()), self.config.caption_question, seed)
            prompt = self.prompter.image_prefix(len(tiles)) + question
            requests.append(_Request(index, region, prompt, tiles, mask, seed))
        return requests

    def _generate(self, chunk: Sequence[_Request], projected: Sequence[Tensor]) -> list[list[int]]:
        device, tokenizer = self.model.device, self.prompter.tokenizer
        input_ids, attention_mask = left_pad([request.prompt for request in chunk], tokenizer.pad_token_id or 0)
        features = torch.cat([projected[request.batch][request.tiles] for request in chunk])
        # A region refers to the last tile of its row: the thumbnail, or the only tile.
        last_tile = torch.tensor([len(request.tiles) for request in chunk]).cumsum(0) - 1
        masks = torch.stack([request.mask for request in chunk]).to(device)
        embedded = self.model.embed_prompt(input_ids.to(device), features, last_tile.to(device), masks)
        output = self.model.generate(
            embedded,
            attention_mask.to(device),
            max_new_tokens=self.config.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
            eos_token_id=tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList([StopOnText(tokenizer, self.prompter.template.stop_texts)]),
            logits_processor=self._sampler(chunk),
        )
        return [[int(i) for i in row] for row in output.tolist()]

    def _sampler(self, chunk: Sequence[_Request]) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if self.config.temperature > 0:
            if self.config.top_p < 1.0:
                processors.append(TopPLogitsWarper(self.config.top_p))
            processors.append(SeededGumbelNoise([request.seed for request in chunk], self.config.temperature))
        return processors

    def _store(self, rollout: CaptionRollout, region: int, ids: list[int], batch: Batch) -> None:
        text, _ = self.prompter.decode_caption(ids)
        caption = clean_caption(text)
        reason = self._reject_reason(caption)
        self.num_generated += 1
        rollout.token_ids[region] = ids
        rollout.captions[region] = caption
        if reason is not None:
            self._reject(rollout, region, reason, batch.region_names[region])

    def _reject_reason(self, caption: str) -> str | None:
        if not any(character.isalnum() for character in caption):
            return EMPTY
        return SPECIAL_TOKEN if self.prompter.find_marker(caption) else None

    def _reject(self, rollout: CaptionRollout, region: int, reason: str, name: str) -> None:
        config = self.config
        self.num_rejected += 1
        rollout.rejected[region] = reason
        if self.num_rejected <= WARN_FIRST or self.num_rejected % WARN_EVERY == 0:
            logger.warning(
                "Warning: Caption generation failed (%s) for %s; policy %s; %d of %d captions so far",
                *(reason, name, config.on_rejected, self.num_rejected, self.num_generated),
            )
        too_many = self.num_rejected > config.max_rejected_fraction * self.num_generated
        if config.on_rejected == "error" or (too_many and self.num_generated >= config.max_rejected_grace):
            raise CaptionRejected(
                explain(
                    "caption generation fails too often" if too_many else "caption generation failed",
                    where=name,
                    seen=f"{reason}; {self.num_rejected} of {self.num_generated} captions rejected",
                    expected=f"at most {config.max_rejected_fraction:.0%} rejected (loop.max_rejected_fraction)",
                    fix="check that pretrained weights were loaded (a model without them writes nothing of use), "
                    "raise loop.max_new_tokens, or set loop.on_rejected",
                )
            )
        rollout.captions[region] = config.fallback_caption
        rollout.keep[region] = config.on_rejected != "drop"


def generate_caption_from_mask(
    model: VideoLLaVASAMModel, prompter: Prompter, batch: Batch, config: LoopConfig | None = None
) -> CaptionRollout:
    """Caption every region of one batch, also those that have a caption of their own: step 1 on its own."""
    captioner = Captioner(model, prompter, config or LoopConfig())
    with torch.no_grad():
        features = model.encode_vision(batch.pixel_values)
    return captioner.roll_out([batch], [features], use_references=False)[0]


def clean_caption(text: str) -> str:
    """Collapse white space and drop quotes and a final full stop, which the question brings itself."""
    return " ".join(text.split()).strip(" \"'").rstrip(".").strip()


def _empty_rollout(batch: Batch, use_references: bool) -> CaptionRollout:
    references = [caption if use_references else None for caption in batch.captions]
    return CaptionRollout(
        captions=[caption or "" for caption in references],
        token_ids=[[] for _ in references],
        rejected=[None for _ in references],
        from_reference=[caption is not None for caption in references],
        keep=[True for _ in references],
    )


def tile_offsets(tiles_per_view: Sequence[int]) -> list[int]:
    """Return the index of each view's first tile among the tiles of the batch."""
    offsets, total = [], 0
    for count in tiles_per_view:
        offsets.append(total)
        total += count
    return offsets

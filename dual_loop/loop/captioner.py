"""Step 1: image + mask -> caption. No graph; captions of a whole accumulation window are generated together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dual_loop.config import GATES, LoopConfig
from dual_loop.errors import DualLoopError, explain
from dual_loop.iteration import in_chunks
from dual_loop.loop.gates import CaptionGates
from dual_loop.loop.generation import Generator, Prompts, RowSampler
from dual_loop.model.adapters import merged_adapters
from dual_loop.model.prompts import CAPTION_QUESTIONS, SEGMENT_QUESTIONS, Prompter
from dual_loop.model.video_llava_sam import VideoLLaVASAMModel, evaluating
from dual_loop.types import Batch, CaptionRollout, WrittenCaption

logger = logging.getLogger("dual_loop")

EMPTY, SPECIAL_TOKEN = "empty", "special_token"
WARN_FIRST, WARN_EVERY = 5, 100


GREEDY = -1


@dataclass
class _Image:
    """The captioned view of an image: its batch, and its tiles there."""

    batch: int
    tiles: list[int]


@dataclass
class _Request:
    """One caption to be generated: where it belongs, what the prompt needs, and how its tokens are chosen."""

    batch: int
    region: int
    draw: int
    image: int
    question: list[int]
    mask: Tensor
    seed: int
    temperature: float
    top_p: float = 1.0


class CaptionRejected(DualLoopError):
    """A generated caption was refused and the policy ``on_rejected`` is ``error``."""


class Captioner:
    """Writes a caption for every region that has no text of its own, and samples for those who learn from them.

    Args:
        model: the unwrapped model.
        prompter: builds the region prompts.
        config: decoding, rejection policy and batch size of the roll-out.
        gates: says which captions may earn no reward.
        sample_temperature: of the K samples (``policy.temperature``).
        is_silent: do not warn of rejected captions (for measurements beside training).
    """

    def __init__(
        self,
        model: VideoLLaVASAMModel,
        prompter: Prompter,
        config: LoopConfig,
        gates: CaptionGates | None = None,
        sample_temperature: float = 1.0,
        is_silent: bool = False,
    ) -> None:
        self.model, self.prompter, self.config = model, prompter, config
        self.gates = gates or CaptionGates(GATES, prompter.find_marker, prompt_texts())
        self.sample_temperature, self.is_silent = sample_temperature, is_silent
        self.num_generated = 0
        self.num_rejected = 0

    @torch.no_grad()
    def roll_out(
        self,
        batches: Sequence[Batch],
        vision_features: Sequence[Tensor | None],
        *,
        use_references: bool = True,
        greedy: bool = True,
        num_samples: int = 0,
        seed_offset: int = 0,
    ) -> list[CaptionRollout]:
        """Caption all regions of all batches in as few generations as ``rollout_batch_size`` allows.

        Step 2 reads the data set's own caption where there is one, else the greedy caption (drawn at
        ``loop.temperature``, if that is not 0), else the first sample.

        Args:
            batches: the micro-batches of one accumulation window.
            vision_features: for each batch (T, M, D_vision), from ``model.encode_vision``; None runs the vision tower
                again for every generation.
            use_references: take the data set's own caption where there is one.
            greedy: write a greedy caption; where samples are asked for, also for regions with a caption of their own.
            num_samples: K, captions sampled for each region.
            seed_offset: added to the seeds of the samples, so that two roll-outs of a region differ.

        Raises:
            CaptionRejected: under ``on_rejected = error``, or when more than ``max_rejected_fraction`` were rejected.
        """
        rollouts = [_empty_rollout(batch, use_references) for batch in batches]
        requests: list[_Request] = []
        images: list[_Image] = []
        for index, batch in enumerate(batches):
            skipped = [own and not num_samples for own in rollouts[index].from_reference]
            draws = [*([GREEDY] if greedy else []), *range(num_samples)]
            requests += self._requests(index, batch, images, skipped, draws, seed_offset)
        if self.model.speed.sort_by_length:
            # Rows of like length share a generation, so little is spent on padding.
            requests.sort(key=lambda request: len(request.question))
        written: dict[tuple[int, int], dict[int, WrittenCaption]] = {}
        merging = merged_adapters(self.model) if self.model.speed.merge_adapters else nullcontext()
        with evaluating(self.model), merging:
            for request, ids in self._generate(batches, images, requests, vision_features):
                own = written.setdefault((request.batch, request.region), {})
                own[request.draw] = self._written(ids)
        for index, (rollout, batch) in enumerate(zip(rollouts, batches, strict=True)):
            for region in range(batch.num_regions):
                self._store(rollout, region, written.get((index, region), {}), batch.region_names[region])
        return rollouts

    def _requests(
        self,
        index: int,
        batch: Batch,
        images: list[_Image],
        skipped: Sequence[bool],
        draws: Sequence[int],
        seed_offset: int,
    ) -> list[_Request]:
        """Return one request a draw of a region, and add the images that they ask about to ``images``."""
        offsets = batch.tile_offsets
        requests: list[_Request] = []
        number_of_view: dict[int, int] = {}
        for region, image in enumerate(batch.region_image.tolist()):
            if skipped[region]:
                continue
            view, mask = batch.caption_view[image], batch.prompt_masks[region]
            if view not in number_of_view:
                number_of_view[view] = len(images)
                tiles = range(offsets[view], offsets[view] + batch.tiles_per_view[view])
                images.append(_Image(index, list(tiles)))
            seed = int(batch.region_seeds[region])
            question = self.prompter.caption_question(int(mask.sum()), self.config.caption_question, seed)
            for draw in draws:
                choice = (seed, self.config.temperature, self.config.top_p)
                if draw != GREEDY:
                    choice = (sample_seed(seed, draw + seed_offset), self.sample_temperature, 1.0)
                requests.append(_Request(index, region, draw, number_of_view[view], question, mask, *choice))
        return requests

    def _generate(
        self,
        batches: Sequence[Batch],
        images: Sequence[_Image],
        requests: Sequence[_Request],
        vision_features: Sequence[Tensor | None],
    ) -> Iterator[tuple[_Request, list[int]]]:
        """Yield the new ids of every request, in generations of ``rollout_batch_size`` rows (one, if plain)."""
        is_batched = self.model.speed.batch_rollout
        size = self.config.rollout_batch_size if is_batched else 1
        # Whoever shares nothing makes a generator, with the features of its images, for every chunk.
        is_shared = is_batched and all(features is not None for features in vision_features)
        parts = [list(requests)] if is_shared and requests else list(in_chunks(requests, size))
        for part in parts:
            generator = self._generator(batches, images, part, vision_features)
            for rows in in_chunks(range(len(part)), size):
                chunk = [part[row] for row in rows]
                yield from zip(chunk, generator.write(rows, _sampler(chunk)), strict=True)

    def _generator(
        self,
        batches: Sequence[Batch],
        images: Sequence[_Image],
        requests: Sequence[_Request],
        vision_features: Sequence[Tensor | None],
    ) -> Generator:
        """Return the generator of ``requests``, for the images that they ask about."""
        numbers = sorted({request.image for request in requests})
        place = {number: k for k, number in enumerate(numbers)}
        features, tiles, start = [], [], 0
        for number in numbers:
            image = images[number]
            own = vision_features[image.batch]
            if own is None:
                seen = self.model.encode_vision(batches[image.batch].pixel_values[image.tiles])
            else:
                seen = own[image.tiles]
            features.append(self.model.project_vision(seen))
            tiles.append(list(range(start, start + len(image.tiles))))
            start += len(image.tiles)
        prompts = Prompts(
            questions=[request.question for request in requests],
            images=[place[request.image] for request in requests],
            prefixes=[self.prompter.image_prefix(len(group)) for group in tiles],
            tiles=tiles,
            masks=[request.mask for request in requests],
        )
        return Generator(self.model, self.prompter, prompts, torch.cat(features), self.config.max_new_tokens)

    def _written(self, ids: list[int]) -> WrittenCaption:
        ids = self.prompter.cut_answer(ids)
        text, ended = self.prompter.decode_caption(ids)
        truncated = not ended
        caption = clean_caption(text)
        # What step 2 cannot read earns nothing, whichever gates are on.
        gate = self.gates.check(caption, truncated) or self._reject_reason(caption)
        return WrittenCaption(caption, tuple(ids), gate, truncated)

    def _store(self, rollout: CaptionRollout, region: int, own: dict[int, WrittenCaption], name: str) -> None:
        rollout.greedy[region] = own.get(GREEDY)
        rollout.samples[region] = [own[draw] for draw in sorted(own) if draw != GREEDY]
        if rollout.from_reference[region]:
            return
        read = own.get(GREEDY) or rollout.samples[region][0]
        self.num_generated += 1
        rollout.token_ids[region] = list(read.token_ids)
        rollout.captions[region] = read.text
        reason = self._reject_reason(read.text)
        if reason is not None:
            self._reject(rollout, region, reason, name)

    def _reject_reason(self, caption: str) -> str | None:
        if not any(character.isalnum() for character in caption):
            return EMPTY
        return SPECIAL_TOKEN if self.prompter.find_marker(caption) else None

    def _reject(self, rollout: CaptionRollout, region: int, reason: str, name: str) -> None:
        config = self.config
        self.num_rejected += 1
        rollout.rejected[region] = reason
        if not self.is_silent and (self.num_rejected <= WARN_FIRST or self.num_rejected % WARN_EVERY == 0):
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


def sample_seed(seed: int, draw: int) -> int:
    """Return the seed of a region's sample number ``draw``; far from the seeds of its neighbours."""
    return (seed * 6364136223846793005 + (draw + 1) * 1442695040888963407) % 2**63


def prompt_texts() -> list[str]:
    """Return the texts that a caption must not repeat: every question, and how regions are listed."""
    questions = [text.replace("{caption}", "").strip() for text in SEGMENT_QUESTIONS.values()]
    return [*CAPTION_QUESTIONS.values(), *questions, "There are 1 part regions in the picture: region1"]


def _sampler(chunk: Sequence[_Request]) -> RowSampler | None:
    if not any(request.temperature > 0 for request in chunk):
        return None
    return RowSampler([r.seed for r in chunk], [r.temperature for r in chunk], [r.top_p for r in chunk])


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
        greedy=[None for _ in references],
        samples=[[] for _ in references],
    )

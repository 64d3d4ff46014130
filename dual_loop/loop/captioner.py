"""Step 1: image + mask -> caption. No graph; captions of a whole accumulation window are generated together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dual_loop.config import GATES, LoopConfig
from dual_loop.errors import DualLoopError, explain
from dual_loop.loop.gates import CaptionGates
from dual_loop.model.adapters import merged_adapters
from dual_loop.model.decode import Decoder, Prompts, Sampling
from dual_loop.model.prompts import Prompter, prompt_texts
from dual_loop.model.sa2va import Sa2VA, evaluating
from dual_loop.types import Batch, RegionCaption, Seen, WrittenCaption

logger = logging.getLogger("dual_loop")

WARN_FIRST, WARN_EVERY = 5, 100
GREEDY = -1


@dataclass
class _Request:
    """One caption to be generated: where it belongs, what the prompt needs, and how its tokens are chosen."""

    batch: int
    region: int
    draw: int
    image: int
    question: list[int]
    mask: Tensor
    sampling: Sampling


class CaptionRejected(DualLoopError):
    """A generated caption was refused and the policy ``on_rejected`` is ``error``."""


class Captioner:
    """Writes a caption for every region that has no text of its own, and samples for those who learn from them.

    Args:
        model: the model.
        prompter: builds the region prompts.
        config: decoding, rejection policy and batch size of the roll-out.
        gates: says which captions may earn no reward.
        sample_temperature: of the K samples (``policy.temperature``).
        is_silent: do not warn of rejected captions (for measurements beside training).
    """

    def __init__(
        self,
        model: Sa2VA,
        prompter: Prompter,
        config: LoopConfig,
        gates: CaptionGates | None = None,
        sample_temperature: float = 1.0,
        is_silent: bool = False,
    ) -> None:
        self.model, self.prompter, self.config = model, prompter, config
        self.gates = gates or CaptionGates(GATES, prompt_texts())
        self.sample_temperature, self.is_silent = sample_temperature, is_silent
        self.num_generated = 0
        self.num_rejected = 0

    @torch.no_grad()
    def write(
        self,
        seen: Sequence[Seen],
        batches: Sequence[Batch],
        *,
        use_references: bool = True,
        greedy: bool = True,
        num_samples: int = 0,
    ) -> list[list[RegionCaption]]:
        """Caption all regions of all batches in as few generations as ``rollout_batch_size`` allows.

        Step 2 reads the data set's own caption where there is one, else the greedy caption (drawn at
        ``loop.temperature``, if that is not 0), else the first sample.

        Args:
            seen: what the image encoders made of each batch.
            batches: the micro-batches of one accumulation window.
            use_references: take the data set's own caption where there is one.
            greedy: write a greedy caption; where samples are asked for, also for regions with a caption of their own.
            num_samples: K, captions sampled for each region.

        Returns:
            For each batch one caption a region.

        Raises:
            CaptionRejected: under ``on_rejected = error``, or when more than ``max_rejected_fraction`` were rejected.
        """
        requests, prompts, features = self._requests(seen, batches, use_references, greedy, num_samples)
        written: dict[tuple[int, int], dict[int, WrittenCaption]] = {}
        if requests:
            with evaluating(self.model), merged_adapters(self.model):
                projected = torch.cat([self.model.project_vision(feature) for feature in features])
                decoder = Decoder(self.model, self.prompter, prompts, projected, self.config.max_new_tokens)
                for request, ids in zip(requests, self._decode(decoder, requests), strict=True):
                    own = written.setdefault((request.batch, request.region), {})
                    own[request.draw] = self._written(ids)
        captions = []
        for index, batch in enumerate(batches):
            references = batch.captions if use_references else [None] * len(batch.captions)
            parts = enumerate(zip(references, batch.region_names, strict=True))
            captions.append([self._caption(written.get((index, n), {}), text, name) for n, (text, name) in parts])
        return captions

    def _requests(
        self, seen: Sequence[Seen], batches: Sequence[Batch], use_references: bool, greedy: bool, num_samples: int
    ) -> tuple[list[_Request], Prompts, list[Tensor]]:
        """Return one request a draw of a region, their prompts, and the features of the images that they ask about."""
        requests: list[_Request] = []
        features: list[Tensor] = []
        tiles: list[range] = []
        draws = [*([GREEDY] if greedy else []), *range(num_samples)]
        for index, batch in enumerate(batches):
            offsets, image_of_view = batch.tile_offsets, dict[int, int]()
            cells, seeds = batch.prompt_masks.flatten(1).sum(1).tolist(), batch.region_seeds.tolist()
            for region, owner in enumerate(batch.region_image.tolist()):
                if use_references and batch.captions[region] is not None and not num_samples:
                    continue
                view = batch.caption_view[owner]
                if view not in image_of_view:
                    image_of_view[view] = len(features)
                    first, count = offsets[view], batch.tiles_per_view[view]
                    features.append(seen[index].vision[first : first + count])
                    start = tiles[-1].stop if tiles else 0
                    tiles.append(range(start, start + count))
                seed, image = seeds[region], image_of_view[view]
                question = self.prompter.caption_question(cells[region], self.config.caption_question, seed)
                for draw in draws:
                    sampling = Sampling(self.config.temperature, seed, self.config.top_p)
                    if draw != GREEDY:
                        sampling = Sampling(self.sample_temperature, sample_seed(seed, draw))
                    mask = batch.prompt_masks[region]
                    requests.append(_Request(index, region, draw, image, question, mask, sampling))
        # Rows of like length share a generation, so little is spent on padding.
        requests.sort(key=lambda request: len(request.question))
        prefixes = [self.prompter.image_prefix(len(group)) for group in tiles]
        prompts = Prompts(
            questions=[request.question for request in requests],
            images=[request.image for request in requests],
            prefixes=prefixes,
            tiles=tiles,
            masks=[request.mask for request in requests],
        )
        return requests, prompts, features

    def _decode(self, decoder: Decoder, requests: Sequence[_Request]) -> list[list[int]]:
        """Return the new ids of every request, ``rollout_batch_size`` rows at a time."""
        ids: list[list[int]] = []
        for start in range(0, len(requests), self.config.rollout_batch_size):
            rows = range(start, min(start + self.config.rollout_batch_size, len(requests)))
            sampling = [requests[row].sampling for row in rows]
            ids += decoder.write(rows, sampling if any(one.temperature > 0 for one in sampling) else ())
        return ids

    def _written(self, token_ids: list[int]) -> WrittenCaption:
        ids, text, ended = self.prompter.read_caption(token_ids)
        unreadable = self.prompter.unreadable(text)
        gate = self.gates.check(text, not ended, unreadable)
        return WrittenCaption(text, tuple(ids), gate, not ended, unreadable)

    def _caption(self, own: dict[int, WrittenCaption], reference: str | None, name: str) -> RegionCaption:
        greedy = own.get(GREEDY)
        samples = tuple(own[draw] for draw in sorted(own) if draw != GREEDY)
        if reference is not None:
            return RegionCaption(reference, True, greedy=greedy, samples=samples)
        read = greedy or samples[0]
        self.num_generated += 1
        if read.unreadable is None:
            return RegionCaption(read.text, token_ids=read.token_ids, greedy=greedy, samples=samples)
        self._count_rejected(read.unreadable, name)
        is_kept, text = self.config.on_rejected != "drop", self.config.fallback_caption
        return RegionCaption(text, False, read.token_ids, read.unreadable, is_kept, greedy, samples)

    def _count_rejected(self, reason: str, name: str) -> None:
        config = self.config
        self.num_rejected += 1
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


def generate_caption_from_mask(
    model: Sa2VA, prompter: Prompter, batch: Batch, config: LoopConfig | None = None
) -> list[RegionCaption]:
    """Caption every region of one batch, also those that have a caption of their own: step 1 on its own."""
    captioner = Captioner(model, prompter, config or LoopConfig())
    return captioner.write([model.see(batch)], [batch], use_references=False)[0]


def sample_seed(seed: int, draw: int) -> int:
    """Return the seed of a region's sample number ``draw``; far from the seeds of its neighbours."""
    return (seed * 6364136223846793005 + (draw + 1) * 1442695040888963407) % 2**63

"""Step 1: image + mask -> caption. No graph; captions of a whole accumulation window are generated together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dual_loop.config import LoopConfig
from dual_loop.errors import DualLoopError, explain
from dual_loop.loop.gates import CaptionGates
from dual_loop.model.decode import Decoder, Prompt, merged_adapters
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA, evaluating
from dual_loop.types import Batch, RegionCaption, Seen, WrittenCaption

logger = logging.getLogger("dual_loop")

WARN_FIRST, WARN_EVERY = 5, 100
GREEDY = -1


@dataclass(frozen=True)
class Request(Prompt):
    """A caption to be generated: draw number ``draw`` of a region of micro-batch ``batch``."""

    batch: int = 0
    region: int = 0
    draw: int = GREEDY


class CaptionRejected(DualLoopError):
    """A generated caption was refused and the policy ``on_rejected`` is ``error``."""


def measuring_settings(config: LoopConfig) -> LoopConfig:
    """Return the settings of all that measures or answers: greedy, and a rejected caption is no reason to stop."""
    return replace(config, temperature=0.0, on_rejected="fallback", max_rejected_fraction=1.0, segment_form="branches")


class Captioner:
    """Writes a caption for every region that has no text of its own, and samples for those who learn from them.

    Args:
        gates: say which captions are none; step 2 does not read them. None: all that can be read are.
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
        self.gates = gates or CaptionGates((), ())
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
        """Caption all regions of all batches in as few generations as memory and ``rollout_batch_size`` allow.

        Step 2 reads the data set's own caption where there is one, else the greedy caption (drawn at
        ``loop.temperature``, if that is not 0), else the first sample.

        Args:
            seen, batches: the micro-batches of one accumulation window, and what the image encoders made of them.
            use_references: take the data set's own caption where there is one.
            greedy: write a greedy caption; where samples are asked for, also for regions with a caption of their own.
            num_samples: K, captions sampled for each region.

        Raises:
            CaptionRejected: under ``on_rejected = error``, or when more than ``max_rejected_fraction`` were rejected.
        """
        requests: list[Request] = []
        images: list[Tensor] = []
        for index, batch in enumerate(batches):
            keeps = use_references and not num_samples
            asked = [n for n, text in enumerate(batch.captions) if text is None or not keeps]
            owners, of_view = batch.region_image.tolist(), seen[index].vision.split(batch.tiles_per_view)
            cells, seeds = batch.prompt_masks.flatten(1).sum(1).tolist(), batch.region_seeds.tolist()
            image_of_view: dict[int, int] = {}
            for region in asked:
                view = batch.caption_view[owners[region]]
                if view not in image_of_view:
                    image_of_view[view] = len(images)
                    images.append(of_view[view])
                seed = seeds[region]
                question = self.prompter.caption_question(cells[region], self.config.caption_question, seed)
                place = (question, image_of_view[view], batch.prompt_masks[region])
                if greedy:
                    settings = (self.config.temperature, seed, self.config.top_p)
                    requests.append(Request(*place, *settings, index, region))
                for draw in range(num_samples):
                    settings = (self.sample_temperature, sample_seed(seed, draw), 1.0)
                    requests.append(Request(*place, *settings, index, region, draw))
        written: dict[tuple[int, int], dict[int, WrittenCaption]] = {}
        if requests:
            with evaluating(self.model), merged_adapters(self.model):
                projected = [self.model.project_vision(tiles) for tiles in images]
                decoder = Decoder(self.model, self.prompter, requests, projected, self.config.max_new_tokens)
                ids = decoder.write_all(self.config.rollout_batch_size)
            for request, one in zip(requests, self.prompter.read_captions(ids), strict=True):
                gate = self.gates.check(one.text, one.truncated, one.unreadable)
                written.setdefault((request.batch, request.region), {})[request.draw] = replace(one, gate=gate)
        return [
            [
                self._caption(written.get((index, region), {}), reference if use_references else None, fallback, name)
                for region, (reference, fallback, name) in enumerate(
                    zip(batch.captions, batch.fallbacks, batch.region_names, strict=True)
                )
            ]
            for index, batch in enumerate(batches)
        ]

    def _caption(
        self, own: dict[int, WrittenCaption], reference: str | None, fallback: str | None, name: str
    ) -> RegionCaption:
        greedy, config = own.pop(GREEDY, None), self.config
        samples = tuple(own.values())
        if reference is not None:
            return RegionCaption(reference, True, greedy=greedy, samples=samples)
        read = greedy or samples[0]
        self.num_generated += 1
        # Length alone makes no caption worse to read; what was cut off earns nothing (``reward.gates``).
        reason = read.unreadable or (None if read.gate == "truncated" else read.gate)
        if reason is None:
            return RegionCaption(read.text, token_ids=read.token_ids, greedy=greedy, samples=samples)
        self.num_rejected += 1
        counts = (self.num_rejected, self.num_generated)
        if not self.is_silent and (self.num_rejected <= WARN_FIRST or self.num_rejected % WARN_EVERY == 0):
            text = "Warning: Caption generation failed (%s) for %s; policy %s; %d of %d captions so far"
            logger.warning(text, reason, name, config.on_rejected, *counts)
        too_many = self.num_rejected > config.max_rejected_fraction * self.num_generated
        if config.on_rejected == "error" or (too_many and self.num_generated >= config.max_rejected_grace):
            raise CaptionRejected(
                explain(
                    "caption generation fails too often" if too_many else "caption generation failed",
                    where=name,
                    seen=f"{reason}; {counts[0]} of {counts[1]} captions rejected",
                    expected=f"at most {config.max_rejected_fraction:.0%} rejected (loop.max_rejected_fraction)",
                    fix="check that pretrained weights were loaded (a model without them writes nothing of use), "
                    "raise loop.max_new_tokens, name the gates that may close in reward.gates, or set loop.on_rejected",
                )
            )
        is_kept = config.on_rejected != "drop"
        text = fallback or config.fallback_caption
        return RegionCaption(text, False, read.token_ids, reason, is_kept, greedy, samples)


def generate_caption_from_mask(
    model: Sa2VA, prompter: Prompter, batch: Batch, config: LoopConfig | None = None
) -> list[RegionCaption]:
    """Caption every region of one batch, also those that have a caption of their own: step 1 on its own."""
    captioner = Captioner(model, prompter, config or LoopConfig())
    return captioner.write([model.see(batch)], [batch], use_references=False)[0]


def sample_seed(seed: int, draw: int) -> int:
    """Return the seed of a region's sample number ``draw``; far from the seeds of its neighbours."""
    return (seed * 6364136223846793005 + (draw + 1) * 1442695040888963407) % 2**63

"""Whether the references that step 1 learns from are vaguer than what it writes by itself.

A reference is taken for vague where it has fewer words than the model's own caption of the region: that is cheap, and
true of "the star" beside "the red star". But short words may be enough, so it must also lead to a worse mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dual_loop.data.reader import Reader
from dual_loop.errors import SampleError
from dual_loop.evaluation.bootstrap import paired_bootstrap
from dual_loop.evaluation.measure import MeasuredRegion
from dual_loop.types import RegionSample

REGIONS = 192
"""Captioned regions that are looked at; of a source that has fewer nothing is said."""
LEAST_SHARE = 0.2
"""Share of vague ones from which on a warning is due. In generated data with exact references it is 0.02 to 0.06."""
_SOURCES = ("refcoco", "masks")


class HeardRegion(NamedTuple):
    """IoUs of the masks of a region's vague references, their mean, and of the model's caption; None where none is."""

    image: str
    reference: float | None
    caption: float


def captioned_samples(
    sources: Iterable[Reader], regions_per_image: int, rank: int = 0, world_size: int = 1
) -> Iterator[RegionSample]:
    """Yield this rank's part of :data:`REGIONS` captioned regions of every source that has so many, drawn at random."""
    for source in sources:
        if source.name not in _SOURCES or len(source) * regions_per_image < REGIONS:
            continue
        rng, found = np.random.default_rng(0), 0
        for tried, index in enumerate(rng.permutation(len(source))[rank::world_size].tolist()):
            if found * world_size >= REGIONS or (tried >= 8 and not found):
                break
            try:
                sample = source.load(index, rng)
            except SampleError:
                continue  # training will meet it, and say so
            found += sum(map(bool, sample.captions))
            yield sample


def heard_regions(measured: Iterable[MeasuredRegion]) -> list[HeardRegion]:
    """Return what the regions with references show; they were measured with the tasks ``referring`` and ``loop``."""
    heard = []
    for region in measured:
        pairs = zip(region.references, region.ious, strict=False)
        vague = [iou for text, iou in pairs if len(text.split()) < len(region.caption.split())]
        if region.references:
            heard.append(HeardRegion(region.image, sum(vague) / len(vague) if vague else None, region.cycle_iou))
    return heard


def warn_of_vague_references(heard: Sequence[HeardRegion]) -> str | None:
    """Return a warning where many references are vague and their masks are worse than the captions' beyond chance."""
    vague = [one for one in heard if one.reference is not None]
    if len(heard) < REGIONS / 2 or len(vague) < LEAST_SHARE * len(heard):
        return None
    found, heard_of_captions = [one.reference or 0.0 for one in vague], [one.caption for one in vague]
    change = paired_bootstrap(heard_of_captions, found, groups=[one.image for one in vague])
    if change["ci95_high"] >= 0:
        return None
    interval = f"{-change['ci95_high']:.2f} to {-change['ci95_low']:.2f}"
    return (
        f"Warning: references are vaguer than what the model writes: {len(vague)} of {len(heard)} have fewer words, "
        f"and their masks an IoU {-change['mean']:.2f} lower ({interval}) than those of its captions; it would learn "
        "to write like them; to do: --caption_supervision off, and a reward to learn from (--caption_gradient grpo "
        "--contrast_reward_weight 1)"
    )

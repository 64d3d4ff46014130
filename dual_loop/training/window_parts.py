"""How many images of a micro-batch hold a graph at once (``speed.images_at_once``).

Losses are sums divided by global counts, and everything random about a region has a seed of its own, so a micro-batch
may be run in parts of fewer images, each with its backward pass, for the same gradients up to rounding. Activations are
those of a part. On a GPU a micro-batch is what the user found to fit, and parts would leave it idle; on a CPU one image
with a few hundred tokens keeps the products busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dual_loop.config import Config
from dual_loop.model.build import geometry
from dual_loop.types import Batch

ENOUGH_TOKENS = 256
"""Image tokens from which on one image is enough for a CPU."""


@dataclass(frozen=True)
class Part:
    """Some images of a micro-batch.

    Attributes:
        batch: the images.
        micro_step: the micro-batch of the accumulation window that they belong to.
        first: the number of the first one there.
    """

    batch: Batch
    micro_step: int
    first: int


def images_at_once(config: Config, device_type: str) -> int:
    """Return how many images of a micro-batch are run together on this kind of device.

    ``auto`` is one on a CPU where an image has 256 tokens or more, else all. A sharded model runs all: its ranks have
    to take the same number of passes.
    """
    choice, size = config.speed.images_at_once, config.train.batch_size
    if choice.isdigit():
        return min(int(choice), size)
    if size == 1 or choice == "all" or device_type != "cpu" or config.train.parallel == "fsdp":
        return size
    return 1 if geometry(config).grid_size ** 2 >= ENOUGH_TOKENS else size


def as_computed(config: Config, device_type: str) -> Config:
    """Return ``config`` with the parts as micro-batches: what estimates of time and memory have to look at."""
    train, count = config.train, images_at_once(config, device_type)
    steps = train.gradient_accumulation_steps * -(-train.batch_size // count)
    return replace(config, train=replace(train, batch_size=count, gradient_accumulation_steps=steps))


def split_window(window: Sequence[Batch], count: int) -> list[Part]:
    """Return the micro-batches of a window in parts of at most ``count`` images, in order."""
    parts = []
    for micro_step, batch in enumerate(window):
        starts = range(0, batch.num_images, count)
        parts += [Part(batch.images(start, start + count), micro_step, start) for start in starts]
    return parts

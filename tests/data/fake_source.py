"""A source of one-colour images that a test makes bad where it wants, and a data set over such sources."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader

from dual_loop.config import Config, TrainConfig
from dual_loop.data.dataset import DualLoopDataset
from dual_loop.data.dataset_builder import build_dataset
from dual_loop.data.prepare import Geometry
from dual_loop.errors import SampleError
from dual_loop.types import Batch, RegionSample

GEOMETRY = Geometry(vision_image_size=28, grid_size=4, grounding_size=32, mask_size=16)


class FakeSource:
    """Entries are images of one colour, their number; those in ``bad`` raise, in ``vanishing`` lose their target."""

    def __init__(self, name: str, length: int, bad: tuple[int, ...] = (), vanishing: tuple[int, ...] = ()) -> None:
        self.name, self.length, self.bad, self.vanishing = name, length, bad, vanishing
        self.loads: list[int] = []

    def __len__(self) -> int:
        return self.length

    def entry_id(self, index: int) -> str:
        return f"{self.name}_{index}"

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        self.loads.append(index)
        where = int(rng.integers(8))
        if index in self.bad:
            raise SampleError("broken_rle", f"entry {index} is broken")
        masks = np.zeros((1, 48, 64), dtype=bool)
        masks[0, where : where + 20, where : where + 20] = True
        if index in self.vanishing:
            masks[:] = False
            masks[0, 1, 1] = True
        image = np.full((48, 64, 3), index % 256, dtype=np.uint8)
        captions = (tuple(f"caption {number}" for number in range(20)),)
        return RegionSample(self.name, self.entry_id(index), image, masks, ("r",), captions)


class CrashingSource(FakeSource):
    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        raise ZeroDivisionError("oh no")


def make_dataset(*sources: FakeSource, seed: int = 1) -> DualLoopDataset:
    return build_dataset(Config(train=TrainConfig(seed=seed)), GEOMETRY, sources)


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def first_batch(loader: DataLoader[Batch]) -> Batch:
    """Shut workers down in order also on an error: the traceback would keep the iterator for the garbage collector."""
    batches = iter(loader)
    try:
        return next(batches)
    finally:
        if loader.num_workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]


def entry_of(batch: Batch) -> list[int]:
    return [int(name.split("_")[1].split("#")[0]) for name in batch.region_names]

"""Scenes of the generated data set as tensors in memory, from named pools that never overlap."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dual_loop.data.prepare import Geometry, collate, prepare_sample
from dual_loop.testing.scenes import COLOURS, GLYPHS, Scene, generate_scene, pool_seed
from dual_loop.types import Batch, RegionSample

SHAPES = list(GLYPHS)
COLOUR_NAMES = list(COLOURS)
UNNAMED_PAIRS = frozenset((shape, COLOUR_NAMES[number % len(COLOURS)]) for number, shape in enumerate(SHAPES))
"""A colour of each shape that no caption names, where it is to be seen whether words are put together anew."""


def without_unnamed(scene: Scene) -> Scene:
    """Return the scene with the objects that a caption may name."""
    return replace(scene, objects=tuple(o for o in scene.objects if (o.shape, o.colour) not in UNNAMED_PAIRS))


def scene_sample(scene: Scene, name: str) -> RegionSample:
    """Turn a generated scene into the sample that a reader would give."""
    return RegionSample(
        source="refcoco",
        sample_id=name,
        image=scene.image,
        masks=np.asarray(scene.masks),
        region_ids=tuple(str(k) for k in range(len(scene.objects))),
        captions=tuple((caption,) for caption in scene.captions),
    )


@dataclass
class ScenePool:
    """Prepared scenes with the class of every object: images are stored once, batches are joined on demand."""

    prepared: list[Batch]
    shapes: list[list[int]]
    colours: list[list[int]]

    @classmethod
    def generate(cls, pool: str, count: int, seed: int, sizes: Geometry, *, unnamed_pairs: bool = True) -> ScenePool:
        prepared, shapes, colours = [], [], []
        for index in range(count):
            scene = generate_scene(pool_seed(seed, pool, index))
            scene = scene if unnamed_pairs else without_unnamed(scene)
            if not scene.objects:
                continue
            sample = scene_sample(scene, f"{pool}/{index}")
            rng = np.random.default_rng(index)
            item = prepare_sample(sample, sizes, rng, seed, index, allow_empty_targets=True)
            item.pixel_values = item.pixel_values.half()
            item.region_seeds = torch.arange(index * 8, index * 8 + sample.num_regions)
            prepared.append(item)
            shapes.append([SHAPES.index(o.shape) for o in scene.objects])
            colours.append([COLOUR_NAMES.index(o.colour) for o in scene.objects])
        return cls(prepared, shapes, colours)

    def __len__(self) -> int:
        return len(self.prepared)

    @property
    def num_objects(self) -> int:
        return sum(len(row) for row in self.shapes)

    def batch(self, indices: list[int]) -> tuple[Batch, Tensor, Tensor]:
        """Return the batch and the shape and colour class (N,) of its regions."""
        batch = collate([self.prepared[i] for i in indices])
        batch.pixel_values = batch.pixel_values.float()
        shapes = torch.tensor([k for i in indices for k in self.shapes[i]])
        colours = torch.tensor([k for i in indices for k in self.colours[i]])
        return batch, shapes, colours


def class_maps(batch: Batch, masks: Tensor, classes: Tensor) -> Tensor:
    """Paint class + 1 of every region into a map (B, side, side) int64 of its image; 0 is background."""
    maps = torch.zeros(batch.num_images, *masks.shape[-2:], dtype=torch.long)
    for region, image in enumerate(batch.region_image.tolist()):
        maps[image][masks[region] > 0] = int(classes[region]) + 1
    return maps

"""From a region sample to a batch of one image, and from several of those to one batch.

The vision-language image follows InternVL: Pillow's bicubic filter on the 8-bit image, straight to I x I (the aspect
ratio is not kept), divided by 255, ImageNet mean and deviation; with ``max_tiles > 1`` the image is cut into tiles
first and a thumbnail of the whole comes last. The grounding image is resized the same way to S x S and stays uint8 on
the way to the GPU, where SAM 2's own normalisation runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch

from dual_loop.data.captions import check_captions
from dual_loop.data.images import Picture
from dual_loop.data.masks import area_fractions, check_mask, pool_mask_to_grid, resize_mask, target_vanished
from dual_loop.data.mixture import stable_hash
from dual_loop.errors import SampleError, bad_sample
from dual_loop.types import Batch, LaterFrame, RegionSample, SkippedRegion, SkippedSample

# The only copy in the package; InternVL and SAM 2 were both trained with these.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Geometry:
    """The sizes that the model gives to data preparation (``model.build.geometry`` makes it from a config).

    Attributes:
        vision_image_size: I, side of one image tile in pixels.
        grid_size: G, side of the prompt grid, that is image tokens along one side of a tile.
        grounding_size: S, side of SAM 2's input in pixels.
        mask_size: Q, side of the mask logits and so of the target masks.
        max_tiles: most tiles that an image is cut into, the thumbnail not counted; 1 is no cutting.
        grid_pooling: ``"area"`` or ``"nearest"``, see :func:`dual_loop.data.masks.pool_mask_to_grid`.
        target_pooling: ``"area"`` or ``"nearest"``, see :func:`resize_targets`.
        keeps_full_masks: whether batches carry the masks at their stored size too, up to S (``loss.points_from``).
    """

    vision_image_size: int
    grid_size: int
    grounding_size: int
    mask_size: int
    max_tiles: int = 1
    grid_pooling: str = "area"
    target_pooling: str = "area"
    keeps_full_masks: bool = False

    @property
    def most_tiles(self) -> int:
        """The tiles that an image may have, with the thumbnail where it is cut."""
        return self.max_tiles + (self.max_tiles > 1)

    def needed_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the least (H, W) that an image of ``height`` x ``width`` may be decoded at: nothing is enlarged."""
        columns, rows = choose_tile_grid(height, width, self.max_tiles, self.vision_image_size)
        least = self.grounding_size
        return max(least, rows * self.vision_image_size), max(least, columns * self.vision_image_size)

    def vanishes(self, mask: np.ndarray) -> bool:
        """Tell whether nothing of ``mask`` (H, W) bool, 1 pixel or more, is left in its target."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        cell_height, cell_width = (side / self.mask_size for side in mask.shape)
        touched = (np.ptp(rows) + 1 + 2 * cell_height) * (np.ptp(columns) + 1 + 2 * cell_width)
        # Were all cells that it touches covered by less than a half, the whole would be less than half of them.
        if self.target_pooling == "area" and 2 * np.count_nonzero(mask) >= touched:
            return False
        return bool(resize_targets(mask[None], self.mask_size, self.target_pooling).amax() < 0.5)


def region_seed(seed: int, slot: int | str, position: int) -> int:
    """Return the seed (0..2**63-1) of region ``position`` of the sample at ``slot``, the same on every machine.

    ``slot`` is the place in the run's global stream, or a sample's name where there is no stream.
    """
    return stable_hash("region", seed, slot, position)


def sample_rng(seed: int, slot: int | str) -> np.random.Generator:
    """Return the generator of every random choice inside the sample at ``slot`` (regions, captions)."""
    return np.random.default_rng(stable_hash("sample", seed, slot))


def choose_tile_grid(height: int, width: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
    """Return (columns, rows) of InternVL's dynamic tiling for an image of ``height`` x ``width`` pixels.

    Among the grids with 1..max_tiles tiles, the one whose columns / rows is closest to width / height; of two of the
    same ratio (1x1 and 2x2) the larger where the image has more than half of its pixels.
    """
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid))
    aspect_ratio = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in grids:
        distance = abs(aspect_ratio - columns / rows)
        is_large_enough = height * width > 0.5 * tile_size * tile_size * columns * rows
        if distance < best_distance or (distance == best_distance and is_large_enough):
            best, best_distance = (columns, rows), distance
    return best


def image_to_tiles(image: np.ndarray | Picture, geometry: Geometry) -> torch.Tensor:
    """Cut and normalise one image, (H, W, 3) uint8 RGB or a picture, for the vision tower: (t, 3, I, I) float32.

    The last tile always shows the whole image: the only one, or a thumbnail behind those that come row by row.
    """
    size = geometry.vision_image_size
    picture = _as_picture(image)
    columns, rows = choose_tile_grid(*picture.size, geometry.max_tiles, size)
    canvas = picture.resized(rows * size, columns * size)
    tiles = canvas.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(rows * columns, size, size, 3)
    if len(tiles) > 1:
        tiles = np.concatenate([tiles, picture.resized(size, size)[None]])
    pixels = torch.from_numpy(np.ascontiguousarray(tiles.transpose(0, 3, 1, 2))).float().div_(255)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return pixels.sub_(mean).div_(std)


def _as_picture(image: np.ndarray | Picture) -> Picture:
    return image if isinstance(image, Picture) else Picture(image, (image.shape[0], image.shape[1]))


def grounding_image(image: np.ndarray | Picture, size: int) -> torch.Tensor:
    """Resize (H, W, 3) uint8 straight to (3, S, S) uint8 with Pillow's bicubic filter; values stay 0..255."""
    resized = _as_picture(image).resized(size, size)
    return torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))


def resize_targets(masks: np.ndarray, size: int, pooling: str = "area") -> torch.Tensor:
    """Resize (N, H, W) bool to the (N, Q, Q) that a predicted mask is compared with.

    ``area`` is the covered part of each cell, float32. ``nearest`` is uint8 0/1 as ``torch.nn.functional.interpolate``
    gives, which Sa2VA trains with: it takes the upper left corner of each cell, so that every object is moved by half a
    cell to the lower right.
    """
    if pooling == "area":
        return area_fractions(masks, size)
    pixels = torch.from_numpy(masks.astype(np.uint8))
    return torch.nn.functional.interpolate(pixels[None], (size, size), mode="nearest")[0]


def prepare_sample(
    sample: RegionSample,
    geometry: Geometry,
    rng: np.random.Generator,
    seed: int,
    slot: int | str,
    *,
    allow_empty_targets: bool = False,
) -> Batch:
    """Turn one sample into tensors.

    Args:
        sample: N regions on one image, on a frame pair (two views: frame 1 is captioned, frame 2 segmented), or on a
            clip (a view for each frame that is segmented).
        rng: chooses one caption where a region has several.
        seed, slot: give the seeds of the regions, see :func:`region_seed`.
        allow_empty_targets: keep a region whose target is lost at Q x Q, as evaluation compares at the original size.

    Raises:
        SampleError: ``invalid_sample`` (shapes or types that break the contract of ``RegionSample``), ``empty_mask``;
            ``target_vanished`` (no pixel of a mask is left at Q x Q) and ``special_token`` where no region is left.
    """
    where = f"{sample.source}/{sample.sample_id}"
    _check_sample(sample, where)
    targets = [(sample.segmentation_image, sample.segmentation_masks), *sample.later_targets]
    target_masks = [resize_targets(masks, geometry.mask_size, geometry.target_pooling) for _, masks in targets]
    unusable = {} if allow_empty_targets else _unusable(sample, target_masks, where)
    if len(unusable) == sample.num_regions:
        raise SampleError(unusable[0].reason, unusable[0].message)
    if unusable:
        return prepare_sample(sample.without(unusable), geometry, rng, seed, slot)
    names = [f"{where}#{region_id}" for region_id in sample.region_ids]
    captioned = Picture(sample.image, (sample.masks.shape[1], sample.masks.shape[2]), sample.image_reduction)
    shown = [captioned] if sample.target_image is None else [captioned, *(_as_picture(image) for image, _ in targets)]
    views, segmented = [image_to_tiles(image, geometry) for image in shown], range(len(shown))[-len(targets) :]
    grounding = [grounding_image(shown[view], geometry.grounding_size) for view in segmented]
    full_masks = [_learnable(masks, geometry) for _, masks in targets]
    of_frames = (segmented, grounding, target_masks, full_masks)
    prompt_masks, grid_rescued = pool_mask_to_grid(sample.masks, geometry.grid_size, mode=geometry.grid_pooling)
    return Batch(
        pixel_values=torch.cat(views),
        tiles_per_view=[len(view) for view in views],
        caption_view=[0],
        target_view=[segmented[0]],
        g_pixel_values=grounding[0][None],
        prompt_masks=prompt_masks,
        grid_rescued=grid_rescued,
        target_masks=target_masks[0],
        full_masks=full_masks[0],
        region_image=torch.zeros(len(names), dtype=torch.int64),
        region_seeds=torch.tensor([region_seed(seed, slot, place) for place in range(len(names))]),
        captions=[texts[int(rng.integers(len(texts)))] if texts else None for texts in sample.captions],
        references=[tuple(texts) for texts in sample.captions],
        fallbacks=list(sample.fallbacks),
        region_names=names,
        sources=[sample.source],
        no_target=[sample.no_target],
        undrawn_captions=[sample.undrawn_captions],
        passed_over=[
            SkippedSample(sample.source, sample.sample_id, one.reason, one.message, one.region_id)
            for one in sample.passed_over
        ],
        later_frames=[LaterFrame(0, *frame) for frame in list(zip(*of_frames, strict=True))[1:]],
    )


def _unusable(sample: RegionSample, target_masks: list[torch.Tensor], where: str) -> dict[int, SkippedRegion]:
    """Return the regions that training can learn nothing from; a reader of the package has passed them over before."""
    found: dict[int, SkippedRegion] = {}
    lost = torch.stack([resized.flatten(1).amax(dim=1) < 0.5 for resized in target_masks]).any(0).tolist()
    for place, (region_id, texts) in enumerate(zip(sample.region_ids, sample.captions, strict=True)):
        name = f"{where}#{region_id}"
        try:
            check_captions(texts, name)
            if lost[place]:
                raise target_vanished(sample.segmentation_masks[place], name)
        except SampleError as error:
            found[place] = SkippedRegion(region_id, error.reason, str(error))
    return found


def _learnable(masks: np.ndarray, geometry: Geometry) -> list[torch.Tensor]:
    """Return (n, H, W) bool masks where points are read from them, no larger than SAM 2's input; else nothing."""
    height, width = (min(side, geometry.grounding_size) for side in masks.shape[1:])
    return [torch.from_numpy(resize_mask(masks, (height, width)))] if geometry.keeps_full_masks else []


def collate(batches: Sequence[Batch]) -> Batch:
    """Join batches, one or more; nothing is padded, regions and tiles are concatenated."""
    if not batches:
        raise ValueError("a batch needs at least one sample")
    first_image = accumulate((batch.num_images for batch in batches), initial=0)
    first_view = accumulate((len(batch.tiles_per_view) for batch in batches), initial=0)
    counted_on = [
        replace(
            batch,
            caption_view=[view + number for number in batch.caption_view],
            target_view=[view + number for number in batch.target_view],
            region_image=batch.region_image + image,
            later_frames=[replace(one, image=one.image + image, view=one.view + view) for one in batch.later_frames],
        )
        for batch, image, view in zip(batches, first_image, first_view, strict=False)
    ]
    joined: dict[str, Any] = {}
    for name in (item.name for item in fields(Batch)):
        parts = [getattr(batch, name) for batch in counted_on]
        joined[name] = torch.cat(parts) if isinstance(parts[0], torch.Tensor) else list(chain.from_iterable(parts))
    return Batch(**joined)


def batch_from_samples(samples: Sequence[RegionSample], geometry: Geometry, seed: int = 0) -> Batch:
    """Make a batch of ``samples`` (one or more) for evaluation and inference.

    Seeds come from ``seed`` and the sample's own name, so results do not depend on how samples are batched. Targets
    may be empty at Q x Q.

    Raises:
        SampleError: ``invalid_sample`` or ``empty_mask``, see :func:`prepare_sample`.
    """
    prepared = []
    for sample in samples:
        name = f"{sample.source}/{sample.sample_id}"
        rng = sample_rng(seed, name)
        prepared.append(prepare_sample(sample, geometry, rng, seed, name, allow_empty_targets=True))
    return collate(prepared)


def _check_sample(sample: RegionSample, where: str) -> None:
    """Refuse what readers of the package never return, but a user's own source might."""
    count = len(sample.region_ids)
    if len(sample.captions) != count:
        raise _invalid("captions do not fit the regions", where, f"{len(sample.captions)} entries", f"{count}")
    views = [(sample.image, sample.masks, "image", sample.image_reduction)]
    if sample.target_image is not None and sample.target_masks is not None:
        frames = [(sample.target_image, sample.target_masks), *sample.later_targets]
        views += [(image, masks, f"target image {number}", 1) for number, (image, masks) in enumerate(frames, 1)]
    elif sample.target_image is not None or sample.target_masks is not None or sample.later_targets:
        raise _invalid("a pair is incomplete", where, "one of target_image and target_masks", "both or none")
    for image, masks, name, reduction in views:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise _invalid("not an RGB image", f"{where}, {name}", f"{image.shape} {image.dtype}", "(H, W, 3) uint8")
        expected = (count, *image.shape[:2])
        at_image = (*masks.shape[:1], *(-(-side // reduction) for side in masks.shape[1:]))
        if count == 0 or at_image != expected or masks.dtype != np.bool_:
            seen = f"{masks.shape} {masks.dtype}"
            raise _invalid("masks do not fit", f"{where}, {name}", seen, f"{expected} bool, N >= 1")
        for number, mask in enumerate(masks):
            check_mask(mask, f"{where}, {name}, region {number}")


def _invalid(what: str, where: str, seen: str, expected: str) -> SampleError:
    return bad_sample("invalid_sample", what, where, seen, expected, "mend the reader of this data set")

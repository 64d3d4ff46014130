"""Samples to tensors: exact pre-processing, tiles, targets, pairs, seeds, and what is refused."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from dual_loop.data.masks import resize_mask
from dual_loop.data.prepare import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Geometry,
    batch_from_samples,
    choose_tile_grid,
    collate,
    image_to_tiles,
    prepare_sample,
    region_seed,
    resize_targets,
    sample_rng,
)
from dual_loop.errors import SampleError
from dual_loop.types import RegionSample, SkippedSample

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "sa2va_tiny"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference set ../shared/golden is not there")
SMALL = Geometry(vision_image_size=28, grid_size=4, grounding_size=32, mask_size=8)
SA2VA = Geometry(vision_image_size=448, grid_size=16, grounding_size=1024, mask_size=256)


def make_sample(
    name: str = "a", num_regions: int = 2, height: int = 40, width: int = 60, pair: bool = False
) -> RegionSample:
    """Regions are boxes of a third of the image; the second frame of a pair is smaller and has them elsewhere."""
    rng = np.random.default_rng(len(name) + height)
    masks = np.zeros((num_regions, height, width), dtype=bool)
    for index in range(num_regions):
        masks[index, index : index + height // 3, index : index + width // 3] = True
    target = {}
    if pair:
        small = np.ascontiguousarray(masks[:, ::2, ::2][:, ::-1])
        image = rng.integers(0, 256, (*small.shape[1:], 3), dtype=np.uint8)
        target = {"target_image": image, "target_masks": small}
    return RegionSample(
        source="fake",
        sample_id=name,
        image=rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        masks=masks,
        region_ids=tuple(f"r{index}" for index in range(num_regions)),
        captions=tuple((f"first {i}", f"second {i}") if i % 2 == 0 else () for i in range(num_regions)),
        **target,
    )


def prepare(sample: RegionSample, geometry: Geometry = SMALL, **options: bool):  # type: ignore[no-untyped-def]
    return prepare_sample(sample, geometry, np.random.default_rng(0), 7, sample.sample_id, **options)


# --- against the original ------------------------------------------------------------------------------------------


@needs_golden
@pytest.mark.parametrize("number", [0, 1])
def test_images_and_nearest_grids_equal_the_originals(number: int) -> None:
    image = np.asarray(Image.open(GOLDEN / f"image_{number}.png").convert("RGB"))
    with safe_open(str(GOLDEN / "inputs.safetensors"), "pt") as file:
        pixel_values = file.get_tensor("pixel_values")[number]
        g_pixel_values = file.get_tensor("g_pixel_values")[number]
        regions = file.get_tensor(f"caption_region_masks.{number}").numpy().astype(bool)
        grids = file.get_tensor(f"caption_prompt_masks.{number}").bool()
    names = tuple(str(index) for index in range(len(regions)))
    sample = RegionSample("fake", "golden", image, regions, names, tuple(() for _ in names))
    prepared = prepare(sample, dataclasses.replace(SA2VA, grid_pooling="nearest"))
    assert torch.equal(prepared.pixel_values[0], pixel_values)
    assert torch.equal(prepared.g_pixel_values[0], g_pixel_values)
    assert torch.equal(prepared.prompt_masks, grids)
    assert not prepared.grid_rescued.any()


@needs_golden
def test_targets_equal_the_originals() -> None:
    image = np.asarray(Image.open(GOLDEN / "image_1.png").convert("RGB"))
    with safe_open(str(GOLDEN / "inputs.safetensors"), "pt") as file:
        masks = file.get_tensor("masks.1").numpy().astype(bool)
    with safe_open(str(GOLDEN / "outputs.safetensors"), "pt") as file:
        expected = file.get_tensor("gt_masks_low_res")[1]
    sample = RegionSample("fake", "golden", image, masks, ("0", "1", "2"), ((), (), ()))
    # The original repeats three masks cyclically to five objects.
    nearest = dataclasses.replace(SA2VA, target_pooling="nearest")
    assert torch.equal(prepare(sample, nearest).target_masks[[0, 1, 2, 0, 1]], expected)


def test_area_targets_are_cut_at_half_where_masks_are_compared() -> None:
    masks = np.zeros((2, 40, 40), dtype=bool)
    masks[0, 12:28, 12:28] = True
    masks[1, :, 20:23] = True  # three of the five columns of a cell
    sample = RegionSample("fake", "area", np.zeros((40, 40, 3), np.uint8), masks, ("0", "1"), ((), ()))
    area = dataclasses.replace(SA2VA, mask_size=8, target_pooling="area")
    batch = prepare(sample, area)
    assert batch.target_masks.dtype == torch.float32
    assert sorted(batch.target_masks[1].unique().tolist()) == pytest.approx([0.0, 0.6])
    assert batch.binary_targets.dtype == torch.bool
    assert batch.binary_targets.flatten(1).sum(1).tolist() == [12, 8]  # 0.36 of the corners is less than half
    nearest = prepare(sample, dataclasses.replace(area, target_pooling="nearest"))
    assert torch.equal(nearest.binary_targets, nearest.target_masks > 0)
    masks[1, :, 22] = False  # two of the five
    [lost] = prepare(dataclasses.replace(sample, masks=masks), area).passed_over
    assert "no pixel left in its target" in lost.message


def test_targets_are_where_their_masks_are() -> None:
    mask = np.zeros((1, 64, 64), dtype=bool)
    mask[0, 13:39, 22:50] = True
    places = np.argwhere(mask[0]) + 0.5
    for pooling, expected in (("area", 0.0), ("nearest", 2.0)):  # half of the 4 pixels of a cell, to the lower right
        target = resize_targets(mask, 16, pooling)[0].float()
        cells = (torch.stack(torch.meshgrid(*[torch.arange(16) + 0.5] * 2, indexing="ij")) * target).sum((1, 2))
        moved = (cells / target.sum() * 4).numpy() - places.mean(0)
        np.testing.assert_allclose(moved, expected, atol=0.01)


def test_whole_masks_come_along_where_points_are_read_from_them() -> None:
    keeps = dataclasses.replace(SMALL, keeps_full_masks=True, grounding_size=60)
    samples = [make_sample(), make_sample(pair=True, num_regions=1)]
    batch = collate([prepare(sample, keeps) for sample in samples])
    for own, sample in zip(batch.full_masks, samples, strict=True):
        np.testing.assert_array_equal(own.numpy(), sample.segmentation_masks)
    # No larger than SAM 2's input: nobody could learn what is finer.
    small = prepare(samples[0], dataclasses.replace(keeps, grounding_size=20)).full_masks[0]
    np.testing.assert_array_equal(small.numpy(), resize_mask(samples[0].masks, (20, 20)))
    assert torch.equal(batch.images(1, 2).full_masks[0], batch.full_masks[1])
    assert batch.to("meta").full_masks[0].is_meta
    assert prepare(samples[0], SMALL).full_masks == []


# --- vision tiles --------------------------------------------------------------------------------------------------


def test_one_tile_is_the_whole_image_normalised() -> None:
    colour = np.array([10, 128, 250], dtype=np.uint8)
    tiles = image_to_tiles(np.broadcast_to(colour, (40, 60, 3)).copy(), SMALL)
    assert tiles.shape == (1, 3, 28, 28)
    assert tiles.dtype == torch.float32
    expected = (colour / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(tiles.numpy(), np.broadcast_to(expected[None, :, None, None], tiles.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "max_tiles", "expected"),
    [
        (480, 640, 1, (1, 1)),
        (448, 896, 12, (2, 1)),
        (896, 448, 12, (1, 2)),
        (1344, 448, 6, (1, 3)),
        (300, 300, 12, (1, 1)),  # a tie of 1x1, 2x2, 3x3: too small for more than one tile
        (700, 700, 12, (2, 2)),  # 490,000 pixels are more than half of 4 tiles, less than half of 9
        (1000, 1000, 12, (3, 3)),
        (1500, 2250, 12, (3, 2)),
        (480, 640, 12, (4, 3)),  # exactly 4:3, found only with 12 tiles
        (480, 640, 6, (3, 2)),
        (100, 2000, 6, (6, 1)),
    ],
)
def test_tile_grids_follow_internvl(height: int, width: int, max_tiles: int, expected: tuple[int, int]) -> None:
    assert choose_tile_grid(height, width, max_tiles, 448) == expected


@settings(max_examples=80, deadline=None)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), max_tiles=st.integers(1, 12))
def test_no_grid_has_a_closer_ratio(height: int, width: int, max_tiles: int) -> None:
    columns, rows = choose_tile_grid(height, width, max_tiles, 448)
    assert 1 <= columns * rows <= max_tiles
    ratios = [c / r for c in range(1, 13) for r in range(1, 13) if c * r <= max_tiles]
    assert abs(width / height - columns / rows) == min(abs(width / height - ratio) for ratio in ratios)


def original_grid(width: int, height: int, most: int, side: int, backwards: bool = False) -> tuple[int, int]:
    """The grid that InternVL's and Sa2VA's pre-processing choose, written anew as they describe it.

    They visit grids by their number of tiles, in no stated order where that is the same (``backwards``: the other way).
    """
    grids = {(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most}
    best, least = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], -grid[0] if backwards else grid[0])):
        difference = abs(width / height - columns / rows)
        if difference == least and width * height > 0.5 * side * side * columns * rows:
            best = columns, rows
        if difference < least:
            best, least = (columns, rows), difference
    return best


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 3000), height=st.integers(1, 3000), most=st.integers(1, 12), side=st.sampled_from([28, 448])
)
def test_the_grid_is_the_originals(width: int, height: int, most: int, side: int) -> None:
    own = choose_tile_grid(height, width, most, side)
    assert own == original_grid(width, height, most, side) == original_grid(width, height, most, side, backwards=True)


@pytest.mark.parametrize("most", [1, 2, 6, 12])
def test_ties_are_broken_as_by_the_original(most: int) -> None:
    ratios = sorted({Fraction(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most})
    between = [(one + other) / 2 for one, other in pairwise(ratios)]  # as far from one grid as from another
    for ratio in (*ratios, *between):
        for scale in (1, 20, 90, 400):
            width, height = ratio.numerator * scale, ratio.denominator * scale
            expected = original_grid(width, height, most, 448)
            assert choose_tile_grid(height, width, most, 448) == expected
            assert original_grid(width, height, most, 448, backwards=True) == expected


@pytest.mark.parametrize("size", [(320, 240), (200, 280), (97, 31), (30, 90), (64, 64), (500, 499)])
def test_tiles_are_the_originals_bit_for_bit(size: tuple[int, int]) -> None:
    """Pillow's default filter on the 8-bit image, cut by crops; a thumbnail where there is more than one tile."""
    width, height = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    columns, rows = original_grid(width, height, 12, 28)
    resized = Image.fromarray(image).resize((28 * columns, 28 * rows))
    boxes = [(28 * c, 28 * r, 28 * c + 28, 28 * r + 28) for r in range(rows) for c in range(columns)]
    parts = [resized.crop(box) for box in boxes]
    parts += [Image.fromarray(image).resize((28, 28))] if len(parts) > 1 else []
    expected = torch.stack([torch.from_numpy(np.array(part)).permute(2, 0, 1).float() / 255 for part in parts])
    expected = (expected - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    assert torch.equal(image_to_tiles(image, dataclasses.replace(SMALL, max_tiles=12)), expected)


def test_tiles_are_the_parts_row_by_row_and_the_thumbnail_is_last() -> None:
    image = np.zeros((56, 84, 3), dtype=np.uint8)
    for number in range(6):
        row, column = divmod(number, 3)
        image[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28] = 40 * number
    tiles = image_to_tiles(image, dataclasses.replace(SMALL, max_tiles=6))
    assert tiles.shape == (7, 3, 28, 28)
    grey = tiles * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    for number in range(6):  # the size fits, so nothing is resampled
        torch.testing.assert_close(grey[number], torch.full((3, 28, 28), 40 * number / 255))
    assert torch.equal(tiles[6:], image_to_tiles(image, SMALL))


# --- targets, prompts, pairs ---------------------------------------------------------------------------------------


def test_a_single_image_is_one_view_with_both_sides_from_it() -> None:
    sample = make_sample()
    batch = collate([prepare(sample, dataclasses.replace(SMALL, target_pooling="nearest"))])
    assert batch.tiles_per_view == [1]
    assert batch.caption_view == batch.target_view == [0]
    assert batch.target_masks.shape == (2, 8, 8)
    assert batch.target_masks.dtype == torch.uint8
    # 40 x 60 to 8 x 8, nearest: row 5 i and column floor(7.5 j) of the source.
    columns = [int(7.5 * j) for j in range(8)]
    np.testing.assert_array_equal(batch.target_masks.numpy(), sample.masks[:, ::5][:, :, columns])
    assert batch.prompt_masks.dtype == torch.bool
    assert batch.prompt_masks.flatten(1).any(1).all()


def test_a_pair_is_captioned_on_frame_one_and_segmented_on_frame_two() -> None:
    sample = make_sample(pair=True, num_regions=1)
    assert sample.target_image is not None
    batch = collate([prepare(make_sample()), prepare(sample), prepare(make_sample("bb"))])
    assert batch.tiles_per_view == [1, 1, 1, 1]
    assert batch.caption_view == [0, 1, 3]
    assert batch.target_view == [0, 2, 3]
    torch.testing.assert_close(batch.pixel_values[1], image_to_tiles(sample.image, SMALL)[0])
    torch.testing.assert_close(batch.pixel_values[2], image_to_tiles(sample.target_image, SMALL)[0])
    alone = prepare(RegionSample("fake", "x", sample.target_image, sample.segmentation_masks, ("r",), ((),)))
    assert torch.equal(batch.g_pixel_values[1], alone.g_pixel_values[0])
    assert torch.equal(batch.target_masks[2:3], alone.target_masks)
    first = prepare(RegionSample("fake", "x", sample.image, sample.masks, ("r",), ((),)))
    assert torch.equal(batch.prompt_masks[2:3], first.prompt_masks)
    assert not torch.equal(first.prompt_masks, alone.prompt_masks)


def test_collate_keeps_ragged_regions_and_tiles_in_order() -> None:
    geometry = dataclasses.replace(SMALL, max_tiles=4)
    samples = [make_sample("a", 3, 56, 56), make_sample("b", 1, 28, 84), make_sample("c", 2, pair=True)]
    items = [prepare(sample, geometry) for sample in samples]
    items[1].skipped = [SkippedSample("fake", "bad", "broken", "message")]
    batch = collate(items)
    assert batch.tiles_per_view == [len(image_to_tiles(image, geometry)) for image in _views(samples)]
    assert sum(batch.tiles_per_view) == len(batch.pixel_values)
    assert max(batch.tiles_per_view) > 1
    assert batch.region_image.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.region_image.dtype == torch.int64
    places = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0), ("c", 1)]
    assert batch.region_seeds.tolist() == [region_seed(7, name, place) for name, place in places]
    assert batch.region_names[3] == "fake/b#r0"
    assert batch.sources == ["fake"] * 3
    assert batch.num_images == 3
    assert batch.num_regions == 6
    assert [skip.sample_id for skip in batch.skipped] == ["bad"]


def _views(samples: list[RegionSample]) -> list[np.ndarray]:
    return [view for s in samples for view in (s.image, s.target_image) if view is not None]


def test_captions_are_chosen_by_the_generator_alone() -> None:
    sample = make_sample(num_regions=2)
    chosen = {tuple(prepare_sample(sample, SMALL, np.random.default_rng(seed), 0, 0).captions) for seed in range(30)}
    assert chosen == {("first 0", None), ("second 0", None)}
    assert prepare_sample(sample, SMALL, np.random.default_rng(0), 0, 0).references == list(sample.captions)
    once = [prepare_sample(sample, SMALL, sample_rng(3, 9), 3, 9).captions for _ in range(2)]
    assert once[0] == once[1]


def test_a_small_region_keeps_one_cell_and_says_so() -> None:
    masks = np.zeros((1, 40, 60), dtype=bool)
    masks[0, 20, 30] = True
    sample = dataclasses.replace(make_sample(num_regions=1), masks=masks)
    prepared = prepare(sample, dataclasses.replace(SMALL, target_pooling="nearest"))  # as area it would vanish
    assert prepared.prompt_masks.sum() == 1
    assert prepared.prompt_masks[0, 2, 2]
    assert prepared.grid_rescued.tolist() == [True]


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_region_seeds_fit_int64_and_differ_by_every_part() -> None:
    seeds = [region_seed(seed, slot, position) for seed in (0, 1) for slot in (0, 1, "0") for position in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= value < 2**63 for value in seeds)
    assert torch.tensor(seeds, dtype=torch.int64).tolist() == seeds


def test_evaluation_batches_do_not_depend_on_the_split() -> None:
    samples = [make_sample(name) for name in ("a", "bb", "ccc", "dddd")]
    whole = batch_from_samples(samples, SMALL, seed=5)
    halves = [batch_from_samples(samples[:2], SMALL, seed=5), batch_from_samples(samples[2:], SMALL, seed=5)]
    assert whole.region_seeds.tolist() == [s for half in halves for s in half.region_seeds.tolist()]
    assert whole.references == [texts for half in halves for texts in half.references]
    assert whole.captions == [c for half in halves for c in half.captions]
    assert len(set(whole.region_seeds.tolist())) == whole.num_regions
    assert batch_from_samples(samples, SMALL, seed=6).region_seeds.tolist() != whole.region_seeds.tolist()


# --- refusals ------------------------------------------------------------------------------------------------------


def lost_region() -> RegionSample:
    masks = np.zeros((2, 40, 60), dtype=bool)
    masks[0, :20] = True
    masks[1, 1, 1] = True  # between the source pixels that 8 x 8 reads
    return dataclasses.replace(make_sample(), masks=masks)


def test_a_target_without_a_pixel_is_passed_over_in_training_and_kept_in_evaluation() -> None:
    batch = prepare(lost_region())
    assert batch.region_names == ["fake/a#r0"]
    assert [(one.region_id, one.reason) for one in batch.passed_over] == [("r1", "target_vanished")]
    lost = lost_region()
    alone = dataclasses.replace(lost, masks=lost.masks[1:], region_ids=("r1",), captions=lost.captions[1:])
    with pytest.raises(SampleError, match=r"fake/a#r1.*1 pixels of 40 x 60") as caught:
        prepare(alone)
    assert caught.value.reason == "target_vanished"
    batch = batch_from_samples([lost_region()], SMALL)
    assert not batch.binary_targets[1].any()
    assert batch.prompt_masks[1].sum() == 1


@pytest.mark.parametrize("pooling", ["area", "nearest"])
def test_a_mask_vanishes_exactly_where_its_target_has_no_pixel(pooling: str) -> None:
    sizes, rng = dataclasses.replace(SMALL, target_pooling=pooling), np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        mask = np.zeros((40, 60), bool)
        top, left, height, width = rng.integers((38, 58, 12, 14))
        box = mask[top : top + height + 1, left : left + width + 1]
        box[:] = rng.random(box.shape) < rng.choice([0.3, 1.0])
        mask[top, left] = True
        seen.add(sizes.vanishes(mask))
        assert sizes.vanishes(mask) == bool(resize_targets(mask[None], 8, pooling).amax() < 0.5)
    assert seen == {True, False}


@pytest.mark.parametrize(
    "text", ["a <p>red</p> box", "the [SEG] sign", "<IMG_CONTEXT>", "<IMG> box", "ends <|im_end|>"]
)
def test_a_caption_with_a_marker_is_passed_over_by_name(text: str) -> None:
    sample = make_sample()
    captions = (("fine",), ("also fine", text), *sample.captions[2:])
    batch = prepare(dataclasses.replace(sample, captions=captions))
    assert len(batch.region_names) == sample.num_regions - 1
    [marked] = batch.passed_over
    assert (marked.region_id, marked.reason) == (sample.region_ids[1], "special_token")
    assert "fake/a#" in marked.message


SAMPLE = make_sample()
BROKEN = {
    "float image": ({"image": SAMPLE.image.astype(np.float32)}, "invalid_sample"),
    "grey image": ({"image": SAMPLE.image[..., 0]}, "invalid_sample"),
    "integer masks": ({"masks": SAMPLE.masks.astype(np.uint8)}, "invalid_sample"),
    "masks of another size": ({"masks": SAMPLE.masks[:, :-1]}, "invalid_sample"),
    "no region": ({"masks": SAMPLE.masks[:0], "region_ids": (), "captions": ()}, "invalid_sample"),
    "names do not fit": ({"region_ids": ("r0",)}, "invalid_sample"),
    "captions do not fit": ({"captions": ((),)}, "invalid_sample"),
    "half a pair": ({"target_image": SAMPLE.image}, "invalid_sample"),
    "target masks of another size": (
        {"target_image": SAMPLE.image[:-2], "target_masks": SAMPLE.masks},
        "invalid_sample",
    ),
    "empty mask": ({"masks": np.zeros_like(SAMPLE.masks)}, "empty_mask"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_sample_that_breaks_the_contract_is_refused(name: str) -> None:
    changes, reason = BROKEN[name]
    with pytest.raises(SampleError, match="fake/a") as caught:
        prepare(dataclasses.replace(SAMPLE, **changes))
    assert caught.value.reason == reason


def test_misuse_by_the_caller_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([])

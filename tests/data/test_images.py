"""JPEGs decoded at the scale that is needed: nothing but the pixels may differ, and those only as by resampling."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from dual_loop.config import Config, DataConfig
from dual_loop.data import images
from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.dataset_builder import build_dataset
from dual_loop.data.images import Picture, read_picture
from dual_loop.data.leakage import Subset
from dual_loop.data.masks_dir import MasksDir
from dual_loop.data.mixture import DrawKey
from dual_loop.data.prepare import IMAGENET_STD, Geometry, prepare_sample
from dual_loop.data.sa1b import Sa1b
from dual_loop.errors import SampleError
from dual_loop.types import Batch, RegionSample

GEOMETRY = Geometry(vision_image_size=56, grid_size=4, grounding_size=64, mask_size=16)
SIZE = (275, 331)
"""Odd sides, four times the grounding size: decoded at a quarter, with a last row and column of three pixels."""


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a smooth picture with waves of a few pixels on it, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 216, (8, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
    rows, columns = np.mgrid[:height, :width]
    waves = 12 * np.sin(rows / 1.7) * np.sin(columns / 2.3)
    return np.clip(smooth + waves[:, :, None], 0, 255).astype(np.uint8)


def boxes(count: int = 5) -> list[np.ndarray]:
    masks = []
    for number in range(count):
        mask = np.zeros(SIZE, bool)
        mask[20 * number : 20 * number + 90, 30 * number : 30 * number + 101] = True
        masks.append(mask)
    return masks


@pytest.fixture
def sa1b(tmp_path: Path) -> Sa1b:
    folder = tmp_path / "sa1b"
    folder.mkdir()
    annotations = [{"id": k, "segmentation": encode_rle(mask)} for k, mask in enumerate(boxes())]
    for number in range(3):
        Image.fromarray(textured(*SIZE, number)).save(folder / f"sa_{number}.jpg", quality=95)
        (folder / f"sa_{number}.json").write_text(json.dumps({"image": {}, "annotations": annotations}))
    return Sa1b(folder, regions_per_image=2, index_dir=tmp_path / "index")


@pytest.fixture
def own_masks(tmp_path: Path) -> MasksDir:
    folder = tmp_path / "own"
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(3):
        Image.fromarray(textured(*SIZE, number)).save(folder / "images" / f"{number}.jpg", quality=95)
        for k, mask in enumerate(boxes()):
            region = {"image": f"images/{number}.jpg", "segmentation": encode_rle(mask), "id": f"{k}", "caption": "x"}
            lines.append(json.dumps(region))
    (folder / "masks.jsonl").write_text("\n".join(lines))
    return MasksDir(folder, regions_per_image=2, index_dir=tmp_path / "index")


def prepared(sample: RegionSample, geometry: Geometry) -> Batch:
    return prepare_sample(sample, geometry, np.random.default_rng(1), 0, 0)


def mean_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.double() - second.double()).abs().mean())


@pytest.mark.parametrize("kind", ["sa1b", "own_masks"])
@pytest.mark.parametrize("max_tiles", [1, 4])
def test_only_pixels_differ_and_only_by_resampling(request, kind, max_tiles):
    source = request.getfixturevalue(kind)
    geometry = dataclasses.replace(GEOMETRY, max_tiles=max_tiles)
    for index in range(3):
        full = source.load(index, np.random.default_rng(index))
        reduced = source.load_reduced(index, np.random.default_rng(index), geometry.needed_size)
        # Two by two tiles need 112 rows: a half of 275 has them, a quarter has not.
        assert (full.image_reduction, reduced.image_reduction) == (1, 4 if max_tiles == 1 else 2)
        assert np.array_equal(full.masks, reduced.masks)
        assert full.region_ids == reduced.region_ids
        one, other = prepared(full, geometry), prepared(reduced, geometry)
        for name in ("prompt_masks", "grid_rescued", "target_masks"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert (one.captions, one.region_names) == (other.captions, other.region_names)
        assert one.tiles_per_view == other.tiles_per_view
        assert mean_difference(one.g_pixel_values, other.g_pixel_values) < 1.5
        deviation = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
        assert mean_difference(one.pixel_values * deviation * 255, other.pixel_values * deviation * 255) < 1.5


def test_the_whole_area_is_shown_where_sides_do_not_divide(tmp_path):
    # 73 columns at an eighth are 10, of which the last shows one column only.
    ramp = np.repeat(np.linspace(0, 240, 73).astype(np.uint8)[None, :], 73, axis=0)
    Image.fromarray(np.repeat(ramp[:, :, None], 3, 2)).save(tmp_path / "ramp.jpg", quality=100, subsampling=0)
    full = read_picture(tmp_path / "ramp.jpg", apply_exif=False)
    reduced = read_picture(tmp_path / "ramp.jpg", apply_exif=False, needed=lambda height, width: (9, 9))
    assert (reduced.pixels.shape, reduced.size, reduced.reduction) == ((10, 10, 3), (73, 73), 8)
    expected = full.resized(9, 9).astype(int)
    naive = Picture(reduced.pixels, (10, 10)).resized(9, 9).astype(int)
    assert np.abs(reduced.resized(9, 9) - expected).mean() < 1.0 < np.abs(naive - expected).mean()


@pytest.mark.parametrize(
    ("name", "needed", "expected"),
    [
        ("a.jpg", (275, 331), 1),
        ("a.jpg", (138, 160), 1),  # 275 is not twice 138
        ("a.jpg", (137, 165), 2),
        ("a.jpg", (40, 40), 4),  # six times larger: a quarter, as there is no sixth
        ("a.jpg", (1, 1), 8),
        ("a.png", (40, 40), 1),
        ("grey.jpg", (40, 40), 4),
        ("cmyk.jpg", (40, 40), 4),
    ],
)
def test_the_smallest_scale_that_is_large_enough(tmp_path, name, needed, expected):
    image = Image.fromarray(textured(*SIZE))
    modes = {"grey.jpg": "L", "cmyk.jpg": "CMYK"}
    image.convert(modes.get(name, "RGB")).save(tmp_path / name)
    picture = read_picture(tmp_path / name, apply_exif=False, needed=lambda height, width: needed)
    assert (picture.size, picture.reduction) == (SIZE, expected)
    assert picture.pixels.shape == (-(-SIZE[0] // expected), -(-SIZE[1] // expected), 3)
    full = read_picture(tmp_path / name, apply_exif=False)
    difference = picture.resized(20, 20).astype(int) - full.resized(20, 20).astype(int)
    assert np.abs(difference).mean() < 1.5


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1", "grey"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 20, "optimize": True}])
def test_the_fast_decoder_gives_the_pixels_of_pillow(tmp_path, monkeypatch, subsampling, options):
    """Equal where both were built with the same libjpeg-turbo; other versions may round otherwise, by a few values."""
    simplejpeg = pytest.importorskip("simplejpeg")
    decoded = []
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda *a, _own=simplejpeg.decode_jpeg, **k: decoded.append(k) or _own(*a, **k)
    )
    for size, least in itertools.product([(275, 331), (64, 64), (9, 15)], [1, 2, 4, 8]):
        image = Image.fromarray(textured(*size))
        path = tmp_path / "image.jpg"
        kind = {} if subsampling == "grey" else {"subsampling": subsampling}
        (image.convert("L") if subsampling == "grey" else image).save(path, **kind, **options)
        both = []
        for decoder in (simplejpeg, None):
            monkeypatch.setattr(images, "simplejpeg", decoder)
            both.append(read_picture(path, False, needed=lambda h, w, k=least: (max(1, h // k), max(1, w // k))))
        assert (both[0].size, both[0].reduction) == (both[1].size, both[1].reduction)
        difference = np.abs(both[0].pixels.astype(int) - both[1].pixels)
        assert difference.max() <= (0 if features.version("libjpeg_turbo") == "3.1.4.1" else 8)
    assert len(decoded) == 3, "at full scale alone: at a smaller one Pillow is as fast"


def test_the_fast_decoder_leaves_to_pillow_what_is_not_plain(tmp_path, monkeypatch):
    image = Image.fromarray(textured(*SIZE))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.png")
    for name in ("cmyk.jpg", "turned.jpg", "plain.png"):
        with_it = read_picture(tmp_path / name, apply_exif=True)
        with monkeypatch.context() as patch:
            patch.setattr(images, "simplejpeg", None)
            assert np.array_equal(with_it.pixels, read_picture(tmp_path / name, apply_exif=True).pixels)


def test_turned_images_are_decoded_in_full_and_damage_is_still_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(textured(*SIZE)).save(tmp_path / "turned.jpg", exif=exif)
    turned = read_picture(tmp_path / "turned.jpg", apply_exif=True, needed=lambda height, width: (8, 8))
    assert (turned.size, turned.reduction, turned.pixels.shape) == (SIZE[::-1], 1, (*SIZE[::-1], 3))
    data = (tmp_path / "turned.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(SampleError) as error:
        read_picture(tmp_path / "cut.jpg", apply_exif=False, needed=lambda height, width: (8, 8))
    assert error.value.reason == "truncated_file"


def test_training_reduces_only_where_it_is_told_and_never_what_is_read_again(sa1b, monkeypatch):
    seen: list[int] = []
    load = Sa1b.load_reduced

    def counted(self, *args):
        sample = load(self, *args)
        seen.append(sample.image_reduction)
        return sample

    monkeypatch.setattr(Sa1b, "load_reduced", counted)
    key = DrawKey(source_index=0, entry=0, draw=0, slot=0)
    for scale, expected in (("full", 1), ("needed", 4)):
        dataset = build_dataset(Config(data=DataConfig(decode_scale=scale)), GEOMETRY, [Subset(sa1b, [0, 1])])
        dataset[key]
        assert seen.pop() == expected
        assert dataset.sample(key).image.shape == (*SIZE, 3)
        assert seen.pop() == 1


def test_an_image_that_does_not_fit_its_reduction_is_refused(sa1b):
    sample = sa1b.load_reduced(0, np.random.default_rng(0), GEOMETRY.needed_size)
    for wrong in (dataclasses.replace(sample, image_reduction=2), dataclasses.replace(sample, image_reduction=1)):
        with pytest.raises(SampleError) as error:
            prepared(wrong, GEOMETRY)
        assert error.value.reason == "invalid_sample"

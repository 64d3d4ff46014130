"""What the values of a mask file mean: objects by their names, or a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dual_loop.data.mask_files import read_mask
from dual_loop.errors import SampleError

SHAPE = (40, 60)


def box(y1: int, x1: int, y2: int, x2: int) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[y1:y2, x1:x2] = True
    return mask


LEFT, RIGHT = box(8, 8, 24, 24), box(8, 32, 32, 56)
BORDER = box(6, 6, 26, 26) & ~LEFT


def objects(path: Path, void: int | None = 255) -> dict[str, int]:
    found = read_mask(path, void)
    return {name: int(found.mask(label).sum()) for name, label in found.labels.items()}


def grey(path: Path, values: np.ndarray, dtype: type = np.uint8) -> Path:
    Image.fromarray(values.astype(dtype)).save(path)
    return path


ONE = {"": int(LEFT.sum())}
TWO = {"1": int(LEFT.sum()), "2": int(RIGHT.sum())}


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        (LEFT * 1, np.uint8, ONE),
        (LEFT * 255, np.uint8, ONE),
        (LEFT, bool, ONE),
        (LEFT * 1 + RIGHT * 2, np.uint8, TWO),
        (LEFT * 1 + RIGHT * 2 + BORDER * 255, np.uint8, TWO),
        (LEFT * 1 + BORDER * 255, np.uint8, ONE),
        (LEFT * 65535, np.uint16, ONE),
        (LEFT * 255 + RIGHT * 300, np.uint16, {"255": TWO["1"], "300": TWO["2"]}),
        (LEFT * 1 + RIGHT * 2 + BORDER * 65535, np.uint16, TWO),
        (LEFT * 0, np.uint8, {"": 0}),
    ],
)
def test_grey_masks_of_8_and_16_bits(tmp_path: Path, values: np.ndarray, dtype: type, expected: dict[str, int]) -> None:
    assert objects(grey(tmp_path / "a.png", values, dtype)) == expected
    np.save(tmp_path / "a.npy", values.astype(dtype))
    assert objects(tmp_path / "a.npy") == expected


def test_void_is_an_object_where_it_is_asked_for(tmp_path: Path) -> None:
    path = grey(tmp_path / "a.png", LEFT * 1 + RIGHT * 2 + BORDER * 255)
    assert objects(path, None) == TWO | {"255": int(BORDER.sum())}
    palette = Image.fromarray((LEFT * 1 + RIGHT * 2 + BORDER * 255).astype(np.uint8))
    palette.putpalette([k for k in range(256) for _ in range(3)])
    palette.save(tmp_path / "p.png")
    assert objects(tmp_path / "p.png") == TWO
    assert objects(tmp_path / "p.png", None) == TWO | {"255": int(BORDER.sum())}


@pytest.mark.parametrize("radius", [0.7, 2, 4])
def test_soft_edges_are_cut_at_half(tmp_path: Path, radius: float) -> None:
    image = Image.fromarray((LEFT * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    for name in ("a.png", "b.tif", "c.bmp"):
        image.save(tmp_path / name)
        assert objects(tmp_path / name) == {"": int((np.asarray(image) >= 128).sum())}
    np.save(tmp_path / "a.npy", np.asarray(image, np.float32) / 255)
    assert objects(tmp_path / "a.npy") == {"": int((np.asarray(image) >= 127.5).sum())}


def test_jpeg_and_webp_masks(tmp_path: Path) -> None:
    image = Image.fromarray((LEFT * 255).astype(np.uint8))
    image.save(tmp_path / "a.jpg", quality=70)
    image.convert("RGB").save(tmp_path / "b.jpg", quality=70)
    image.convert("RGB").save(tmp_path / "c.webp", lossless=True)
    for name in ("a.jpg", "b.jpg", "c.webp"):
        assert objects(tmp_path / name) == ONE
    Image.fromarray(LEFT.astype(np.uint8)).save(tmp_path / "dark.jpg")
    assert objects(tmp_path / "dark.jpg") == {"": 0}


def test_colours_are_labels_and_alpha_is_background(tmp_path: Path) -> None:
    colours = np.zeros((*SHAPE, 4), np.uint8)
    colours[LEFT], colours[RIGHT] = (255, 0, 0, 255), (0, 128, 0, 255)
    expected = {"ff0000": TWO["1"], "008000": TWO["2"]}
    Image.fromarray(colours[..., :3]).save(tmp_path / "rgb.png")
    assert objects(tmp_path / "rgb.png") == expected
    Image.fromarray(colours).save(tmp_path / "rgba.png")
    assert objects(tmp_path / "rgba.png") == expected
    colours[BORDER] = (224, 224, 192, 255)
    Image.fromarray(colours[..., :3]).save(tmp_path / "voc.png")
    assert objects(tmp_path / "voc.png") == expected
    for colour in ((255, 255, 255), (0, 0, 0)):
        flat = np.zeros((*SHAPE, 4), np.uint8)
        flat[..., :3], flat[..., 3] = colour, LEFT * 255
        Image.fromarray(flat).save(tmp_path / "alpha.png")
        assert objects(tmp_path / "alpha.png") == ONE
    photograph = np.random.default_rng(0).integers(0, 256, (*SHAPE, 4), dtype=np.uint8)
    photograph[..., 3] = LEFT * 255
    Image.fromarray(photograph).save(tmp_path / "cut_out.png")
    assert objects(tmp_path / "cut_out.png") == ONE
    opaque = np.full((*SHAPE, 2), 255, np.uint8)
    opaque[..., 0] = LEFT * 255
    Image.fromarray(opaque).save(tmp_path / "la.png")
    assert objects(tmp_path / "la.png") == ONE


def test_planes_are_objects(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.stack([LEFT, RIGHT | LEFT]))
    assert objects(tmp_path / "a.npy") == {"1": TWO["1"], "2": TWO["1"] + TWO["2"]}
    np.save(tmp_path / "b.npy", LEFT[None, :, :, None])
    assert objects(tmp_path / "b.npy") == ONE


NOISE = np.random.default_rng(0).integers(0, 256, SHAPE)


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("tones.png", (LEFT * 255 + RIGHT * 100).astype(np.uint8), "ambiguous_mask"),
        ("dark.jpg", (LEFT * 90).astype(np.uint8), "ambiguous_mask"),
        ("photo.png", np.stack([NOISE, NOISE.T.reshape(SHAPE), 255 - NOISE], -1).astype(np.uint8), "ambiguous_mask"),
        ("photo.npy", np.arange(2400 * 3).reshape(SHAPE[0], -1), "ambiguous_mask"),
        ("scale.npy", np.linspace(-3, 3, 2400).reshape(SHAPE), "ambiguous_mask"),
        ("nan.npy", np.full(SHAPE, np.nan), "ambiguous_mask"),
        ("text.npy", np.full(SHAPE, "a"), "not_an_image"),
        ("line.npy", np.ones(9), "not_an_image"),
        ("empty.npy", np.ones((0, 9)), "too_large"),
    ],
)
def test_what_could_be_either_or_is_no_mask_is_refused(
    tmp_path: Path, name: str, values: np.ndarray, reason: str
) -> None:
    path = tmp_path / name
    np.save(path, values) if path.suffix == ".npy" else Image.fromarray(values).save(path)
    with pytest.raises(SampleError, match=path.stem) as caught:
        read_mask(path)
    assert caught.value.reason == reason


def test_an_array_that_claims_more_than_there_is_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, LEFT)
    path.write_bytes(path.read_bytes().replace(b"(40, 60)", b"(4000, 6000)").replace(b"    \n", b"\n"))
    with pytest.raises(SampleError):
        read_mask(path)
    path.write_bytes(b"")
    with pytest.raises(SampleError):
        read_mask(path)

"""Masks: run-length codes against pycocotools, polygons, files, resizing, pooling, paths."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask

from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.images import foreground_of, open_image_file, read_picture
from dual_loop.data.masks import (
    MAX_PIXELS,
    area_fractions,
    check_mask,
    decode_rle,
    decode_segmentation,
    fit_mask,
    pool_mask_to_grid,
    resize_mask,
    safe_join,
)
from dual_loop.errors import ConfigError, SampleError

any_mask = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(0, 3))


def reason_of(call) -> str:
    with pytest.raises(SampleError) as caught:
        call()
    return caught.value.reason


def decode_or_reason(rle: dict) -> tuple[np.ndarray | None, str | None]:
    try:
        return decode_rle(rle, "here"), None
    except SampleError as error:
        return None, error.reason


# --- run-length codes ------------------------------------------------------------------------------------------------


@given(any_mask)
def test_encode_then_decode_returns_the_foreground(mask: np.ndarray) -> None:
    rle = encode_rle(mask)
    assert isinstance(rle["counts"], str)
    assert rle["size"] == list(mask.shape)
    decoded = decode_rle(rle, "here")
    assert decoded.dtype == np.bool_
    assert np.array_equal(decoded, mask > 0)
    as_bytes = {"size": rle["size"], "counts": rle["counts"].encode()}
    assert np.array_equal(decode_rle(as_bytes, "here"), coco_mask.decode(as_bytes) > 0)


@given(any_mask)
def test_uncompressed_counts_give_the_same_mask(mask: np.ndarray) -> None:
    flat = (mask > 0).T.flatten().astype(int)
    changes = np.flatnonzero(np.diff(np.concatenate(([0], flat))))
    counts = np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()
    assert np.array_equal(decode_rle({"size": list(mask.shape), "counts": counts}, "here"), mask > 0)


def test_large_mask_with_long_runs_round_trips() -> None:
    mask = np.zeros((1500, 2250), bool)
    mask[700:1400, 3:2200] = True
    mask[0, 0] = True
    assert np.array_equal(decode_rle(encode_rle(mask), "here"), mask)


@settings(max_examples=300)
@given(any_mask, st.integers(0, 10_000), st.characters(min_codepoint=33, max_codepoint=126), st.integers(0, 2))
def test_a_damaged_string_is_refused_or_decodes_as_pycocotools_does(
    mask: np.ndarray, position: int, character: str, kind: int
) -> None:
    rle = encode_rle(mask)
    text = rle["counts"]
    at = position % len(text)
    damaged = [text[:at], text[:at] + character + text[at + 1 :], text[:at] + character + text[at:]][kind]
    rle["counts"] = damaged
    decoded, reason = decode_or_reason(rle)
    assert reason in (None, "broken_rle")
    if decoded is not None:  # our check says that it is sound, so it is safe to ask the reference
        assert np.array_equal(decoded, coco_mask.decode({"size": rle["size"], "counts": damaged.encode()}) > 0)


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_garbage_counts_never_pass_as_a_mask_of_another_size(garbage: bytes) -> None:
    decoded, reason = decode_or_reason({"size": [7, 9], "counts": garbage})
    assert reason in (None, "broken_rle")
    assert decoded is None or decoded.shape == (7, 9)


@pytest.mark.parametrize(
    "rle",
    [
        {},
        {"size": [2, 2]},
        {"size": [2, 2], "counts": [1, 2]},
        {"size": [2, 2], "counts": [5, -1]},
        {"size": [2, 2], "counts": [2.5, 1.5]},
        {"size": [2, 2], "counts": [True, 3]},
        {"size": [2, 2], "counts": None},
        {"size": [2, 2], "counts": ""},
        {"size": [2, 2], "counts": []},
        {"size": [2, 2], "counts": "é"},
        {"size": [2, 2], "counts": "PPP"},
        {"size": [2, 2], "counts": "P" * 20 + "0"},
        {"size": [0, 2], "counts": "0"},
        {"size": ["2", 2], "counts": "4"},
        {"size": [2, 2, 2], "counts": "8"},
        {"size": [MAX_PIXELS, 2], "counts": [2 * MAX_PIXELS]},
        "not a mapping",
    ],
)
def test_broken_codes_name_their_reason_and_place(rle: object) -> None:
    with pytest.raises(SampleError, match=r"sa_1\.json") as caught:
        decode_rle(rle, "sa_1.json")  # type: ignore[arg-type]
    assert caught.value.reason == "broken_rle"
    assert pickle.loads(pickle.dumps(caught.value)).reason == "broken_rle"


# --- polygons --------------------------------------------------------------------------------------------------------


def test_segmentation_takes_both_run_length_forms() -> None:
    mask = np.zeros((5, 4), bool)
    mask[1:3, 2] = True
    assert np.array_equal(decode_segmentation(encode_rle(mask), 5, 4, "here"), mask)
    assert np.array_equal(decode_segmentation({"size": [5, 4], "counts": [11, 2, 7]}, 5, 4, "here"), mask)
    assert reason_of(lambda: decode_segmentation(encode_rle(mask), 4, 5, "here")) == "size_mismatch"


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "jpg"), ("LA", "png"), ("P", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("RGB", "png"), ("1", "png")],
)
def test_every_mode_is_read_as_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    colour = Image.new("RGB", (6, 4), (255, 255, 255))
    path = tmp_path / f"image.{suffix}"
    colour.convert(mode).save(path)
    image = read_picture(path, apply_exif=False).pixels
    assert image.shape == (4, 6, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - 255).max() <= 6


def test_sixteen_bit_grey_keeps_its_upper_byte(tmp_path: Path) -> None:
    values = np.array([[0, 256, 65535], [32768, 255, 1000]], np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    image = read_picture(tmp_path / "grey.png", apply_exif=False).pixels
    assert image[:, :, 0].tolist() == [[0, 1, 255], [128, 0, 3]]
    assert (image == image[:, :, :1]).all()


def test_exif_orientation_only_when_asked(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg", apply_exif=False).pixels.shape == (4, 6, 3)
    assert read_picture(tmp_path / "turned.jpg", apply_exif=True).pixels.shape == (6, 4, 3)


@pytest.mark.parametrize(
    "read", [lambda p: read_picture(p, apply_exif=False), lambda p: foreground_of(open_image_file(p))]
)
def test_bad_files_have_distinct_reasons(tmp_path: Path, read) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for suffix in ("jpg", "png"):
        whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
        noise.save(whole)
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        assert reason_of(lambda cut=cut: read(cut)) == "truncated_file"
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    Image.new("F", (2, 2)).save(tmp_path / "float.tiff")
    assert reason_of(lambda: read(tmp_path / "empty.jpg")) == "truncated_file"
    assert reason_of(lambda: read(tmp_path / "text.jpg")) == "not_an_image"
    assert reason_of(lambda: read(tmp_path)) == "not_an_image"
    assert reason_of(lambda: read(tmp_path / "absent.jpg")) == "missing_file"
    assert reason_of(lambda: read_picture(tmp_path / "float.tiff", apply_exif=False).pixels) == "not_an_image"


def test_masks_are_true_above_zero_in_any_mode(tmp_path: Path) -> None:
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    palette = Image.fromarray(mask.astype(np.uint8), mode="P")
    palette.putpalette([255, 255, 255, 0, 0, 0])  # background white: the index counts, not the colour
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[..., 3] = 255
    rgba[mask, 2] = 9
    images = {
        "one": Image.fromarray(mask),
        "grey": Image.fromarray(mask.astype(np.uint8)),
        "wide": Image.fromarray(mask.astype(np.uint16) * 3),
        "palette": palette,
        "rgba": Image.fromarray(rgba),
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        read = foreground_of(open_image_file(tmp_path / f"{name}.png"))
        assert read.dtype == np.bool_
        assert np.array_equal(read, mask), name


@pytest.mark.parametrize("bad", ["", "/etc/passwd", "../x", "a/../../x", "C:\\x", "..\\x", "a\0b", ".", ".."])
def test_paths_that_leave_the_root_are_refused(tmp_path: Path, bad: str) -> None:
    assert reason_of(lambda: safe_join(tmp_path, bad)) == "unsafe_path"


def test_paths_below_the_root_are_joined(tmp_path: Path) -> None:
    assert safe_join(tmp_path, "a/./b/../c.png") == tmp_path / "a" / "c.png"
    assert safe_join(tmp_path, "..hidden/x") == tmp_path / "..hidden" / "x"


# --- arrays ----------------------------------------------------------------------------------------------------------


@given(any_mask, st.integers(1, 50), st.integers(1, 50))
def test_resize_follows_the_stated_rule(mask: np.ndarray, height: int, width: int) -> None:
    resized = resize_mask(mask, (height, width))
    assert resized.shape == (height, width)
    for row in range(height):
        for column in {0, width // 2, width - 1}:
            source = (
                int((row + 0.5) * mask.shape[0] / height + 1e-9),
                int((column + 0.5) * mask.shape[1] / width + 1e-9),
            )
            assert resized[row, column] == mask[source]
    assert np.array_equal(resize_mask(mask[None], (height, width))[0], resized)


def test_resize_is_the_identity_and_undoes_integer_enlargement() -> None:
    mask = np.random.default_rng(1).random((7, 11)) > 0.5
    assert np.array_equal(resize_mask(mask, (7, 11)), mask)
    assert np.array_equal(resize_mask(resize_mask(mask, (21, 33)), (7, 11)), mask)


def test_fit_mask_bridges_two_pixels_and_no_more() -> None:
    mask = np.ones((480, 853), bool)
    assert fit_mask(mask, (480, 854), "judo").shape == (480, 854)
    assert fit_mask(mask, (480, 853), "judo") is mask
    assert reason_of(lambda: fit_mask(mask, (480, 856), "judo")) == "size_mismatch"
    assert reason_of(lambda: fit_mask(mask, (483, 853), "judo")) == "size_mismatch"


def test_an_empty_mask_is_refused() -> None:
    mask = np.zeros((10, 10), bool)
    assert reason_of(lambda: check_mask(mask, "here")) == "empty_mask"
    mask[0, 0] = True
    check_mask(mask, "here")


# --- the prompt grid -------------------------------------------------------------------------------------------------


def exact_cover(mask: np.ndarray, grid_size: int) -> np.ndarray:
    """Covered share of each cell the slow way: enlarge G times, so that cells are whole numbers of pixels."""
    fine = np.repeat(np.repeat(mask, grid_size, 0), grid_size, 1)
    height, width = mask.shape
    return fine.reshape(grid_size, height, grid_size, width).sum((1, 3)) / (height * width)


@settings(max_examples=60)
@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 37), st.integers(1, 37))), st.sampled_from([1, 4, 7, 16]))
def test_area_pooling_is_exact_and_never_leaves_nothing(mask: np.ndarray, grid_size: int) -> None:
    if not mask.any():
        assert reason_of(lambda: pool_mask_to_grid(mask[None], grid_size)) == "empty_mask"
        return
    grid, rescued = pool_mask_to_grid(mask[None], grid_size)
    cover = exact_cover(mask, grid_size)
    kept = cover >= 0.5
    if kept.any():
        assert np.array_equal(grid[0].numpy(), kept)
        assert not rescued[0]
    else:
        assert rescued[0]
        assert grid[0].flatten().nonzero().flatten().tolist() == [int(cover.argmax())]


@settings(max_examples=60)
@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 37), st.integers(1, 37))), st.sampled_from([1, 4, 7, 16]))
def test_area_fractions_keep_the_area_and_the_centre(mask: np.ndarray, size: int) -> None:
    if not mask.any():
        with pytest.raises(SampleError, match="empty"):
            area_fractions(mask[None], size)
        return
    fractions = area_fractions(mask[None], size)[0].double().numpy()
    assert fractions.min() >= 0
    assert fractions.max() <= 1
    assert fractions.mean() == pytest.approx(mask.mean(), abs=1e-6)

    def centre(weights: np.ndarray) -> list[float]:
        """In 0..1, by the exact integral over each cell."""
        sides = [(np.arange(count) + 0.5) / count for count in weights.shape]
        return [float((weights.sum(1 - axis) @ sides[axis]) / weights.sum()) for axis in range(2)]

    # Within a cell, mass may be anywhere: a cell's middle stands for it.
    assert centre(fractions) == pytest.approx(centre(mask.astype(float)), abs=0.5 / size + 1e-6)


def test_area_fractions_do_not_move_an_object_as_the_corner_does() -> None:
    """A square in the middle of 40 x 40, on 8 x 8: its edges cut cells in half; the corner rule drops two of them."""
    mask = np.zeros((1, 40, 40), dtype=bool)
    mask[:, 12:28, 12:28] = True
    side = torch.tensor([0, 0, 0.6, 1, 1, 0.6, 0, 0])
    torch.testing.assert_close(area_fractions(mask, 8)[0], side[:, None] * side)
    corner = torch.nn.functional.interpolate(torch.from_numpy(mask[None]).float(), (8, 8), mode="nearest")[0, 0]
    assert corner[0:8, 3].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]


@settings(max_examples=60)
@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 50), st.integers(1, 50))))
def test_nearest_pooling_is_torch_interpolate_plus_rescue(mask: np.ndarray) -> None:
    if not mask.any():
        return
    expected = torch.nn.functional.interpolate(torch.from_numpy(mask)[None, None].float(), (16, 16), mode="nearest")
    grid, rescued = pool_mask_to_grid(torch.from_numpy(mask)[None], mode="nearest")
    assert bool(rescued[0]) == (not bool(expected.any()))
    if expected.any():
        assert torch.equal(grid[0], expected[0, 0] > 0)
    else:
        assert grid[0].flatten().nonzero().flatten().tolist() == [int(exact_cover(mask, 16).argmax())]


def test_a_tiny_object_keeps_its_cell_and_is_counted() -> None:
    masks = torch.zeros(3, 448, 448, dtype=torch.bool)
    masks[0, 100:104, 200:204] = True
    masks[1, :224] = True
    masks[2, 55:57, 55:57] = True  # covers four cells equally and holds the sampling point of cell (2, 2)
    for mode, third_rescued, third_cell in (("area", True, [1, 1]), ("nearest", False, [2, 2])):
        grid, rescued = pool_mask_to_grid(masks, mode=mode)
        assert grid.shape == (3, 16, 16)
        assert rescued.tolist() == [True, False, third_rescued], mode
        assert grid[0].nonzero().tolist() == [[3, 7]]
        assert grid[1].sum() == 128
        assert grid[2].nonzero().tolist() == [third_cell]


def test_a_cell_that_is_exactly_half_covered_is_kept() -> None:
    mask = np.zeros((1, 30, 45), np.float32)  # 30 and 45 are no multiples of 16
    mask[0, :15] = 1.0
    grid, rescued = pool_mask_to_grid(mask)
    assert grid[0].sum() == 128
    assert not rescued[0]
    one_cell, _ = pool_mask_to_grid(np.array([[[1, 0]]], np.uint8), grid_size=1)
    assert bool(one_cell[0, 0, 0])


def test_pooling_a_large_batch_stays_small_and_empty_batches_pass() -> None:
    masks = np.zeros((32, 1500, 2250), bool)
    masks[:, 3:1490, 5:2200] = True
    grid, rescued = pool_mask_to_grid(masks)
    assert bool(grid.all())
    assert not rescued.any()
    grid, rescued = pool_mask_to_grid(torch.zeros(0, 5, 5))
    assert grid.shape == (0, 16, 16)
    assert rescued.shape == (0,)


def test_pooling_refuses_what_it_cannot_mean() -> None:
    mask = torch.ones(1, 4, 4)
    with pytest.raises(ConfigError, match="bilinear"):
        pool_mask_to_grid(mask, mode="bilinear")
    with pytest.raises(ConfigError, match="threshold"):
        pool_mask_to_grid(mask, threshold=0.0)
    with pytest.raises(ValueError, match="wrong shape"):
        pool_mask_to_grid(mask[0])

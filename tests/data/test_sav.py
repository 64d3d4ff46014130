"""SA-V frame pairs: scales by dtype and maximum, damaged files, index and cap."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from dual_loop.data.sav import SavPairs, to_bool_mask, to_uint8_frame
from dual_loop.errors import ConfigError, SampleError
from dual_loop.types import RegionSample

REAL = Path(__file__).resolve().parents[3] / "shared/data/real_samples/sav/npz"
RNG = np.random.default_rng(0)


def make_pair(path: Path, **changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Write a pair whose frames differ in size; a change of None leaves the key out."""
    rng = np.random.default_rng(3)
    mask1, mask2 = np.zeros((12, 20), np.uint8), np.zeros((8, 10), np.uint8)
    mask1[2:6, 3:9] = 1
    mask2[1:3, 1:5] = 255
    arrays = {
        "frame1": rng.integers(0, 256, (12, 20, 3), dtype=np.uint8),
        "mask1": mask1,
        "frame2": rng.integers(0, 256, (8, 10, 3), dtype=np.uint8),
        "mask2": mask2,
    }
    arrays = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return arrays


def reason_of(root: Path, cache: Path) -> str:
    with pytest.raises(SampleError) as caught:
        SavPairs(root, index_dir=cache).load(0, RNG)
    assert "masklet_data_1.npz" in str(caught.value)
    return caught.value.reason


def test_a_pair_loads_with_both_frames(tmp_path: Path) -> None:
    arrays = make_pair(tmp_path / "data/deep/masklet_data_00007.npz")
    source = SavPairs(tmp_path / "data", index_dir=tmp_path / "cache")
    assert (source.name, len(source), source.entry_id(0)) == ("sav", 1, "deep/masklet_data_00007")
    sample = source.load(0, RNG)
    assert np.array_equal(sample.image, arrays["frame1"])
    assert np.array_equal(sample.segmentation_image, arrays["frame2"])
    assert np.array_equal(sample.masks, arrays["mask1"][None] > 0)
    assert np.array_equal(sample.segmentation_masks, arrays["mask2"][None] > 0)
    assert sample.masks.dtype == sample.target_masks.dtype == np.bool_
    assert (sample.region_ids, sample.captions) == (("0",), ((),))
    assert sample.sample_id == source.entry_id(0)


def test_a_file_of_several_frames_is_a_clip_where_it_is_asked_for(tmp_path: Path) -> None:
    third, fourth = np.zeros((8, 10), np.uint8), np.zeros((8, 10), np.uint8)
    fourth[3:6, 2:7] = 255
    frame = np.full((8, 10, 3), 7, np.uint8)
    more = {"frame3": frame, "mask3": third, "frame4": frame + 1, "mask4": fourth, "frame6": frame, "mask6": fourth}
    make_pair(tmp_path / "data/masklet_data_1.npz", **more)
    make_pair(tmp_path / "data/masklet_data_2.npz")

    def read(index: int, frames: int) -> RegionSample:
        return SavPairs(tmp_path / "data", index_dir=tmp_path / "cache", frames=frames).load(index, RNG)

    assert read(0, 2).later_targets == read(0, 3).later_targets == read(1, 4).later_targets == ()
    for frames in (4, 9):  # frame 3 does not show the object; frame 6 stands behind a gap
        [(image, masks)] = read(0, frames).later_targets
        assert np.array_equal(image, frame + 1)
        assert np.array_equal(masks, fourth[None] > 0)
    assert np.array_equal(read(0, 4).target_image, read(0, 2).target_image)
    make_pair(tmp_path / "bad/masklet_data_1.npz", frame3=frame, mask3=fourth[:-1])
    with pytest.raises(SampleError) as caught:
        SavPairs(tmp_path / "bad", index_dir=tmp_path / "cache", frames=3).load(0, RNG)
    assert caught.value.reason == "size_mismatch"
    assert "mask3" in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_scales_are_told_per_array(tmp_path: Path, dtype: type) -> None:
    plain = make_pair(tmp_path / "a/masklet_data_1.npz")
    changes = {
        "frame1": (plain["frame1"] / 255).astype(dtype),
        "frame2": plain["frame2"].astype(dtype),
        "mask1": plain["mask1"].astype(bool),
        "mask2": plain["mask2"].astype(dtype),
    }
    make_pair(tmp_path / "b/masklet_data_1.npz", **changes)
    one, two = (SavPairs(tmp_path / n, index_dir=tmp_path / "cache").load(0, RNG) for n in "ab")
    assert np.array_equal(one.image, two.image)
    assert np.array_equal(one.target_image, two.target_image)
    assert np.array_equal(one.masks, two.masks)
    assert np.array_equal(one.target_masks, two.target_masks)


def test_black_and_dark_frames_keep_their_meaning() -> None:
    dark = np.ones((4, 4, 3), np.uint8)
    assert to_uint8_frame(dark, "x").max() == 1
    assert to_uint8_frame(dark.astype(np.float32), "x").max() == 255
    assert to_uint8_frame(dark.astype(np.int64) * 200, "x").max() == 200
    assert to_uint8_frame(np.zeros((4, 4, 3), np.float32), "x").max() == 0


def test_soft_masks_are_cut_at_half_of_their_scale() -> None:
    assert to_bool_mask(np.array([[0.2, 0.6, 1.0]]), "x").tolist() == [[False, True, True]]
    assert to_bool_mask(np.array([[100, 128, 255]], np.uint8), "x").tolist() == [[False, True, True]]
    assert to_bool_mask(np.zeros((2, 2), np.uint8), "x").sum() == 0


FRAME, MASK = np.zeros((12, 20, 3), np.uint8), np.ones((12, 20), np.uint8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mask2": None}, "missing_key"),
        ({"frame1": None, "mask1": None}, "missing_key"),
        ({"mask1": MASK.T.copy()}, "size_mismatch"),
        ({"mask1": np.zeros((12, 20), np.uint8)}, "empty_mask"),
        ({"mask2": np.zeros((8, 10), np.uint8)}, "empty_mask"),
        ({"frame1": FRAME[:, :, 0]}, "bad_array"),
        ({"frame1": FRAME - np.float32(1)}, "bad_array"),
        ({"frame1": FRAME + np.float32(300)}, "bad_array"),
        ({"frame1": FRAME + np.float32(np.nan)}, "bad_array"),
        ({"frame1": FRAME.astype(bool)}, "bad_array"),
        ({"frame1": FRAME[:0]}, "bad_array"),
        ({"mask1": MASK[:, :, None]}, "bad_array"),
        ({"mask1": MASK * 3}, "bad_array"),
        ({"mask1": MASK * np.float32(np.inf)}, "bad_array"),
        ({"mask1": np.full((12, 20), "x")}, "bad_array"),
        ({"mask1": np.full((12, 20), None, dtype=object)}, "bad_array"),
    ],
)
def test_bad_pairs_name_their_reason(tmp_path: Path, changes: dict, reason: str) -> None:
    make_pair(tmp_path / "data/masklet_data_1.npz", **changes)
    assert reason_of(tmp_path / "data", tmp_path / "cache") == reason


def test_damaged_files_are_truncated_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "data/masklet_data_1.npz"
    make_pair(path)
    whole = path.read_bytes()
    for damage in (whole[:0], whole[:3], whole[: len(whole) // 2], whole[:-10], b"<html>", pickle.dumps({"a": 1})):
        path.write_bytes(damage)
        assert reason_of(tmp_path / "data", tmp_path / "cache") == "truncated_file"
    flipped = bytearray(whole)
    flipped[200:260] = bytes(60)
    path.write_bytes(bytes(flipped))
    assert reason_of(tmp_path / "data", tmp_path / "cache") in ("truncated_file", "missing_key")
    np.save(path.with_suffix(".npy"), MASK)
    path.with_suffix(".npy").replace(path)
    assert reason_of(tmp_path / "data", tmp_path / "cache") == "truncated_file"
    source = SavPairs(tmp_path / "data", index_dir=tmp_path / "cache")
    path.unlink()
    with pytest.raises(SampleError) as caught:
        source.load(0, RNG)
    assert caught.value.reason == "missing_file"


def test_every_prefix_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data/masklet_data_1.npz"
    make_pair(path)
    whole = path.read_bytes()
    source = SavPairs(tmp_path / "data", index_dir=tmp_path / "cache")
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(SampleError, match="damaged"):
            source.load(0, RNG)


def test_a_wrong_byte_anywhere_is_a_bad_sample_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "data/masklet_data_1.npz"
    make_pair(path)
    whole = path.read_bytes()
    source = SavPairs(tmp_path / "data", index_dir=tmp_path / "cache")
    reasons = set()
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(bytes(damaged))
        try:
            assert source.load(0, RNG).num_regions == 1
        except SampleError as error:
            reasons.add(error.reason)
    assert "truncated_file" in reasons


def test_cap_and_order_come_from_the_index(tmp_path: Path) -> None:
    for n in range(30):
        make_pair(tmp_path / f"data/{n % 3}/masklet_data_{n}.npz")
    (tmp_path / "data/other.npz").write_bytes(b"")
    source = SavPairs(tmp_path / "data", index_dir=tmp_path / "cache")
    names = [source.entry_id(i) for i in range(len(source))]
    assert names == sorted(names)
    assert len(names) == 30
    capped = SavPairs(tmp_path / "data", max_samples=8, index_dir=tmp_path / "cache")
    kept = [capped.entry_id(i) for i in range(len(capped))]
    assert len(kept) == 8
    assert set(kept) < set(names)
    assert kept != names[:8]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert capped.load(3, RNG).sample_id == kept[3]


def test_bad_roots_show_the_layout(tmp_path: Path) -> None:
    for root in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match=r"masklet_data_<n>\.npz") as caught:
            SavPairs(root, index_dir=tmp_path / "cache")
        assert str(root) in str(caught.value)


def test_the_reader_goes_to_worker_processes(tmp_path: Path) -> None:
    make_pair(tmp_path / "data/masklet_data_1.npz")
    source = SavPairs(tmp_path / "data", index_dir=tmp_path / "cache")
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.load(0, RNG).image, source.load(0, RNG).image)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not beside the repository")
def test_real_pairs_load(tmp_path: Path) -> None:
    source = SavPairs(REAL, index_dir=tmp_path)
    assert len(source) == 8
    for index in range(len(source)):
        sample = source.load(index, RNG)
        assert sample.image.std() > 20
        assert 0.0005 < sample.masks.mean() < 0.9

"""SA-V read from videos: the right frames, the right masks, pairs at the wanted distance, clear reasons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from video_cases import CASES, fitting
from video_maker import SIZE, code_of, number_of, picture, true_mask, write_masklets, write_video

from dual_loop.config import DataConfig
from dual_loop.data import sav_video
from dual_loop.data.dataset_builder import open_source
from dual_loop.data.sav_video import SavVideos, read_frame, video_times
from dual_loop.errors import ConfigError, SampleError
from dual_loop.train_dual_loop import main

pytest.importorskip("av", reason="videos need PyAV")
FRAMES = 49


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sav") / "sav_000" / "sav_train" / "sav_000"
    folder.mkdir(parents=True)
    write_video(folder / "sav_000001.mp4", FRAMES)
    write_masklets(folder / "sav_000001_manual.json", 14, hidden=(3, 4))  # the 14th is behind the last frame
    write_masklets(folder / "sav_000001_auto.json", 13)
    write_video(folder / "sav_000002.mp4", 25)
    write_masklets(folder / "sav_000002_manual.json", 7)
    return folder.parents[2]


def opened(root: Path, tmp_path: Path, **options) -> SavVideos:
    return SavVideos(root, index_dir=tmp_path / "index", **options)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_every_frame_is_the_one_that_was_asked_for(tmp_path, codec):
    path = tmp_path / "video.mp4"
    write_video(path, FRAMES, codec)
    assert len(video_times(path).stamps) == FRAMES
    assert video_times(path).rate == pytest.approx(24, rel=0.01)
    order = np.random.default_rng(0).permutation(FRAMES)
    assert [number_of(read_frame(path, int(n))) for n in order] == order.tolist()


def test_a_read_frame_is_that_of_decoding_from_the_start(tmp_path):
    import av

    path = tmp_path / "video.mp4"
    write_video(path, 30)
    with av.open(str(path)) as container:
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert all(np.array_equal(read_frame(path, number), whole[number]) for number in range(30))


def test_uneven_time_stamps_change_nothing(tmp_path):
    path = tmp_path / "video.mp4"
    stamps = np.cumsum(np.random.default_rng(0).integers(1, 5, 30)).tolist()
    write_video(path, 30, stamps=[int(stamp) for stamp in stamps])
    assert [number_of(read_frame(path, n)) for n in (29, 0, 17, 5)] == [29, 0, 17, 5]


@pytest.mark.parametrize("name", CASES)
def test_a_drawn_frame_is_the_one_that_its_mask_was_drawn_on(tmp_path, name):
    CASES[name].write(tmp_path / "sav")
    fits, wrong, reasons = fitting(tmp_path / "sav", frames=3, draws=8)
    assert wrong == 0
    assert set(reasons) == ({CASES[name].reason} - {None})
    assert fits > 0 or reasons


def test_entries_are_masklets_that_are_seen(root, tmp_path):
    both, manual = opened(root, tmp_path), opened(root, tmp_path, masklets="manual")
    names = [both.entry_id(index) for index in range(len(both))]
    assert len(both) == 6  # object 2 is never seen
    assert len(opened(root, tmp_path, masklets="auto")) == 2
    assert [name for name in names if "manual" in name] == [manual.entry_id(k) for k in range(len(manual))]
    assert names[0] == "sav_000/sav_train/sav_000/sav_000001_auto#0"
    assert len(opened(root, tmp_path, max_samples=3)) == 3


def test_files_without_a_partner_are_counted(root, tmp_path):
    folder = tmp_path / "sav"
    shutil.copytree(root, folder)
    assert not any(opened(folder, tmp_path).left_out.values())
    below = next(folder.rglob("*.mp4")).parent
    (below / "sav_000001.mp4").unlink()
    (below / "sav_000002_manual.json").rename(below / "sav_000003_manual.json")
    write_masklets(below / "sav_000002_auto.json", 7)
    (below / "sav_000004.mp4").write_bytes(b"")
    source = opened(folder, tmp_path)
    assert [count for count in source.left_out.values() if count] == [3, 1]
    assert all("sav_000002" in source.entry_id(index) for index in range(len(source)))


def test_pairs_show_the_object_on_both_frames_at_the_wanted_distance(root, tmp_path):
    source = opened(root, tmp_path, masklets="manual", min_seconds=0.5, max_seconds=1.0)
    assert source.entry_id(0).endswith("sav_000001_manual#0")
    pairs = set()
    for seed in range(40):
        sample = source.load(0, np.random.default_rng(seed))
        first, second = (int(n) for n in sample.sample_id.split("@")[1].split("-"))
        pairs.add((first, second))
        assert (number_of(sample.image), number_of(sample.target_image)) == (first, second)
        assert np.array_equal(sample.masks[0], true_mask(first))
        assert np.array_equal(sample.target_masks[0], true_mask(second))
        assert 12 <= abs(first - second) <= 24
        assert not {first, second} & {12, 16}  # hidden there
        assert max(first, second) <= FRAMES - 1
    assert len(pairs) > 10
    assert {first < second for first, second in pairs} == {True, False}


def test_clips_show_the_object_on_all_frames_inside_the_limits(root, tmp_path):
    limits = {"masklets": "manual", "min_seconds": 0.5, "max_seconds": 1.0}
    pairs, clips = opened(root, tmp_path, **limits), opened(root, tmp_path, frames=4, **limits)
    sizes = set()
    for seed in range(20):
        pair, clip = (source.load(0, np.random.default_rng(seed)) for source in (pairs, clips))
        first, *others = (int(n) for n in clip.sample_id.split("@")[1].split("-"))
        assert pair.sample_id.endswith(f"@{first}-{others[0]}")
        assert number_of(clip.image) == first
        assert np.array_equal(clip.target_image, pair.target_image)
        frames = [(clip.target_image, clip.target_masks), *clip.later_targets]
        assert [number_of(image) for image, _ in frames] == others
        assert len({first, *others}) == len(frames) + 1
        for number, (_, masks) in zip(others, frames, strict=True):
            assert 12 <= abs(number - first) <= 24
            assert np.array_equal(masks[0], true_mask(number))
        sizes.add(len(frames))
    assert 3 in sizes
    short = opened(root, tmp_path, frames=9, masklets="manual", min_seconds=0.5, max_seconds=0.5)
    assert {len(short.load(0, np.random.default_rng(seed)).later_targets) for seed in range(9)} <= {0, 1}


def test_several_objects_of_a_clip_are_seen_on_all_its_frames(root, tmp_path):
    sample = opened(root, tmp_path, masklets="manual", regions_per_image=3, frames=4).load(1, np.random.default_rng(0))
    assert sample.masks.shape[0] in (1, 2)
    assert [masks.shape for _, masks in sample.later_targets] == [(len(sample.masks), *SIZE)] * 2
    assert all(masks.any((1, 2)).all() for _, masks in sample.later_targets)


def test_the_same_generator_gives_the_same_pair(root, tmp_path):
    source = opened(root, tmp_path)
    first, again = (source.load(1, np.random.default_rng(5)) for _ in range(2))
    assert first.sample_id == again.sample_id
    assert np.array_equal(first.image, again.image)


def test_several_objects_of_a_pair(root, tmp_path):
    source = opened(root, tmp_path, masklets="manual", regions_per_image=3)
    sample = source.load(0, np.random.default_rng(0))
    assert sample.region_ids == ("0", "1")  # object 2 is absent
    assert sample.masks.shape == sample.target_masks.shape == (2, *SIZE)
    assert sample.masks[1][:20, :20].all()


def test_an_index_is_used_again(root, tmp_path, monkeypatch):
    first = opened(root, tmp_path)
    monkeypatch.setattr(sav_video, "count_visible", None)
    again = opened(root, tmp_path)
    assert [again.entry_id(k) for k in range(len(again))] == [first.entry_id(k) for k in range(len(first))]


def broken(tmp_path: Path, name: str) -> SavVideos:
    folder = tmp_path / "bad"
    folder.mkdir()
    video, record = folder / "sav_000009.mp4", folder / "sav_000009_manual.json"
    write_video(video, 25)
    write_masklets(record, 7)
    content = json.loads(record.read_text())
    if name == "truncated_file":
        video.write_bytes(video.read_bytes()[:200])
    elif name == "broken_json":
        record.write_text(record.read_text()[:-40])
    elif name == "broken_rle":
        for frame in content["masklet"]:
            frame[0]["counts"] = "0"
    elif name == "size_mismatch":
        for frame in content["masklet"]:
            frame[0] = code_of(np.ones((20, 30), bool))
    elif name == "no_frame_pair":
        for frame in content["masklet"][1:-1]:
            frame[0] = code_of(np.zeros(SIZE, bool))
    elif name == "missing_file":
        source = opened(folder, tmp_path)
        video.unlink()
        return source
    if name in ("broken_rle", "size_mismatch", "no_frame_pair"):
        record.write_text(json.dumps(content))
    return opened(folder, tmp_path, max_seconds=0.6)


@pytest.mark.parametrize(
    "reason", ["truncated_file", "broken_json", "broken_rle", "size_mismatch", "no_frame_pair", "missing_file"]
)
def test_what_is_wrong_has_its_reason(tmp_path, reason):
    source = broken(tmp_path, reason)
    with pytest.raises(SampleError) as error:
        source.load(0, np.random.default_rng(0))
    assert error.value.reason == reason
    assert "sav_000009" in str(error.value)


def test_a_frame_behind_the_end_is_an_error(tmp_path):
    write_video(tmp_path / "video.mp4", 5)
    with pytest.raises(SampleError) as error:
        read_frame(tmp_path / "video.mp4", 5)
    assert error.value.reason == "no_frame"


def test_the_format_is_told_from_the_folder(root, tmp_path):
    def settings(folder: Path, form: str) -> DataConfig:
        return DataConfig(sav_dir=str(folder), sav_format=form, index_dir=str(tmp_path / "index"))

    assert isinstance(open_source("sav", settings(root, "auto")), SavVideos)
    assert isinstance(open_source("sav", settings(root, "videos")), SavVideos)
    with pytest.raises(ConfigError, match="no frame pair"):
        open_source("sav", settings(root, "pairs"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="no frame pair"):
        open_source("sav", settings(empty, "auto"))
    with pytest.raises(ConfigError, match="no video with masklets"):
        open_source("sav", settings(empty, "videos"))


@pytest.mark.parametrize("form", ["auto", "videos"])
@pytest.mark.parametrize("below", ["", "sav_val"])
def test_sets_for_evaluation_are_told_from_training_videos(tmp_path, form, below):
    for folder in ("JPEGImages_24fps", "Annotations_6fps"):
        (tmp_path / below / folder / "sav_000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="the val and test sets of SA-V are not read"):
        open_source("sav", DataConfig(sav_dir=str(tmp_path), sav_format=form))


@pytest.mark.parametrize("damage", ["a flipped bit", "a name that is no UTF-8", "an unknown codec"])
def test_a_damaged_video_gives_no_wrong_picture_and_no_traceback(tmp_path, damage):
    CASES["plain"].write(tmp_path / "sav")
    video = tmp_path / "sav" / "sav_000001.mp4"
    data = bytearray(video.read_bytes())
    if damage == "a flipped bit":
        data[len(data) // 3] ^= 16
    elif damage == "an unknown codec":
        data[data.rindex(b"avc1")] ^= 1
    else:
        data[data.index(b"VideoHandler")] = 0xC8
    video.write_bytes(data)
    _, wrong, reasons = fitting(tmp_path / "sav")
    assert wrong == 0
    assert set(reasons) <= {"truncated_file"}


def test_a_bad_code_of_another_object_is_passed_over(tmp_path):
    write_video(tmp_path / "sav_000001.mp4", 25)
    frames = [[code_of(true_mask(4 * k)), {"size": None, "counts": "x"}] for k in range(7)]
    (tmp_path / "sav_000001_manual.json").write_text(json.dumps({"masklet": frames}))
    sample = opened(tmp_path, tmp_path, regions_per_image=2).load(0, np.random.default_rng(0))
    assert sample.region_ids == ("0",)
    assert [(region.region_id, region.reason) for region in sample.passed_over] == [("1", "broken_rle")]


def test_the_release_files_are_understood(tmp_path):
    folder = Path(__file__).parents[2] / ".." / "shared" / "data" / "real_samples" / "sav" / "release_json"
    if not folder.is_dir():
        pytest.skip("the real samples are not on this machine")
    for path in folder.glob("*.json"):
        codes, _ = sav_video.read_masklets(path)
        found = sav_video.count_visible(str(folder), json.dumps([path.name]))
        visible = found["visible"]
        assert len(visible) == len(codes[0])
        areas = [sav_video.area_share(frame[0], "x") > 0 for frame in codes]
        assert visible[0] == sum(areas)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("form", ["pairs", "videos"])
def test_a_clip_of_four_frames_trains(tmp_path, form, precision):
    folder = tmp_path / "clips"
    folder.mkdir()
    if form == "videos":
        write_video(folder / "sav_000001.mp4", FRAMES)
        write_masklets(folder / "sav_000001_manual.json", 13)
    else:
        arrays = {f"frame{number}": picture(9 * number) for number in range(1, 5)}
        arrays |= {f"mask{number}": true_mask(9 * number) for number in range(1, 5)}
        np.savez(folder / "masklet_data_1.npz", **arrays)
    arguments = ["--config", "tiny_cpu", "--sav_dir", str(folder), "--sav_format", form, "--sav_frames", "4"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--device", "cpu", "--mixed_precision", precision]
    arguments += ["--batch_size", "1", "--gradient_accumulation_steps", "1", "--max_steps", "2", "--num_workers", "0"]
    arguments += ["--max_new_tokens", "4", "--log_interval", "1", "--cfg-options", "loop.max_rejected_fraction=1"]
    assert main([*arguments, f"data.index_dir={tmp_path / 'index'}", "data.sav_max_seconds=9"]) == 0
    *_, record = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert record["step"] == 2
    assert record["mask_loss"] > 0
    assert record["grad_norm"] > 0

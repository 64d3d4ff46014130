"""MeViS and Ref-DAVIS17 as they lie on disk, read frame by frame; bad files are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dual_loop.data.ref_video import RefVideos
from dual_loop.errors import ConfigError, DualLoopError, SampleError

from video_sets import FRAMES, scene, write_mevis, write_refdavis


@pytest.fixture
def mevis(tmp_path: Path) -> Path:
    return write_mevis(tmp_path / "mevis")


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    return write_refdavis(tmp_path / "davis")


def changed(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_mevis(mevis: Path) -> None:
    reader = RefVideos("mevis", mevis, "valid_u")
    assert [reader.entry_id(index) for index in range(len(reader))] == ["video0", "video1"]
    clip = reader.load_all(1)
    image, masks, texts = scene(1, 2)
    assert [one.text for one in clip.expressions[:-1]] == texts
    assert len(clip.frames) == FRAMES
    assert np.abs(clip.image(2).astype(int) - image).mean() < 4
    found = clip.masks(2, clip.expressions, image.shape[:2])
    assert found is not None
    assert np.array_equal(found[: len(masks)], masks)
    assert np.array_equal(found[-2], masks[0] | masks[1]), "the union of an expression's objects"
    assert not found[-1].any(), "nothing is void"
    gone = clip.masks(FRAMES - 1, clip.expressions[:1], image.shape[:2])
    assert gone is not None
    assert not gone.any()


def test_mevis_without_public_masks(tmp_path: Path) -> None:
    clip = RefVideos("mevis", write_mevis(tmp_path, 1, "valid", has_masks=False), "valid").load_all(0)
    assert clip.masks(0, clip.expressions, clip.image(0).shape[:2]) is None


def test_refdavis(davis: Path) -> None:
    clip = RefVideos("refdavis17", davis, "valid").load_all(0)
    image, masks, texts = scene(0, 3)
    assert [one.text for one in clip.expressions] == [text for text in texts for _ in range(4)]
    found = clip.masks(3, clip.expressions[4:8], image.shape[:2])
    assert found is not None
    assert found[-1, :, -1].all()
    assert found[-1].sum() == len(image), "the value 255 is void"
    assert all(np.array_equal(own[:, :-1], masks[1][:, :-1]) for own in found[:4])


def test_an_object_needs_one_expression_of_each_annotator(davis: Path) -> None:
    listing = davis / "meta_expressions" / "valid" / "meta_expressions.json"
    changed(listing, lambda content: content["videos"]["video0"]["expressions"].pop("2"))
    with pytest.raises(SampleError, match=r"one expression of each annotator.*video0.*object 1: 3"):
        RefVideos("refdavis17", davis, "valid").load_all(0)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_part_that_is_missing_is_named_with_the_tree(mevis: Path, split: str) -> None:
    with pytest.raises(ConfigError, match=rf"MeViS lacks a part of its split {split}(.|\n)*mask_dict.json"):
        RefVideos("mevis", mevis, split)


def record(content: Any) -> Any:
    return content["videos"]["video0"]


MEVIS_FAULTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "no_videos": (lambda content: content.pop("videos"), "broken_json"),
    "videos_are_a_number": (lambda content: content.update(videos=3), "broken_json"),
    "frames_are_a_number": (lambda content: record(content).update(frames=3), "broken_json"),
    "no_frames": (lambda content: record(content).update(frames=[]), "broken_json"),
    "no_expressions": (lambda content: record(content).update(expressions={}), "broken_json"),
    "expressions_are_a_list": (lambda content: record(content).update(expressions=[1]), "broken_json"),
    "no_text": (lambda content: record(content)["expressions"]["0"].pop("exp"), "broken_json"),
    "objects_are_words": (lambda content: record(content)["expressions"]["0"].update(anno_id=["x"]), "broken_json"),
    "an_object_is_unknown": (lambda content: record(content)["expressions"]["0"].update(anno_id=[99]), "broken_json"),
    "a_special_token": (lambda content: record(content)["expressions"]["0"].update(exp="a [SEG]"), "special_token"),
    "half_a_character": (lambda content: record(content)["expressions"]["0"].update(exp="\ud800"), "broken_text"),
    "a_path_outside": (lambda content: record(content).update(frames=["../../../x"]), "unsafe_path"),
    "a_frame_is_missing": (lambda content: record(content).update(frames=["00099"]), "missing_file"),
}


def look(mevis: Path) -> None:
    clip = RefVideos("mevis", mevis, "valid_u").load_all(0)
    clip.masks(0, clip.expressions, clip.image(0).shape[:2])


@pytest.mark.parametrize("name", MEVIS_FAULTS)
def test_a_broken_listing_is_named(mevis: Path, name: str) -> None:
    change, reason = MEVIS_FAULTS[name]
    changed(mevis / "valid_u" / "meta_expressions.json", change)
    with pytest.raises(SampleError) as caught:
        look(mevis)
    assert caught.value.reason == reason
    assert any(part in str(caught.value) for part in ("video0", "meta_expressions.json", "valid_u"))


CODE_FAULTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "other_size": (lambda codes: codes["0"].__setitem__(0, {"size": [2, 2], "counts": [4]}), "size_mismatch"),
    "endless": (lambda codes: codes["0"].__setitem__(0, {"size": [10**6] * 2, "counts": [10**12]}), "broken_rle"),
    "no_code": (lambda codes: codes["0"].__setitem__(0, "x"), "broken_rle"),
    "too_few_frames": (lambda codes: codes.update({"0": []}), "broken_json"),
    "not_by_frame": (lambda codes: codes.update({"0": 7}), "broken_json"),
}


@pytest.mark.parametrize("name", CODE_FAULTS)
def test_a_broken_code_is_named(mevis: Path, name: str) -> None:
    change, reason = CODE_FAULTS[name]
    changed(mevis / "valid_u" / "mask_dict.json", change)
    with pytest.raises(SampleError, match=r"mask_dict.json: 0, frame 0 of video0") as caught:
        look(mevis)
    assert caught.value.reason == reason


@pytest.mark.parametrize("fault", ["rgb", "size", "text", "missing"])
def test_a_broken_annotation_is_named(davis: Path, fault: str) -> None:
    path = davis / "valid" / "Annotations" / "video0" / "00001.png"
    path.unlink()
    if fault == "rgb":
        Image.new("RGB", (8, 8)).save(path)
    elif fault == "size":
        Image.new("L", (8, 8)).save(path)
    elif fault == "text":
        path.write_text("no image")
    clip = RefVideos("refdavis17", davis, "valid").load_all(0)
    with pytest.raises(SampleError, match=r"00001.png") as caught:
        clip.masks(1, clip.expressions, clip.image(1).shape[:2])
    reasons = {"rgb": "bad_array", "size": "size_mismatch", "text": "not_an_image", "missing": "missing_file"}
    assert caught.value.reason == reasons[fault]


def test_a_listing_that_is_no_json(mevis: Path) -> None:
    (mevis / "valid_u" / "meta_expressions.json").write_text("{")
    with pytest.raises(DualLoopError, match=r"meta_expressions.json"):
        RefVideos("mevis", mevis, "valid_u")

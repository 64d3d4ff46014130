"""RefCOCO: layouts, splits, sentences, polygons and crowd codes, images by id."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refcoco_files import (
    HEIGHT,
    WIDTH,
    crowd_mask,
    make_instances,
    make_refs,
    source_of,
    write_dataset,
    write_grefs,
)

from dual_loop.data.refcoco import RefCoco
from dual_loop.errors import ConfigError, SampleError

REAL = Path(__file__).resolve().parents[3] / "shared/data/real_samples/ref_seg"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data/refcoco")
    return tmp_path / "data"


def reason_of(source: RefCoco, index: int = 0) -> str:
    with pytest.raises(SampleError) as caught:
        source.load(index, np.random.default_rng(0))
    return caught.value.reason


def test_an_entry_is_an_image_with_its_references(root: Path) -> None:
    source = source_of(root)
    assert [source.entry_id(i) for i in range(len(source))] == ["refcoco/1", "refcoco/2"]
    sample = source.load_all(1)
    assert sample.region_ids == ("ref200", "ref201", "ref202")
    assert sample.captions[0] == ("thing 200 0",)
    assert sample.captions[2] == ("thing 202 0", "thing 202 1", "thing 202 2")
    assert (sample.source, sample.sample_id, sample.target_image) == ("refcoco", "refcoco/2", None)
    united = np.zeros((HEIGHT, WIDTH), bool)
    united[2:10, 2:10] = united[6:14, 6:14] = True
    assert np.array_equal(sample.masks[0], united), "polygons that overlap are one object"
    assert np.array_equal(sample.masks[1], crowd_mask())
    assert np.array_equal(sample.masks[2], crowd_mask())


def test_the_draw_depends_on_the_generator_alone(root: Path) -> None:
    source = source_of(root, regions_per_image=2)
    draws = [source.load(0, np.random.default_rng(seed)) for seed in range(80)]
    assert len({sample.region_ids for sample in draws}) == 6
    again = pickle.loads(pickle.dumps(source))
    assert all(again.load(0, np.random.default_rng(s)).region_ids == d.region_ids for s, d in enumerate(draws))
    for sample in draws:
        for region, captions in zip(sample.region_ids, sample.captions, strict=True):
            assert captions[0] == f"thing {region[3:]} 0"
    assert source_of(root).load(0, np.random.default_rng(0)).num_regions == 1


def test_data_sets_are_entries_of_their_own(root: Path) -> None:
    write_dataset(root / "refcoco+")
    write_dataset(root / "refcocog", split_by="umd")
    source = RefCoco(root, index_dir=root.parent / "cache")
    assert source.datasets == ("refcoco", "refcoco+", "refcocog")
    assert [source.entry_id(i) for i in range(6)] == [f"{d}/{i}" for d in source.datasets for i in (1, 2)]
    assert source.load_all(5).sample_id == "refcocog/2"
    write_dataset(root / "refcocog", refs=make_refs()[-3:], split_by="google")
    google = source_of(root, ("refcocog:google", "refcocog", "refcocog:umd"))
    assert google.datasets == ("refcocog:google", "refcocog")
    assert [google.entry_id(i) for i in range(3)] == ["refcocog:google/1", "refcocog/1", "refcocog/2"]


def test_raw_stands_in_for_sent_and_blank_sentences_go(root: Path) -> None:
    refs = make_refs()[-1:]
    refs[0]["sentences"] = [{"raw": "The Man"}, {"sent": "  "}, {"sent": " left man "}]
    write_dataset(root / "refcoco", refs)
    assert source_of(root).load_all(0).captions == (("The Man", "left man"),)


def test_splits(root: Path) -> None:
    assert source_of(root, split="val").entry_id(0) == "refcoco/3"
    with pytest.raises(ConfigError, match="refcoco: testA, train, val") as caught:
        source_of(root, split="tset")
    assert "tset" in str(caught.value)
    write_dataset(root / "refcoco+", refs=make_refs()[-3:])
    assert len(source_of(root, ("refcoco", "refcoco+"), split="testA")) == 1


def test_absent_data_sets_are_left_out_aloud(root: Path) -> None:
    with pytest.warns(UserWarning, match=r"no folder for refcoco\+, refcocog"):
        source = RefCoco(root, index_dir=root.parent / "cache")
    assert source.datasets == ("refcoco",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source_of(root)


def test_bad_roots_and_parts_are_explained(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of refcocog/"):
        source_of(root, ("refcocog",))
    with pytest.raises(ConfigError, match="unknown RefCOCO data set"):
        source_of(root, ("refcoko",))
    with pytest.raises(ConfigError, match="empty list"):
        source_of(root, ())
    with pytest.raises(ConfigError, match="does not exist"):
        source_of(root / "absent")
    with pytest.raises(ConfigError, match=r"refs\(google\)\.p"):
        source_of(root, ("refcoco:google",))
    (root / "refcoco/instances.json").rename(root / "instances.json")
    with pytest.raises(ConfigError, match=r"instances\.json"):
        source_of(root)


def test_a_reduced_image_keeps_regions_masks_and_captions(root: Path) -> None:
    source = source_of(root, regions_per_image=2)
    full = source.load(0, np.random.default_rng(3))
    reduced = source.load_reduced(0, np.random.default_rng(3), lambda height, width: (8, 8))
    assert reduced.image_reduction > 1
    assert reduced.image.shape[:2] == tuple(-(-side // reduced.image_reduction) for side in (HEIGHT, WIDTH))
    assert np.array_equal(reduced.masks, full.masks)
    assert (reduced.region_ids, reduced.captions) == (full.region_ids, full.captions)


def test_images_elsewhere_and_bare_names(root: Path, tmp_path: Path) -> None:
    folder = root / "refcoco/coco2014/train2014"
    folder.rename(tmp_path / "photos")
    with pytest.raises(ConfigError, match="refcoco_images"):
        source_of(root)
    source = source_of(root, images=tmp_path / "photos")
    plain = source.load_all(0).image
    (tmp_path / "photos/COCO_train2014_000000000001.jpg").rename(tmp_path / "photos/000000000001.jpg")
    assert np.array_equal(source.load_all(0).image, plain)
    (root / "coco2014").mkdir()
    (tmp_path / "photos").rename(root / "coco2014/train2014")
    shared = source_of(root)
    assert np.array_equal(shared.load_all(0).image, plain)
    (root / "coco2014/train2014/000000000001.jpg").unlink()
    assert reason_of(shared) == "missing_file"


def test_images_are_found_where_instances_uses_bare_names(root: Path) -> None:
    instances = make_instances()
    for image in instances["images"]:
        image["file_name"] = f"{image['id']:012d}.jpg"
    write_dataset(root / "refcoco", instances=instances)
    assert source_of(root).load_all(0).num_regions == 3


def test_exif_is_never_applied(root: Path) -> None:
    path = root / "refcoco/coco2014/train2014/COCO_train2014_000000000001.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).copy().save(path, exif=exif)
    assert source_of(root).load_all(0).image.shape == (HEIGHT, WIDTH, 3)


def test_image_names_cannot_leave_the_folder(root: Path) -> None:
    instances = make_instances()
    instances["images"][0]["file_name"] = "../../../refcoco/coco2014/train2014/COCO_train2014_000000000002.jpg"
    write_dataset(root / "refcoco", instances=instances)
    assert reason_of(source_of(root)) == "unsafe_path"


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 1, 5, 5]], "bad_polygon"),
        ({"size": [HEIGHT, WIDTH], "counts": "zzz"}, "broken_rle"),
        ({"size": [WIDTH, HEIGHT], "counts": [0, HEIGHT * WIDTH]}, "size_mismatch"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, "no_region_left"),
    ],
)
def test_bad_masks_name_their_reason(root: Path, segmentation: Any, reason: str) -> None:
    instances = make_instances()
    instances["annotations"][0]["segmentation"] = segmentation
    write_dataset(root / "refcoco", refs=make_refs()[-1:], instances=instances)
    source = source_of(root)
    assert reason_of(source) == reason
    with pytest.raises(SampleError) as caught:
        source.load_all(0)
    assert caught.value.reason == ("empty_mask" if reason == "no_region_left" else reason)


def test_an_empty_mask_is_passed_over(root: Path) -> None:
    instances = make_instances()
    instances["annotations"][0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    write_dataset(root / "refcoco", instances=instances)
    source = source_of(root, regions_per_image=3)
    for seed in range(5):
        assert sorted(source.load(0, np.random.default_rng(seed)).region_ids) == ["ref101", "ref102"]


def test_an_image_of_another_size_is_a_mismatch(root: Path) -> None:
    path = root / "refcoco/coco2014/train2014/COCO_train2014_000000000001.jpg"
    Image.new("L", (WIDTH * 2, HEIGHT * 2)).save(path)
    assert reason_of(source_of(root)) == "size_mismatch"
    Image.new("L", (WIDTH + 2, HEIGHT)).save(path)
    sample = source_of(root).load_all(0)
    assert sample.image.shape == (HEIGHT, WIDTH + 2, 3)
    assert sample.masks.shape[1:] == (HEIGHT, WIDTH + 2)


def test_cap_keeps_entries(root: Path) -> None:
    assert len(source_of(root, max_samples=1)) == 1
    assert len(source_of(root, max_samples=9)) == 2
    with pytest.raises(ConfigError, match="refcoco_max_samples"):
        source_of(root, max_samples=0)


def test_the_second_start_does_not_parse_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = source_of(root)
    monkeypatch.setattr("dual_loop.data.refcoco_index.load_refs", lambda path: pytest.fail("parsed again"))
    assert source_of(root, split="val").entry_id(0) == "refcoco/3"
    assert len(source_of(root)) == len(first)


def test_several_targets_are_united_and_no_target_is_said(root: Path) -> None:
    write_grefs(root)
    source = source_of(root, ("grefcoco",), regions_per_image=2)
    assert [source.entry_id(i) for i in range(len(source))] == ["grefcoco/1", "grefcoco/2"]
    sample = source.load_all(0)
    assert sample.captions == (("both",), ("the bar",))
    assert sample.no_target == ("a zebra",)
    assert np.array_equal(sample.masks[0], source_of(root).load_all(0).masks[:2].any(0))
    assert np.array_equal(sample.masks[1], crowd_mask())


def test_an_image_with_expressions_without_a_target_alone_shows_an_object(root: Path) -> None:
    write_grefs(root)
    source = source_of(root, ("grefcoco",))
    for sample in (source.load_all(1), source.load(1, np.random.default_rng(0))):
        assert (sample.region_ids, sample.captions) == (("ann20",), ((),))
        assert sample.no_target == ("a pink cow", "a bus")
    instances = make_instances()
    instances["annotations"] = instances["annotations"][:1]
    write_dataset(root / "refcoco", instances=instances)
    with pytest.raises(SampleError, match="no region of an image"):
        source_of(root, ("grefcoco",)).load(1, np.random.default_rng(0))
    with pytest.raises(SampleError, match="no region of an image"):
        source_of(root, ("grefcoco",)).load_all(1)


def test_what_is_said_of_regions_that_are_not_drawn_is_known(root: Path) -> None:
    sample = source_of(root).load(0, np.random.default_rng(0))
    said = {text for texts in (*sample.captions, sample.undrawn_captions) for text in texts}
    assert said == {f"thing {100 + k} {n}" for k in range(3) for n in range(k + 1)}


def test_an_annotation_of_another_image_or_of_none_is_one_bad_region(root: Path) -> None:
    write_grefs(root)
    source = source_of(root, ("grefcoco",), split="val", regions_per_image=2)
    for sample in (source.load_all(0), source.load(0, np.random.default_rng(0))):
        assert sample.region_ids == ("ref6",)
        [passed] = sample.passed_over
        assert (passed.region_id, passed.reason) == ("ref5", "wrong_annotation")
        assert "annotation 10 is of image 1, the reference of image 3" in passed.message
    refs = make_refs()
    refs[-1]["ann_id"] = 9999
    write_dataset(root / "refcoco", refs)
    [passed] = source_of(root).load_all(0).passed_over
    assert "annotation 9999 is not in instances.json" in passed.message


def test_a_piece_of_two_points_beside_the_polygon_is_no_part_of_the_object(root: Path) -> None:
    instances = make_instances()
    expected = source_of(root).load_all(0).masks[0]
    instances["annotations"][0]["segmentation"].insert(1, [30, 20, 31, 21])
    write_dataset(root / "refcoco", instances=instances)
    assert np.array_equal(source_of(root).load_all(0).masks[0], expected)


def test_an_id_that_is_there_twice_names_two_regions(root: Path) -> None:
    refs = make_refs()
    refs[-1]["ref_id"] = refs[-2]["ref_id"]
    write_dataset(root / "refcoco", refs)
    assert set(source_of(root).load_all(0).region_ids) == {"ref101", "ref101_2", "ref102"}


def test_images_that_are_not_there_are_left_out_and_counted(root: Path) -> None:
    folder = root / "refcoco/coco2014/train2014"
    (folder / "COCO_train2014_000000000001.jpg").rename(root / "kept.jpg")
    source = source_of(root)
    assert [source.entry_id(i) for i in range(len(source))] == ["refcoco/2"]
    assert source.left_out["images of train that are not there"] == 1
    (root / "kept.jpg").rename(folder / "000000000001.jpg")
    assert len(source_of(root)) == 2, "what comes later is found at the next start"
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="no image of this split is there"):
        source_of(root)


def test_a_data_set_that_nobody_asks_for_is_said(root: Path) -> None:
    write_grefs(root)
    assert source_of(root).left_out["data sets that refcoco_datasets does not name (grefcoco)"] == 1


def test_the_splits_of_another_author_are_named_where_the_usual_ones_lack(root: Path) -> None:
    write_dataset(root / "refcocog", split_by="google")
    with pytest.raises(ConfigError, match=r"refs\(google\)\.p \(ask for refcocog:NAME"):
        source_of(root, ("refcocog",))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not beside the repository")
@pytest.mark.parametrize("split", ["train", "val", "testA"])
def test_real_samples_load(tmp_path: Path, split: str) -> None:
    source = RefCoco(REAL, split=split, index_dir=tmp_path)
    num_regions = 0
    for index in range(len(source)):
        sample = source.load_all(index)
        num_regions += sample.num_regions
        assert sample.masks.any((1, 2)).all()
        assert all(sample.captions)
    assert num_regions > 0

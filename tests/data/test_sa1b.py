"""SA-1B: the three layouts, pairing, drawing regions, limits, damaged files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dual_loop.data import sa1b
from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.sa1b import Sa1b
from dual_loop.errors import ConfigError, SampleError

REAL = Path(__file__).resolve().parents[3] / "shared/data/real_samples"
HEIGHT, WIDTH = 40, 60
BOXES = ((2, 2, 10, 20), (12, 5, 30, 50), (0, 0, 40, 60), (35, 55, 36, 56))  # y1, x1, y2, x2; whole image, one pixel


def make_masks() -> np.ndarray:
    masks = np.zeros((len(BOXES), HEIGHT, WIDTH), bool)
    for mask, (y1, x1, y2, x2) in zip(masks, BOXES, strict=True):
        mask[y1:y2, x1:x2] = True
    return masks


def make_annotations() -> list[dict[str, Any]]:
    return [
        {
            "id": 500 + i,
            "segmentation": encode_rle(mask),
            "area": int(mask.sum()),
            "predicted_iou": 0.8 + 0.05 * i,
            "stability_score": 0.99 - 0.05 * i,
        }
        for i, mask in enumerate(make_masks())
    ]


def write(image_path: Path, record_path: Path, annotations: list | None = None, size: tuple = (HEIGHT, WIDTH)) -> None:
    for path in (image_path, record_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image_path)
    record = {
        "image": {"image_id": 1, "height": size[0], "width": size[1], "file_name": "../../../evil.jpg"},
        "annotations": make_annotations() if annotations is None else annotations,
    }
    record_path.write_text(json.dumps(record))


def source_of(root: Path, **options: Any) -> Sa1b:
    return Sa1b(root, index_dir=root.parent / "cache", **options)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write(root / "sa_1.jpg", root / "sa_1.json")
    return root


@pytest.mark.parametrize(
    ("image", "record", "name"),
    [
        ("sa_1.jpg", "sa_1.json", "sa_1"),
        ("img/sa_1.jpg", "js/sa_1.json", "sa_1"),
        ("sa_000020/sa_1.jpg", "sa_000020/sa_1.json", "sa_000020/sa_1"),
        ("sa_000020/img/sa_1.JPG", "sa_000020/js/sa_1.json", "sa_000020/sa_1"),
        ("img/00/sa_1.png", "js/00/sa_1.json", "00/sa_1"),
        ("images/sa_1.jpg", "annotations/sa_1.json", "sa_1"),
        ("train/000001.jpg", "train/000001.json", "train/000001"),
    ],
)
def test_every_layout_pairs_image_and_record(tmp_path: Path, image: str, record: str, name: str) -> None:
    root = tmp_path / "data"
    write(root / image, root / record)
    (root / "notes.json").write_text("{}")
    source = source_of(root, regions_per_image=9, min_area=0, max_area=1)
    assert [source.entry_id(i) for i in range(len(source))] == [name]
    sample = source.load(0, np.random.default_rng(0))
    assert sample.image.shape == (HEIGHT, WIDTH, 3)
    assert sorted(sample.region_ids) == ["500", "501", "502", "503"]
    for region, mask in zip(sample.region_ids, sample.masks, strict=True):
        assert np.array_equal(mask, make_masks()[int(region) - 500])
    assert (sample.source, sample.sample_id, sample.captions) == ("sa1b", name, ((), (), (), ()))
    assert sample.target_image is None


def test_equal_stems_in_two_folders_are_two_entries(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for folder in ("a", "b"):
        write(root / folder / "sa_1.jpg", root / folder / "sa_1.json")
    assert [source_of(root).entry_id(i) for i in range(2)] == ["a/sa_1", "b/sa_1"]


def test_the_draw_depends_on_the_generator_alone(flat: Path) -> None:
    source = source_of(flat, regions_per_image=2, min_area=0, max_area=1)
    draws = {tuple(source.load(0, np.random.default_rng(seed)).region_ids) for seed in range(200)}
    assert len(draws) == 12, "all ordered pairs of four regions"
    again = source.load(0, np.random.default_rng(7)).region_ids
    assert again == pickle.loads(pickle.dumps(source)).load(0, np.random.default_rng(7)).region_ids


def test_regions_outside_the_limits_are_never_drawn(flat: Path) -> None:
    for seed in range(10):
        sample = source_of(flat, regions_per_image=4).load(0, np.random.default_rng(seed))
        assert sorted(sample.region_ids) == ["500", "501"]
        one = source_of(flat).load(0, np.random.default_rng(seed))
        assert one.num_regions == 1
        assert one.region_ids[0] in ("500", "501")


def test_scores_limit_and_a_missing_score_does_not_pass(tmp_path: Path) -> None:
    root = tmp_path / "data"
    annotations = make_annotations()
    del annotations[1]["predicted_iou"]
    write(root / "sa_1.jpg", root / "sa_1.json", annotations)
    everything = {"regions_per_image": 9, "min_area": 0, "max_area": 1}

    def ids(**limits: float) -> list[str]:
        return sorted(source_of(root, **everything, **limits).load(0, np.random.default_rng(0)).region_ids)

    assert ids() == ["500", "501", "502", "503"]
    assert ids(min_predicted_iou=0.85) == ["502", "503"]
    assert ids(min_stability_score=0.93) == ["500", "501"]
    with pytest.raises(SampleError, match=r"predicted_iou >= 0\.99") as caught:
        ids(min_predicted_iou=0.99)
    assert caught.value.reason == "no_region_left"


def test_two_of_a_hundred_regions_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, decoded = tmp_path / "data", []
    code = encode_rle(make_masks()[1])
    write(root / "sa_1.jpg", root / "sa_1.json", [{"id": number, "segmentation": code} for number in range(100)])
    decode = sa1b.decode_rle
    monkeypatch.setattr(sa1b, "decode_rle", lambda rle, where: decoded.append(where) or decode(rle, where))
    assert source_of(root, regions_per_image=2).load(0, np.random.default_rng(0)).num_regions == 2
    assert len(set(decoded)) == len(decoded) == 2


def test_only_drawn_regions_are_decoded(tmp_path: Path) -> None:
    root = tmp_path / "data"
    annotations = make_annotations()[:2]
    annotations[1]["segmentation"]["counts"] = "broken"
    write(root / "sa_1.jpg", root / "sa_1.json", annotations)
    outcomes = set()
    for seed in range(20):
        sample = source_of(root).load(0, np.random.default_rng(seed))
        outcomes.add((*sample.region_ids, *((one.region_id, one.reason) for one in sample.passed_over)))
    assert outcomes == {("500",), ("500", ("501", "broken_rle"))}


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH + 1), (HEIGHT - 2, WIDTH), (HEIGHT + 2, WIDTH + 2)])
def test_two_pixels_are_bridged(tmp_path: Path, size: tuple[int, int]) -> None:
    write(tmp_path / "data/sa_1.jpg", tmp_path / "data/sa_1.json", size=size)
    sample = source_of(tmp_path / "data").load(0, np.random.default_rng(0))
    assert sample.masks.shape[1:] == sample.image.shape[:2] == size


def test_another_rendition_is_a_mismatch(tmp_path: Path) -> None:
    write(tmp_path / "data/sa_1.jpg", tmp_path / "data/sa_1.json", size=(HEIGHT // 2, WIDTH // 2))
    with pytest.raises(SampleError) as caught:
        source_of(tmp_path / "data").load(0, np.random.default_rng(0))
    assert caught.value.reason == "size_mismatch"


@pytest.mark.parametrize(
    "text",
    ["", '{"annotations": [', "[]", '{"annotations": {}}', '{"annotations": [1]}', "[" * 100_000, "\ufeff{}", "{} x"],
)
def test_broken_json_is_a_bad_sample(flat: Path, text: str) -> None:
    (flat / "sa_1.json").write_text(text)
    with pytest.raises(SampleError, match=r"sa_1\.json") as caught:
        source_of(flat).load(0, np.random.default_rng(0))
    assert caught.value.reason == "broken_json"


@pytest.mark.parametrize("annotations", [[], [{"id": 1}], [{"segmentation": None}], [{"segmentation": {"size": [1]}}]])
def test_records_without_a_sound_region(tmp_path: Path, annotations: list) -> None:
    write(tmp_path / "data/sa_1.jpg", tmp_path / "data/sa_1.json", annotations)
    with pytest.raises(SampleError) as caught:
        source_of(tmp_path / "data").load(0, np.random.default_rng(0))
    assert caught.value.reason == ("no_region_left" if not annotations else "broken_rle")


def test_ids_that_repeat_become_positions(tmp_path: Path) -> None:
    annotations = make_annotations()
    for annotation in annotations:
        annotation["id"] = 7
    write(tmp_path / "data/sa_1.jpg", tmp_path / "data/sa_1.json", annotations)
    sample = source_of(tmp_path / "data", regions_per_image=9).load(0, np.random.default_rng(0))
    assert sorted(sample.region_ids) == ["at0", "at1"]


def test_files_without_partner_are_no_entries_and_are_counted(flat: Path) -> None:
    for n in range(2, 12):
        write(flat / f"sa_{n}.jpg", flat / f"sa_{n}.json")
    (flat / "sa_3.json").unlink()
    (flat / "sa_4.jpg").unlink()
    source = source_of(flat)
    assert {source.entry_id(i) for i in range(len(source))} == {f"sa_{n}" for n in (1, 2, *range(5, 12))}
    assert source.left_out["images without a JSON file"] == source.left_out["JSON files without an image"] == 1
    assert len(source_of(flat, max_samples=5)) == 5
    assert len(source_of(flat, max_samples=100)) == 9


def test_polygons_of_a_converted_set_are_read(tmp_path: Path) -> None:
    polygon = {"id": 1, "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}
    write(tmp_path / "data/sa_1.jpg", tmp_path / "data/sa_1.json", [polygon])
    [mask] = source_of(tmp_path / "data").load(0, np.random.default_rng(0)).masks
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[10:30, 10:30] = True
    assert np.array_equal(mask, expected)


def test_a_truncated_image_is_a_bad_sample(flat: Path) -> None:
    data = (flat / "sa_1.jpg").read_bytes()
    (flat / "sa_1.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(SampleError) as caught:
        source_of(flat).load(0, np.random.default_rng(0))
    assert caught.value.reason == "truncated_file"


def test_bad_roots_show_the_layout(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sa_1.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no sa_\*\.jpg, 1 sa_\*\.json"):
        source_of(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"img/sa_<id>\.jpg"):
        source_of(tmp_path / "absent")
    (tmp_path / "data/sa_000000").write_bytes(b"x")
    (tmp_path / "data/sa_000001").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"1 files without a suffix such as sa_000000 .*1 links that lead nowhere"):
        source_of(tmp_path / "data")
    write(tmp_path / "data/sa_2.jpg", tmp_path / "data/other/sa_9.json")
    with pytest.raises(ConfigError, match="1 images and 2 JSON files, none of the same stem"):
        source_of(tmp_path / "data")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not beside the repository")
@pytest.mark.parametrize(("folder", "num_images"), [("sa1b_flat", 5), ("sa1b_split", 2)])
def test_real_samples_load(tmp_path: Path, folder: str, num_images: int) -> None:
    source = Sa1b(REAL / folder, regions_per_image=99, min_area=0, max_area=1, index_dir=tmp_path)
    assert len(source) == num_images
    for index in range(num_images):
        sample = source.load(index, np.random.default_rng(0))
        assert sample.masks.any((1, 2)).all()
        assert sample.image.std() > 20

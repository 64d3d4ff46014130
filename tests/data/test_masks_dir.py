"""A user's own masks: the three layouts, captions, labels, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dual_loop.config import DataConfig
from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.dataset_builder import build_sources
from dual_loop.data.masks_dir import MasksDir
from dual_loop.errors import ConfigError, SampleError

HEIGHT, WIDTH = 30, 40


def box(y1: int, x1: int, y2: int, x2: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y1:y2, x1:x2] = True
    return mask


LEFT, RIGHT = box(2, 2, 20, 18), box(5, 22, 28, 38)


def save_image(path: Path, seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def save_mask(path: Path, values: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    if mode == "P":
        image.putpalette([k for k in range(256) for _ in range(3)])
    image.save(path)


def open_all(root: Path, **options: Any) -> dict[str, dict[str, tuple[np.ndarray, tuple[str, ...]]]]:
    source = MasksDir(root, index_dir=root.parent / "index", regions_per_image=99, **options)
    found = {}
    for index in range(len(source)):
        sample = source.load(index, np.random.default_rng(0))
        regions = zip(sample.region_ids, sample.masks, sample.captions, strict=True)
        found[sample.sample_id] = {name: (mask, texts) for name, mask, texts in regions}
        assert source.image_path(index).is_file()
    return found


@pytest.fixture
def png_root(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    for name in ("one.jpg", "many.png", "map.jpg", "sub/deep.jpg", "without.jpg"):
        save_image(root / "images" / name)
    save_mask(root / "masks/one.png", LEFT * 255)
    save_mask(root / "masks/many/left.png", LEFT * 1)
    save_mask(root / "masks/many/right.png", RIGHT * 255)
    save_mask(root / "masks/map.png", LEFT * 1 + RIGHT * 2, "P")
    save_mask(root / "masks/sub/deep.png", LEFT * 1 + RIGHT * 2)
    save_mask(root / "masks/stranger.png", LEFT * 255)
    return root


def test_png_masks_single_folder_and_label_maps(png_root: Path) -> None:
    captions = {"one": "a box", "many/left": ["left one", " the other's neighbour "], "map#2": "right label"}
    (png_root / "captions.json").write_text(json.dumps(captions))
    found = open_all(png_root)
    assert {name: sorted(regions) for name, regions in found.items()} == {
        "one": ["one"],
        "many": ["left", "right"],
        "map": ["map#1", "map#2"],
        "sub/deep": ["sub/deep#1", "sub/deep#2"],
    }
    assert np.array_equal(found["one"]["one"][0], LEFT)
    assert np.array_equal(found["map"]["map#2"][0], RIGHT)
    assert np.array_equal(found["sub/deep"]["sub/deep#1"][0], LEFT)
    assert found["one"]["one"][1] == ("a box",)
    assert found["many"]["left"][1] == ("left one", "the other's neighbour")
    assert found["many"]["right"][1] == ()
    assert found["map"]["map#2"][1] == ("right label",)


def test_captions_without_a_mask_are_refused(png_root: Path) -> None:
    (png_root / "captions.json").write_text(json.dumps({"oen": "a box"}))
    with pytest.raises(ConfigError, match=r"captions belong to no mask.*oen"):
        open_all(png_root)


def test_anti_aliased_masks_are_bad_samples(png_root: Path) -> None:
    save_mask(png_root / "masks/one.png", LEFT * 255 + RIGHT * 100)
    source = MasksDir(png_root, index_dir=png_root.parent / "index")
    index = next(i for i in range(len(source)) if source.entry_id(i) == "one")
    with pytest.raises(SampleError, match="threshold the mask") as caught:
        source.load(index, np.random.default_rng(0))
    assert caught.value.reason == "ambiguous_mask"


def test_lines_of_json(tmp_path: Path) -> None:
    root = tmp_path / "lines"
    save_image(root / "images/a.jpg")
    save_image(root / "b.png", 1)
    polygon = [[22.0, 5.0, 38.0, 5.0, 38.0, 28.0, 22.0, 28.0]]
    records = [
        {"image": "a.jpg", "segmentation": encode_rle(LEFT), "caption": "left", "id": "7"},
        {"image": "b.png", "segmentation": encode_rle(RIGHT)},
        {"image": "a.jpg", "segmentation": polygon, "captions": ["right", "the right one"], "id": 8},
    ]
    (root / "masks.jsonl").write_text("\n\n".join(json.dumps(record) for record in records) + "\n")
    for given in (root, root / "masks.jsonl"):
        found = open_all(given)
        assert sorted(found) == ["a", "b"]
        assert np.array_equal(found["a"]["7"][0], LEFT)
        assert np.array_equal(found["a"]["8"][0], RIGHT)
        assert found["a"]["8"][1] == ("right", "the right one")
        assert found["b"]["at0"][1] == ()


def test_images_elsewhere_and_paths_that_leave(tmp_path: Path) -> None:
    save_image(tmp_path / "photos/x/a.jpg")
    lines = tmp_path / "labels" / "l.jsonl"
    lines.parent.mkdir()
    lines.write_text(json.dumps({"image": "x/a.jpg", "segmentation": encode_rle(LEFT)}) + "\n")
    assert list(open_all(lines, images=tmp_path / "photos")) == ["x/a"]
    with pytest.raises(SampleError, match="set --masks_images"):
        open_all(lines)
    lines.write_text(json.dumps({"image": "../photos/x/a.jpg", "segmentation": encode_rle(LEFT)}) + "\n")
    with pytest.raises(SampleError) as caught:
        open_all(lines)
    assert caught.value.reason == "unsafe_path"


def test_coco_json(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    save_image(root / "images/a.jpg")
    tree = {
        "images": [{"id": 3, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {"id": 1, "image_id": 3, "segmentation": encode_rle(LEFT), "caption": "left"},
            {"id": 2, "image_id": 3, "segmentation": [[22, 5, 38, 5, 38, 28, 22, 28]]},
        ],
    }
    (root / "annotations.json").write_text(json.dumps(tree))
    found = open_all(root)
    assert np.array_equal(found["a"]["2"][0], RIGHT)
    assert found["a"]["1"][1] == ("left",)
    del tree["images"][0]["height"]
    (root / "annotations.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="not a COCO file"):
        open_all(root)


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_classes_choose_hard_regions(tmp_path: Path, form: str) -> None:
    root = tmp_path / "mine"
    save_image(root / "images/a.jpg")
    regions = [
        {
            "id": number,
            "image_id": 3,
            "image": "a.jpg",
            "segmentation": encode_rle(box(0, 6 * number, 9, 6 * number + 5)),
        }
        for number in range(6)
    ]
    regions = [{**region, "category_id": number % 3} for number, region in enumerate(regions)]
    images = [{"id": 3, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}]
    lines = "\n".join(map(json.dumps, regions))
    text = json.dumps({"images": images, "annotations": regions}) if form == "json" else lines
    (root / f"list.{form}").write_text(text)
    data = {"masks_dir": str(root), "regions_per_image": 2, "index_dir": str(tmp_path / "index")}
    [random], [hard] = (build_sources(DataConfig(**data, region_choice=choice)) for choice in ("random", "hard"))
    for seed in range(10):
        first, other = map(int, hard.load(0, np.random.default_rng(seed)).region_ids)
        assert (other - first) % 3 == 0
        assert random.load(0, np.random.default_rng(seed)).region_ids[0] == str(first)


def test_limits_pass_over_and_say_when_nothing_is_left(png_root: Path) -> None:
    kept = open_all(png_root, max_area=float(LEFT.mean()))
    assert sorted(kept["many"]) == ["left"]
    with pytest.raises(SampleError) as caught:
        open_all(png_root, min_area=0.9)
    assert caught.value.reason == "no_region_left"


def test_a_mask_of_another_size_is_a_bad_sample(png_root: Path) -> None:
    save_mask(png_root / "masks/one.png", np.ones((60, 60)))
    source = MasksDir(png_root, index_dir=png_root.parent / "index")
    index = next(i for i in range(len(source)) if source.entry_id(i) == "one")
    with pytest.raises(SampleError) as caught:
        source.load(index, np.random.default_rng(0))
    assert caught.value.reason == "size_mismatch"


def test_an_image_is_turned_where_only_that_fits(png_root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    pixels = np.zeros((WIDTH, HEIGHT, 3), np.uint8)
    Image.fromarray(pixels).save(png_root / "images/one.jpg", exif=exif)
    assert open_all(png_root)["one"]["one"][0].shape == (HEIGHT, WIDTH)


def test_unclear_roots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not clear where the masks are"):
        MasksDir(tmp_path, index_dir=tmp_path / "index")
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"a\.jsonl, b\.json"):
        MasksDir(tmp_path, index_dir=tmp_path / "index")
    with pytest.raises(ConfigError, match="holds no image with a mask"):
        MasksDir(tmp_path / "a.jsonl", index_dir=tmp_path / "index")
    (tmp_path / "a.jsonl").write_text('{"image": 3}\n')
    with pytest.raises(ConfigError, match="line 1"):
        MasksDir(tmp_path / "a.jsonl", index_dir=tmp_path / "index")


def test_the_builder_opens_a_folder_or_a_file(png_root: Path) -> None:
    index = str(png_root.parent / "index")
    [source] = build_sources(DataConfig(masks_dir=str(png_root), masks_max_samples=2, index_dir=index))
    assert (source.name, len(source)) == ("masks", 2)
    with pytest.raises(ConfigError, match="no such folder"):
        build_sources(DataConfig(masks_dir=str(png_root / "nothing"), index_dir=index))

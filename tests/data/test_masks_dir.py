"""A user's own masks: the three layouts, captions, labels, and what is refused."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dual_loop.config import DataConfig
from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.dataset_builder import build_sources
from dual_loop.data.index import CHECKED
from dual_loop.data.masks_dir import MasksDir
from dual_loop.errors import ConfigError, SampleError
from dual_loop.types import RegionSample

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
    del tree["images"]
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


# --- half-broken folders and lists: what is there is read, what is not is counted -------------------------------------

BOX = [[2, 2, 18, 2, 18, 20, 2, 20]]
OTHER = [[22, 5, 38, 5, 38, 28, 22, 28]]


def coco(root: Path, annotations: list[dict[str, Any]], encoding: str = "utf-8", **image: Any) -> Path:
    """Write one image ``a.jpg`` (id 3) and ``annotations`` of it, which get ids."""
    save_image(root / "images/a.jpg")
    own = [{"id": number, "image_id": 3, **annotation} for number, annotation in enumerate(annotations)]
    images = [{"id": 3, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH, **image}]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    text = json.dumps({"images": images, "annotations": own, "categories": categories})
    (root / "annotations.json").write_text(text, encoding=encoding)
    return root


def read_all(root: Path, **options: Any) -> tuple[MasksDir, RegionSample]:
    source = MasksDir(root, index_dir=root.parent / "index", regions_per_image=99, **options)
    return source, source.load(0, np.random.default_rng(0))


def areas_of(sample: RegionSample) -> dict[str, int]:
    return dict(zip(sample.region_ids, (int(mask.sum()) for mask in sample.masks), strict=True))


GOOD = int(LEFT.sum())


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([], "bad_polygon"),
        ([[]], "bad_polygon"),
        ([[5.0, 5.0, 9.0, 9.0]], "bad_polygon"),
        ([5.0, 5.0, 9.0, 9.0], "bad_polygon"),
        (None, "bad_polygon"),
        ([[0.1, 0.1, 0.4, 0.1, 0.4, 0.6]], "bad_polygon"),
        ([[20, 20, float("nan"), 20, 8, 8]], "bad_polygon"),
        ([[20, 20, 30, 20, 25, 20]], "empty_mask"),
        ([[50, 5, 60, 5, 60, 9]], "empty_mask"),
        ({"size": [WIDTH, HEIGHT], "counts": [0, WIDTH * HEIGHT]}, "size_mismatch"),
        ({"size": [HEIGHT, WIDTH], "counts": "abc"}, "broken_rle"),
    ],
)
def test_one_bad_region_is_one_bad_region(tmp_path: Path, segmentation: object, reason: str) -> None:
    root = coco(tmp_path / "mine", [{"segmentation": BOX}, {"segmentation": segmentation}, {"segmentation": OTHER}])
    _, sample = read_all(root)
    assert sorted(sample.region_ids) == ["0", "2"]
    assert [(one.region_id, one.reason) for one in sample.passed_over] == [("1", reason)]


@pytest.mark.parametrize(
    "segmentation",
    [
        BOX[0],
        [BOX[0], [5.0, 5.0, 9.0, 9.0], []],
        [[[2, 2], [18, 2], [18, 20], [2, 20]]],
        [[2, 2], [18, 2], [18, 20], [2, 20]],
    ],
)
def test_polygons_as_tools_write_them(tmp_path: Path, segmentation: object) -> None:
    _, sample = read_all(coco(tmp_path / "mine", [{"segmentation": segmentation}]))
    assert areas_of(sample) == {"0": GOOD}


@pytest.mark.parametrize("text", ["<p>a cat</p>", "the [SEG] sign", "<IMG_CONTEXT>", "<img> x", 5, ["fine", 5]])
def test_a_caption_that_no_prompt_can_hold_is_a_bad_region(tmp_path: Path, text: object) -> None:
    root = coco(tmp_path / "mine", [{"segmentation": BOX, "caption": text}, {"segmentation": OTHER, "captions": None}])
    _, sample = read_all(root)
    [bad] = sample.passed_over
    assert (bad.region_id, bad.reason) == ("0", "special_token" if isinstance(text, str) else "broken_json")


def test_coco_lists_that_do_not_fit_together_are_counted(tmp_path: Path) -> None:
    root = coco(tmp_path / "mine", [{"segmentation": BOX, "captions": None, "caption": "a box", "category_id": 2}])
    tree = json.loads((root / "annotations.json").read_text())
    tree["images"] += [
        {"id": n, "file_name": name} for n, name in ((4, "b.jpg"), (5, "c.jpg"), (5, "d.jpg"), (6, "a.jpg"))
    ]
    tree["annotations"] += [
        {"id": 7, "image_id": 99, "segmentation": BOX},
        {"id": 8, "image_id": 5, "segmentation": BOX},
        {"id": 9, "image_id": 3, "segmentation": BOX, "iscrowd": 1},
        {"id": 10, "image_id": "4", "segmentation": BOX},
        {"id": 11.0, "image_id": 3.0, "segmentation": OTHER},
    ]
    (root / "annotations.json").write_text(json.dumps(tree), encoding="utf-8-sig")
    source, sample = read_all(root)
    assert areas_of(sample) == {"0": GOOD, "11": int(RIGHT.sum())}
    assert ("a box",) in sample.captions
    assert len(source) == 1
    counted = {what.split(" (")[0]: count for what, count in source.left_out.items()}
    assert counted == {
        "annotations of images that are not listed": 1,
        "annotations of an image id that two images have": 1,
        "crowds": 1,
        "images with an id that two have": 1,
        "images without an annotation": 1,
        "listed images that are not there": 1,
    }
    assert "9" in read_all(root, crowds=True)[1].region_ids


def test_class_names_of_categories(tmp_path: Path) -> None:
    root = coco(tmp_path / "mine", [{"segmentation": BOX, "category_id": 1}, {"segmentation": OTHER, "caption": "x"}])
    data = {"masks_dir": str(root), "regions_per_image": 9, "index_dir": str(tmp_path / "index")}
    found = {}
    for choice in ("off", "reference", "fallback"):
        [source] = build_sources(DataConfig(**data, class_captions=choice))
        sample = source.load(0, np.random.default_rng(0))
        texts = dict(zip(sample.region_ids, sample.captions, strict=True))
        found[choice] = (texts, dict(zip(sample.region_ids, sample.fallbacks, strict=False)))
    assert found == {
        "off": ({"0": (), "1": ("x",)}, {}),
        "reference": ({"0": ("cat",), "1": ("x",)}, {}),
        "fallback": ({"0": (), "1": ("x",)}, {"0": "cat", "1": None}),
    }


def test_sizes_come_from_the_image_where_the_list_has_none(tmp_path: Path) -> None:
    _, sample = read_all(coco(tmp_path / "mine", [{"segmentation": BOX}], height=None, width=None))
    assert areas_of(sample) == {"0": GOOD}


def test_absolute_paths_are_opened_on_request(tmp_path: Path) -> None:
    root = coco(tmp_path / "mine", [{"segmentation": BOX}], file_name=str(tmp_path / "mine/images/a.jpg"))
    with pytest.raises(SampleError, match="--allow_absolute_paths") as caught:
        read_all(root)
    assert caught.value.reason == "unsafe_path"
    _, sample = read_all(root, allow_absolute_paths=True)
    assert areas_of(sample) == {"0": GOOD}


def test_lists_are_found_where_tools_put_them(tmp_path: Path) -> None:
    cvat = coco(tmp_path / "cvat", [{"segmentation": BOX}])
    (cvat / "annotations").mkdir()
    (cvat / "annotations.json").rename(cvat / "annotations/instances_default.json")
    (cvat / "images/default").mkdir()
    (cvat / "images/a.jpg").rename(cvat / "images/default/a.jpg")
    for given in (cvat, cvat / "annotations/instances_default.json"):
        assert areas_of(read_all(given)[1]) == {"0": GOOD}
    splits = tmp_path / "roboflow"
    coco(splits / "train", [{"segmentation": BOX}])
    with pytest.raises(ConfigError, match=r"give one file.*train/annotations.json"):
        read_all(splits)
    panoptic = coco(tmp_path / "panoptic", [{"segments_info": []}])
    with pytest.raises(ConfigError, match="panoptic format is not read"):
        read_all(panoptic)


def test_labelme_and_yolo(tmp_path: Path) -> None:
    for folder in ("beside", "images"):
        root = tmp_path / folder
        save_image(root / "images/a.jpg")
        points = [[2, 2], [18, 2], [18, 20], [2, 20]]
        shapes = [{"label": "cat", "points": points, "shape_type": kind} for kind in ("polygon", "rectangle")]
        place = root / ("images/a.json" if folder == "images" else "a.json")
        place.write_text(json.dumps({"version": "5", "shapes": shapes, "imagePath": "..\\images\\a.jpg"}))
        source, sample = read_all(root)
        assert areas_of(sample) == {"0": GOOD}
        assert source.left_out == {"shapes that are no polygon ('rectangle')": 1}
        assert source.has_class_names
    yolo = tmp_path / "yolo"
    save_image(yolo / "images/train/a.jpg")
    (yolo / "labels/train").mkdir(parents=True)
    line = "1 " + " ".join(f"{x / WIDTH} {y / HEIGHT}" for x, y in ((2, 2), (18, 2), (18, 20), (2, 20)))
    (yolo / "labels/train/a.txt").write_text(f"{line}\n0 0.5 0.5 0.1 0.1\nx\n")
    (yolo / "labels/train/b.txt").write_text(line)
    (yolo / "data.yaml").write_text("names: [cat, dog]\n")
    source, sample = read_all(yolo)
    assert areas_of(sample) == {"0": GOOD}
    assert source._region(0)["class_name"] == "dog"
    assert sorted(source.left_out.values()) == [1, 1, 1]


def test_a_broken_line_is_left_out(tmp_path: Path) -> None:
    save_image(tmp_path / "mine/images/a.jpg")
    good = json.dumps({"image": "images/a.jpg", "segmentation": BOX})
    (tmp_path / "mine/m.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{good}\r\n{good[:30]}\r\n{good}\r\n".encode())
    source, sample = read_all(tmp_path / "mine")
    assert sample.num_regions == 2
    [(what, count)] = source.left_out.items()
    assert (count, "line 2" in what) == (1, True)


def test_what_has_no_partner_is_counted_and_names_are_compared_as_people_see_them(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    for name in ("caf\u00e9.JPG", "b.jpg", "lonely.png", "c.d.jpg"):
        save_image(root / "images" / name)
    (root / "images/x.gif").write_bytes(b"GIF89a")
    save_mask(root / "masks/cafe\u0301.PNG", LEFT * 255)
    save_mask(root / "masks/b_mask.png", LEFT * 255)
    save_mask(root / "masks/b.png", LEFT * 255)
    save_mask(root / "masks/c.d.jpg.png", LEFT * 255)
    (root / "masks/b.svg").write_text("<svg/>")
    captions = {"caf\u00e9": "a box", "b.png": "by its file name", "c.d.jpg": None, "nothing": "x"}
    (root / "captions.json").write_text(json.dumps(captions), encoding="utf-8-sig")
    found = open_all(root)
    assert sorted(found) == ["b", "c.d", "caf\u00e9"]
    assert found["caf\u00e9"]["caf\u00e9"][1] == ("a box",)
    assert found["b"]["b"][1] == ("by its file name",)
    source = MasksDir(root, index_dir=tmp_path / "index")
    assert source.contents == "3 images, 3 regions, 2 of them with captions (mask files)"
    assert source.left_out == {
        "files in images/ of a format that is not read (.gif) (the first: x.gif)": 1,
        "files in masks/ of a format that is not read (.svg) (the first: b.svg)": 1,
        "masks without an image of their name (the first: b_mask.png)": 1,
        "images without a mask of their name (the first: lonely.png)": 1,
        "captions without a mask (the first: nothing)": 1,
    }


def test_two_images_of_one_name_own_no_mask(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png"):
        save_image(tmp_path / "mine/images" / name)
    save_mask(tmp_path / "mine/masks/a.png", LEFT * 255)
    with pytest.raises(ConfigError, match="1 masks that two images could own"):
        read_all(tmp_path / "mine")


def test_what_is_on_disk_now_is_what_is_read(png_root: Path) -> None:
    def overwrite(path: Path, write: Any) -> None:
        """Write into the same file, so that its folder does not change, at a later time."""
        folder = path.parent.stat()
        write()
        later = path.stat().st_mtime_ns + 10**9
        os.utime(path, ns=(later, later))
        os.utime(path.parent, ns=(folder.st_atime_ns, folder.st_mtime_ns))

    captions = png_root / "captions.json"
    captions.write_text(json.dumps({"one": "old"}))
    assert open_all(png_root)["one"]["one"][1] == ("old",)
    overwrite(captions, lambda: captions.write_text(json.dumps({"one": "new"})))
    assert open_all(png_root)["one"]["one"][1] == ("new",)
    path = png_root / "masks/map.png"
    overwrite(path, lambda: save_mask(path, LEFT * 1 + RIGHT * 3, "P"))
    assert sorted(open_all(png_root)["map"]) == ["map#1", "map#3"]
    CHECKED.clear()
    open_all(png_root)
    assert CHECKED["masks"][0] >= 11


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_decides_where_the_shapes_cannot_tell(tmp_path: Path, orientation: int) -> None:
    shown = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    shown[LEFT] = 200
    stored = Image.fromarray(shown)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "mine/images").mkdir(parents=True)
    stored.save(tmp_path / "mine/images/a.png", exif=exif)
    save_mask(tmp_path / "mine/masks/a.png", LEFT * 255)
    for choice in ("apply", "ignore"):
        [source] = build_sources(
            DataConfig(masks_dir=str(tmp_path / "mine"), index_dir=str(tmp_path / "i"), exif=choice)
        )
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            sample = source.load(0, np.random.default_rng(0))
        fits_shown = bool((sample.image[..., 0] > 100)[sample.masks[0]].all())
        assert fits_shown == (choice == "apply" or orientation not in (2, 3, 4))
        assert any("data.exif" in str(one.message) for one in warned) == (orientation in (2, 3, 4))


@pytest.mark.parametrize(("share", "expected"), [(0.25, 3), (0.01, 1), (0.9, 9)])
def test_a_share_of_the_images_is_left_to_validation(tmp_path: Path, share: float, expected: int) -> None:
    for number in range(10):
        save_image(tmp_path / f"images/{number}.png", seed=number)
        save_mask(tmp_path / f"masks/{number}.png", box(0, 0, 9, 9))

    def names(**own: Any) -> list[str]:
        source = MasksDir(tmp_path, index_dir=tmp_path / "cache", **own)
        return [source.entry_id(index) for index in range(len(source))]

    left, rest = names(left_to_val=share, is_val=True), names(left_to_val=share)
    assert len(left) == expected
    assert sorted(left + rest) == names() == sorted(map(str, range(10)))
    assert set(names(left_to_val=share, max_samples=2)) < set(rest) or len(rest) <= 2

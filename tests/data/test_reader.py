"""What all readers share: regions are drawn until enough pass, and only those are decoded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_source import FakeSource

from dual_loop.config import Config, DataConfig
from dual_loop.data.dataset_builder import build_dataset, open_source
from dual_loop.data.images import Picture
from dual_loop.data.prepare import Geometry
from dual_loop.data.reader import Drawn, Reader, most_alike
from dual_loop.errors import SampleError
from dual_loop.testing.demo_data import demo_directories, write_demo_data
from dual_loop.testing.scenes import COLOURS


def test_regions_are_drawn_until_enough_pass_the_limits(tmp_path: Path) -> None:
    reader = Reader(tmp_path, regions_per_image=2, min_area=0.1, max_area=0.5)
    masks = np.zeros((6, 10, 10), bool)
    for number, rows in enumerate((0, 1, 2, 5, 6, 10)):
        masks[number, :rows] = True
    decoded: list[int] = []

    def decode(number: int) -> np.ndarray:
        decoded.append(number)
        return masks[number]

    for seed in range(20):
        decoded.clear()
        numbers, drawn, passed_over = reader._draw(np.random.default_rng(seed), 6, decode, "image")
        assert set(numbers) < {1, 2, 3}
        assert len(numbers) == 2
        assert {region.reason for region in passed_over} <= {"empty_mask"}
        assert np.array_equal(drawn, masks[numbers])
        assert decoded[-1] == numbers[-1], "nothing is decoded once there are enough"
        assert [number for number in decoded if number in numbers] == numbers
    with pytest.raises(SampleError, match=r"image.*2 masks.*0\.1 to 0\.5") as caught:
        reader._draw(np.random.default_rng(0), 2, lambda number: masks[5 * number], "image")
    assert caught.value.reason == "no_region_left"


def test_class_names_are_captions_of_the_lowest_rank(tmp_path: Path) -> None:
    class Named(Reader):
        def entry_id(self, index: int) -> str:
            return "a"

    reader, picture = Named(tmp_path), Picture(np.zeros((4, 4, 3), np.uint8), (4, 4))
    found = {}
    for choice in ("off", "reference", "fallback"):
        reader.class_captions = choice
        drawn, captions = Drawn([0, 1, 2], [np.ones((4, 4), bool)] * 3, []), [("a tabby",), (), ()]
        sample = reader._sample(0, picture, drawn, ["0", "1", "2"], captions, class_names=["cat", "dog", None])
        found[choice] = (sample.captions, sample.fallbacks)
    assert found == {
        "off": ((("a tabby",), (), ()), ()),
        "reference": ((("a tabby",), ("dog",), ()), ()),
        "fallback": ((("a tabby",), (), ()), ("cat", "dog", None)),
    }


def test_a_region_that_cannot_be_used_is_passed_over(tmp_path: Path) -> None:
    reader = Reader(tmp_path, regions_per_image=9)
    reader.vanishes = lambda mask: np.count_nonzero(mask) < 3

    def decode(number: int) -> np.ndarray:
        if number < 2:
            raise SampleError("bad_polygon", f"region {number} has two points")
        mask = np.zeros((10, 10), bool)
        mask.flat[: (0, 2, 40, 50)[number - 2]] = True
        return mask

    numbers, masks, passed = reader._draw(
        np.random.default_rng(0), 6, decode, "image", region_id=lambda number: f"r{number}"
    )
    assert sorted(numbers) == [4, 5]
    assert len(masks) == 2
    reasons = {region.region_id: region.reason for region in passed}
    assert reasons == {"r0": "bad_polygon", "r1": "bad_polygon", "r2": "empty_mask", "r3": "target_vanished"}
    with pytest.raises(SampleError, match=r"region [01] has two points") as caught:
        reader._draw(np.random.default_rng(0), 2, decode, "image")
    assert caught.value.reason == "bad_polygon"


def test_what_is_most_alike_comes_first_and_parts_come_last() -> None:
    image, masks = np.zeros((10, 10, 3), np.uint8), np.zeros((5, 10, 10), bool)
    for number, (column, colour) in enumerate([(0, 200), (2, 190), (4, 20), (6, 100)]):
        masks[number, :, column : column + 2] = True
        image[:, column : column + 2] = colour
    masks[4, :5, :2] = True  # a part of the first
    assert most_alike(masks, image, [None] * 5) == [0, 1, 3, 2, 4]
    assert most_alike(masks, image, ["cat", "dog", "cat", "dog", "cat"]) == [0, 2, 1, 3, 4]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    write_demo_data(out, 40, seed=1, sources=("sa1b", "openimages", "refcoco"), num_val=0)
    return out


@pytest.mark.parametrize("name", ["sa1b", "openimages", "refcoco"])
def test_hard_regions_share_class_or_colour_more_often(demo: Path, tmp_path: Path, name: str) -> None:
    palette = np.array(list(COLOURS.values()))

    def open_one(choice: str) -> Reader:
        folders = {key: path for key, path in demo_directories(demo).items() if key.startswith(name[:4])}
        settings = {"regions_per_image": 2, "index_dir": str(tmp_path), "refcoco_datasets": ("refcoco",)}
        return open_source(name, DataConfig(**folders, **settings, region_choice=choice))

    def pairs(source: Reader, is_class: bool) -> tuple[list[str], float, list[tuple[str, ...]]]:
        firsts, shared, drawn = [], [], []
        for index in range(len(source)):
            sample = source.load(index, np.random.default_rng(index))
            colours = [np.square(palette - sample.image[mask].mean(0)).sum(1).argmin() for mask in sample.masks]
            kinds = [text[0].split()[-1] for text in sample.captions] if name == "refcoco" else sample.region_ids
            found = [kind.split("_")[0] for kind in kinds] if is_class else colours
            firsts.append(sample.region_ids[0])
            shared.append(found[0] == found[-1])
            drawn.append(sample.region_ids)
        return firsts, float(np.mean(shared)), drawn

    is_class = name != "sa1b"
    random, hard, again = (pairs(open_one(choice), is_class) for choice in ("random", "hard", "hard"))
    assert random[0] == hard[0], "the first region is drawn as ever"
    assert hard[2] == again[2]
    assert hard[1] >= random[1] + 0.15


def test_hard_regions_are_chosen_on_images_in_full() -> None:
    data = DataConfig(decode_scale="needed", region_choice="hard")
    sizes = Geometry(64, 8, 64, 16)
    for choice, scale in (("hard", "full"), ("random", "needed")):
        config = Config(data=replace(data, region_choice=choice))
        assert build_dataset(config, sizes, [FakeSource("sa1b", 2)]).decode_scale == scale


def test_a_reader_without_any_way_to_load_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError):
        Reader(tmp_path).load(0, np.random.default_rng(0))

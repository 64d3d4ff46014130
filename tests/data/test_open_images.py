"""Open Images: grouped rows, masks at another size, aspect and EXIF policy, class names, damaged files."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dual_loop.config import DataConfig
from dual_loop.data import open_images
from dual_loop.data.dataset_builder import open_source
from dual_loop.data.images import read_picture
from dual_loop.data.open_images import OpenImages
from dual_loop.data.string_table import StringTable
from dual_loop.errors import ConfigError, SampleError

REAL = Path(__file__).resolve().parents[3] / "shared/data/real_samples/openimages"
HEADER = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
CSV_NAME = "train-annotations-object-segmentation.csv"


def make_mask(height: int, width: int, corner: str = "left") -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[: height // 2, : width // 2] = corner == "left"
    mask[height // 2 :, width // 2 :] = corner == "right"
    return mask


class Tree:
    """An Open Images tree that tests add images and masks to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: list[str] = []
        for folder in ("images/train", "masks/train"):
            (root / folder).mkdir(parents=True)

    def add_image(self, image_id: str, size: tuple[int, int] = (30, 40), **save_options: Any) -> None:
        pixels = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.root / f"images/train/{image_id}.jpg", **save_options)

    def add_mask(self, image_id: str, box_id: str, mask: np.ndarray | None, label: str = "/m/04yx4") -> str:
        name = f"{image_id}_{label.replace('/', '')}_{box_id}.png"
        if mask is not None:
            Image.fromarray(mask).save(self.root / "masks/train" / name)
        self.rows.append(f"{name},{image_id},{label},{box_id},0.1,0.5,0.2,0.6,0.9,0.3 0.4 1;0.5 0.5 0")
        return name

    def write_csv(self, header: str = HEADER) -> None:
        (self.root / CSV_NAME).write_text("\n".join([header, *self.rows]) + "\n")

    def source(self, **options: Any) -> OpenImages:
        return OpenImages(self.root, index_dir=self.root.parent / "cache", **options)

    def reason(self, **options: Any) -> str:
        with pytest.raises(SampleError) as caught:
            self.source(**options).load(0, np.random.default_rng(0))
        return caught.value.reason


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "data")


def test_rows_are_grouped_by_image_wherever_they_stand(tree: Tree) -> None:
    for image_id in ("bb", "aa"):
        tree.add_image(image_id)
    for box in range(3):
        for image_id in ("bb", "aa"):
            tree.add_mask(image_id, f"box{box}", make_mask(30, 40))
    tree.rows.append(tree.rows[0])
    tree.write_csv()
    source = tree.source(regions_per_image=10)
    assert [source.entry_id(i) for i in range(len(source))] == ["aa", "bb"]
    for index in range(2):
        sample = source.load(index, np.random.default_rng(0))
        assert sorted(sample.region_ids) == ["m04yx4_box0", "m04yx4_box1", "m04yx4_box2"]
        assert sample.sample_id == source.entry_id(index)
        assert (sample.source, sample.captions) == ("openimages", ((), (), ()))


def test_a_reduced_image_keeps_regions_and_masks(tree: Tree) -> None:
    tree.add_image("aa", (301, 403))
    for box in range(3):
        tree.add_mask("aa", f"box{box}", make_mask(150, 201))
    tree.write_csv()
    source = tree.source(regions_per_image=2)
    full = source.load(0, np.random.default_rng(3))
    reduced = source.load_reduced(0, np.random.default_rng(3), lambda height, width: (64, 64))
    assert (reduced.image.shape, reduced.image_reduction) == ((76, 101, 3), 4)
    assert np.array_equal(reduced.masks, full.masks)
    assert reduced.region_ids == full.region_ids


def test_masks_of_another_resolution_are_resized(tree: Tree) -> None:
    tree.add_image("aa", (427, 640))
    tree.add_mask("aa", "x", make_mask(533, 800))
    tree.write_csv()
    sample = tree.source().load(0, np.random.default_rng(0))
    assert sample.masks.shape == (1, 427, 640)
    assert abs(sample.masks.mean() - 0.25) < 0.005
    assert sample.masks[0, :200, :300].all()


def test_the_draw_depends_on_the_generator_alone(tree: Tree) -> None:
    tree.add_image("aa")
    for box in range(4):
        tree.add_mask("aa", f"box{box}", make_mask(30, 40))
    tree.write_csv()
    source = tree.source(regions_per_image=2)
    draws = [source.load(0, np.random.default_rng(seed)).region_ids for seed in range(100)]
    assert len(set(draws)) == 12
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.load(0, np.random.default_rng(seed)).region_ids for seed in range(100)] == draws


@pytest.mark.parametrize(("size", "fits"), [((30, 40), True), ((60, 79), False), ((600, 803), True), ((40, 30), False)])
def test_aspect_ratios_agree_within_one_percent(tree: Tree, size: tuple[int, int], fits: bool) -> None:
    tree.add_image("aa", (30, 40))
    tree.add_mask("aa", "x", make_mask(*size))
    tree.write_csv()
    if fits:
        assert tree.source().load(0, np.random.default_rng(0)).masks.shape == (1, 30, 40)
    else:
        assert tree.reason() == "aspect_mismatch"


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_exif_is_applied_only_where_the_mask_asks_for_it(tree: Tree) -> None:
    tree.add_image("aa", (30, 40), exif=orientation(6))
    tree.add_mask("aa", "x", make_mask(80, 60))
    tree.add_image("bb", (30, 40), exif=orientation(6))
    tree.add_mask("bb", "x", make_mask(60, 80))
    tree.add_image("cc", (30, 40), exif=orientation(3))
    tree.add_mask("cc", "x", make_mask(30, 40))
    tree.write_csv()
    turned, stored = (tree.source().load(i, np.random.default_rng(0)) for i in range(2))
    with pytest.warns(UserWarning, match="fit either way"):
        upside_down = tree.source().load(2, np.random.default_rng(0))
    assert turned.image.shape == (40, 30, 3)
    assert turned.masks.shape == (1, 40, 30)
    assert np.array_equal(turned.image, np.rot90(stored.image, -1))
    assert stored.image.shape == (30, 40, 3)
    assert np.array_equal(upside_down.image, stored.image)


@pytest.mark.parametrize("choice", ["ignore", "apply"])
def test_exif_decides_where_the_shapes_cannot_tell(tree: Tree, choice: str) -> None:
    tree.add_image("aa", (30, 40), exif=orientation(3))
    tree.add_mask("aa", "x", make_mask(30, 40))
    tree.write_csv()
    source = tree.source()
    stored = read_picture(source.image_path(0), apply_exif=False).pixels
    source.exif = choice
    with pytest.warns(UserWarning, match=f"its masks fit either way.*data.exif = {choice}"):
        sample = source.load(0, np.random.default_rng(0))
    assert np.array_equal(sample.image, stored if choice == "ignore" else stored[::-1, ::-1])


def test_masks_of_both_orientations_are_a_mismatch(tree: Tree) -> None:
    tree.add_image("aa", (30, 40), exif=orientation(6))
    tree.add_mask("aa", "x", make_mask(30, 40))
    tree.add_mask("aa", "y", make_mask(40, 30))
    tree.write_csv()
    sample = tree.source(regions_per_image=2).load(0, np.random.default_rng(0))
    assert (sample.num_regions, [one.reason for one in sample.passed_over]) == (1, ["aspect_mismatch"])


def test_empty_masks_are_passed_over(tree: Tree) -> None:
    tree.add_image("aa")
    tree.add_mask("aa", "full", make_mask(30, 40))
    for box in range(5):
        tree.add_mask("aa", f"empty{box}", np.zeros((30, 40), bool))
    tree.add_image("bb")
    tree.add_mask("bb", "empty", np.zeros((30, 40), bool))
    tree.write_csv()
    source = tree.source(regions_per_image=3)
    for seed in range(5):
        assert source.load(0, np.random.default_rng(seed)).region_ids == ("m04yx4_full",)
    with pytest.raises(SampleError) as caught:
        source.load(1, np.random.default_rng(0))
    assert caught.value.reason == "no_region_left"


def test_faults_have_their_own_reasons(tree: Tree) -> None:
    tree.add_image("aa")
    name = tree.add_mask("aa", "x", make_mask(300, 400))
    tree.write_csv()
    path, image = tree.root / "masks/train" / name, tree.root / "images/train/aa.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert tree.reason() == "truncated_file"
    path.write_text("<html>")
    assert tree.reason() == "not_an_image"
    path.unlink()
    assert tree.reason() == "missing_file"
    path.write_bytes(whole)
    image.unlink()
    assert tree.reason() == "missing_file"


@pytest.mark.parametrize(("mask", "image"), [("../../secret.png", "aa"), ("/etc/passwd", "aa"), ("x.png", "../../aa")])
def test_names_in_the_csv_cannot_leave_the_folders(tree: Tree, mask: str, image: str) -> None:
    Image.fromarray(make_mask(30, 40)).save(tree.root / "masks/train/x.png")
    Image.fromarray(make_mask(30, 40)).save(tree.root / "secret.png")
    tree.add_image("aa")
    tree.rows.append(f"{mask},{image},/m/1,b,0,1,0,1,,")
    tree.write_csv()
    assert tree.reason() == "unsafe_path"


def test_the_order_of_columns_does_not_matter(tree: Tree) -> None:
    tree.add_image("aa")
    name = tree.add_mask("aa", "x", make_mask(30, 40))
    tree.rows = [f"aa,/m/04yx4,{name}"]
    tree.write_csv("ImageID,LabelName,MaskPath")
    assert tree.source().load(0, np.random.default_rng(0)).region_ids == ("m04yx4_x",)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "an empty file"),
        ("a,b,c\n1,2,3\n", "another header"),
        (HEADER + "\n", "no row"),
        (HEADER + "\nx.png,aa,/m/1,b,0,1,0,1,,\ny.png,aa,/m/1", "line 3"),
        (HEADER + "\n,aa,/m/1,b,0,1,0,1,,\n", "line 2"),
        (HEADER + "\nx.png,aa,/m/1,b,0,1,0,1,,\ny.png," + "a" * 252 + ",/m/1,b,0,1,0,1,,\n", "line 3.*251 bytes"),
        (HEADER + "\nx.png,aa\0,/m/1,b,0,1,0,1,,\n", "line 2.*without NUL"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_broken_csv_stops_the_start(tree: Tree, text: str | bytes, match: str) -> None:
    (tree.root / CSV_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=match) as caught:
        tree.source()
    assert CSV_NAME in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.sampled_from(["a", "b", "ab", "é", "image-0000", "10", "9"]), min_size=1, max_size=30))
def test_grouping_equals_a_dict_for_ids_of_any_length(ids: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_images, "_CHUNK_ROWS", 4)  # ids of a later chunk may be longer
        tree = Tree(Path(folder) / "data")
        expected: dict[str, list[str]] = {}
        for number, image_id in enumerate(ids):
            expected.setdefault(image_id, []).append(tree.add_mask(image_id, str(number), None))
        tree.write_csv()
        arrays = tree.source()._build_index()
    paths, starts = StringTable.from_arrays(arrays, "mask_path"), arrays["row_starts"]
    names = StringTable.from_arrays(arrays, "image_id")
    assert names.slice(0, len(names)) == sorted(expected)
    for entry, image_id in enumerate(sorted(expected)):
        rows = arrays["rows"][starts[entry] : starts[entry + 1]]
        assert [paths[row] for row in rows.tolist()] == expected[image_id]


def test_parts_elsewhere_and_missing_parts(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.add_image("aa")
    tree.add_mask("aa", "x", make_mask(30, 40))
    tree.write_csv()
    (tree.root / "images").rename(tmp_path / "photos")
    (tree.root / CSV_NAME).rename(tree.root / "rows.csv")
    (tree.root / "masks/train").rename(tree.root / "pngs")
    with pytest.raises(ConfigError, match="openimage_csv"):
        tree.source()
    with pytest.raises(ConfigError, match="openimage_images"):
        tree.source(csv="rows.csv")
    with pytest.raises(ConfigError, match="openimage_masks"):
        tree.source(csv="rows.csv", images=tmp_path / "photos/train")
    with pytest.raises(ConfigError, match="openimage_classes"):
        tree.source(csv="rows.csv", images=tmp_path / "photos/train", masks="pngs", classes="none.csv")
    monkeypatch.chdir(tmp_path)
    source = tree.source(csv="rows.csv", images="photos/train", masks="pngs")
    assert source.load(0, np.random.default_rng(0)).num_regions == 1
    with pytest.raises(ConfigError, match="does not exist"):
        OpenImages(tmp_path / "absent")


def test_of_partial_downloads_what_is_there_is_an_entry_and_the_rest_is_counted(tree: Tree) -> None:
    for digit in "012":
        for number in range(3):
            image_id = f"{digit}{number:03}"
            if digit < "2":
                tree.add_image(image_id)
            for box in "xyz":
                name = tree.add_mask(image_id, box, make_mask(30, 40) if digit != "1" else None)
                if box == "y" and digit == "0":
                    (tree.root / "masks/train" / name).unlink()
    (tree.root / "masks/train/train-masks-1.zip").write_bytes(b"PK")
    tree.write_csv()
    source = tree.source(regions_per_image=9)
    assert [source.entry_id(i) for i in range(len(source))] == ["0000", "0001", "0002"]
    for index in range(3):
        sample = source.load(index, np.random.default_rng(0))
        assert sorted(sample.region_ids) == ["m04yx4_x", "m04yx4_z"]
        assert not sample.passed_over
    assert list(source.left_out.values()) == [3 + 9, 3, 3, 1]
    tree.add_image("2000")
    assert len(tree.source()) == 4, "what comes later is found at the next start"


def test_unpacked_shards_may_stay_in_their_folders(tree: Tree) -> None:
    for image_id in ("0a", "1a"):
        tree.add_image(image_id)
        name = tree.add_mask(image_id, "x", make_mask(30, 40))
        for kind, file, folder in (
            ("masks", name, f"train-masks-{image_id[0]}"),
            ("images", f"{image_id}.jpg", "train_0"),
        ):
            (tree.root / kind / "train" / folder).mkdir(exist_ok=True)
            (tree.root / kind / "train" / file).rename(tree.root / kind / "train" / folder / file)
    (tree.root / "images/train/train_0/1a.jpg").rename(tree.root / "images/train/train_0/1a.JPG")
    tree.write_csv()
    source = tree.source()
    assert len(source) == 2
    assert not any(source.left_out.values())
    for index in range(2):
        assert source.load(index, np.random.default_rng(0)).region_ids == ("m04yx4_x",)
    assert source.image_path(1) == tree.root / "images/train/train_0/1a.JPG"


@pytest.mark.parametrize(
    ("image", "mask", "fits"),
    [
        ((7, 60), (100, 900), True),
        ((171, 256), (683, 1024), True),
        ((60, 7), (900, 100), True),
        ((8, 60), (100, 900), False),
    ],
)
def test_sides_that_were_rounded_to_pixels_fit(
    tree: Tree, image: tuple[int, int], mask: tuple[int, int], fits: bool
) -> None:
    tree.add_image("aa", image)
    tree.add_mask("aa", "x", make_mask(*mask))
    tree.write_csv()
    if fits:
        assert tree.source().load(0, np.random.default_rng(0)).masks.shape == (1, *image)
    else:
        assert tree.reason() == "aspect_mismatch"


@pytest.mark.parametrize(
    "text", ["LabelName,DisplayName\n/m/04yx4,Man\n", "/m/04yx4,Man\n/m/05,Plane\n", "\ufeff/m/04yx4,Man\r\n"]
)
def test_class_descriptions_are_captions_of_lowest_rank(tree: Tree, text: str) -> None:
    tree.add_image("aa")
    tree.add_mask("aa", "x", make_mask(30, 40))
    tree.add_mask("aa", "y", make_mask(30, 40), "/m/0unknown")
    tree.write_csv()
    (tree.root / "oidv7-class-descriptions.csv").write_text(text, encoding="utf-8", newline="")

    def read(mode: str) -> tuple[Any, Any]:
        config = DataConfig(
            openimage_dir=str(tree.root),
            class_captions=mode,
            regions_per_image=2,
            index_dir=str(tree.root.parent / "c"),
        )
        sample = open_source("openimages", config).load(0, np.random.default_rng(0))
        order = np.argsort(sample.region_ids)
        return [sample.captions[n] for n in order], [sample.fallbacks[n] for n in order if sample.fallbacks]

    assert read("off") == ([(), ()], [])
    assert read("reference") == ([(), ("Man",)][::-1], [])
    assert read("fallback") == ([(), ()], ["Man", None])


def test_class_descriptions_that_are_not_there_or_none_are_explained(tree: Tree) -> None:
    tree.add_image("aa")
    tree.add_mask("aa", "x", make_mask(30, 40))
    tree.write_csv()
    source = tree.source()
    with pytest.raises(ConfigError, match="class captions need the class descriptions"):
        source.read_classes()
    for content in (b"", b"ImageID,Confidence\n1,2\n", b"\xff\xfe/\0"):
        (tree.root / "class-descriptions-boxable.csv").write_bytes(content)
        with pytest.raises(ConfigError, match=r"class descriptions .*class-descriptions-boxable\.csv"):
            source.read_classes()


def test_rows_with_and_without_quotation_marks_are_read_as_csv(tree: Tree) -> None:
    for image_id in "abcd":
        tree.add_image(image_id)
        tree.add_mask(image_id, "x", make_mask(30, 40))
    tree.rows[2] = tree.rows[2].replace("0.3 0.4 1;", '"0.3 0.4 1;') + '"\r\n'
    tree.rows[3] = '"' + tree.rows[3].replace(",d,", '","d",')
    tree.write_csv()
    source = tree.source()
    assert [source.entry_id(i) for i in range(len(source))] == ["a", "b", "c", "d"]
    tree.rows[3] = "x.png"
    tree.write_csv()
    with pytest.raises(ConfigError, match="line 6"):
        tree.source()


def test_cap_keeps_a_subset(tree: Tree) -> None:
    for n in range(40):
        tree.add_mask(f"{n:016x}", "x", None)
    tree.write_csv()
    everything = {tree.source().entry_id(i) for i in range(40)}
    capped = tree.source(max_samples=7)
    kept = [capped.entry_id(i) for i in range(len(capped))]
    assert len(kept) == 7
    assert set(kept) < everything
    assert kept != sorted(everything)[:7]


def test_a_changed_csv_is_noticed(tree: Tree) -> None:
    tree.add_mask("aa", "x", None)
    tree.write_csv()
    assert len(tree.source()) == 1
    tree.add_mask("bb", "x", None)
    tree.write_csv()
    assert len(tree.source()) == 2


@pytest.mark.skipif(not REAL.is_dir(), reason="the real samples are not beside the repository")
def test_real_samples_load(tmp_path: Path) -> None:
    source = OpenImages(REAL, regions_per_image=99, index_dir=tmp_path)
    assert len(source) == 2
    samples = [source.load(i, np.random.default_rng(0)) for i in range(2)]
    assert sum(sample.num_regions for sample in samples) == 36
    labels = {region.split("_")[0] for sample in samples for region in sample.region_ids}
    assert labels == {"m01g317", "m03k3r", "m07r04"}

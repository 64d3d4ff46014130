"""The generated data set: scenes are deterministic, captions exact, masks true, files in the documented formats."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from dual_loop.data import demo
from dual_loop.data.demo_scenes import (
    CLEAR_SIZE_RATIO,
    COLOURS,
    GLYPHS,
    POSITION_WORDS,
    Scene,
    SceneOptions,
    generate_pair,
    generate_scene,
    movable_objects,
    paraphrases,
    pool_seed,
)
from dual_loop.data.refcoco import RefCoco
from dual_loop.errors import ConfigError

SEEDS = st.integers(0, 2**63 - 1)
TWINS = SceneOptions(twin_probability=1.0)
NUM_IMAGES = 6
GOLDEN_SHAPE = (160, 128, 3)
GOLDEN_CAPTIONS = ("the purple star", "the blue cross", "the green cross", "the yellow star")
GOLDEN_AREAS = [476, 795, 577, 298]


def describe(scene: Scene, index: int) -> str:
    """Write the caption of an object anew, from shape, colour, size and centre alone."""
    item = scene.objects[index]
    twins = [o for i, o in enumerate(scene.objects) if i != index and (o.shape, o.colour) == (item.shape, item.colour)]
    if not twins:
        return f"the {item.colour} {item.shape}"
    (twin,) = twins
    if max(item.size, twin.size) / min(item.size, twin.size) >= CLEAR_SIZE_RATIO:
        return f"the {'large' if item.size > twin.size else 'small'} {item.colour} {item.shape}"
    height, width = scene.image.shape[:2]
    offset_x, offset_y = (item.centre[0] - twin.centre[0]) / width, (item.centre[1] - twin.centre[1]) / height
    if abs(offset_x) > abs(offset_y):
        return f"the {item.colour} {item.shape} on the {'right' if offset_x > 0 else 'left'}"
    return f"the {item.colour} {item.shape} at the {'bottom' if offset_y > 0 else 'top'}"


class TestScenes:
    @settings(max_examples=40, deadline=None)
    @given(seed=SEEDS, twins=st.booleans())
    def test_captions_are_true_and_unique_and_masks_disjoint_and_visible(self, seed: int, twins: bool) -> None:
        scene = generate_scene(seed, TWINS if twins else SceneOptions())
        assert 2 <= len(scene.objects) <= 4
        assert scene.image.dtype == np.uint8
        assert scene.image.shape[0] in (128, 144, 160)
        assert scene.image.shape[1] in (128, 144, 160)
        assert scene.masks.dtype == bool
        assert scene.masks.shape == (len(scene.objects), *scene.image.shape[:2])
        assert scene.captions == tuple(describe(scene, i) for i in range(len(scene.objects)))
        assert len(set(scene.captions)) == len(scene.captions)
        assert scene.masks.sum(axis=0).max() == 1
        assert scene.masks.sum(axis=(1, 2)).min() >= 60
        assert all(0.45 <= item.visible_fraction <= 1 for item in scene.objects)

    def test_the_same_seed_gives_the_same_scene_and_another_seed_another(self) -> None:
        first, again, other = generate_scene(7), generate_scene(7), generate_scene(8)
        np.testing.assert_array_equal(first.image, again.image)
        np.testing.assert_array_equal(first.masks, again.masks)
        assert first.captions == again.captions
        assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)

    def test_the_generator_still_draws_what_its_version_drew(self) -> None:
        """Captions and layout of version 2; a change of the drawing order has to raise GENERATOR_VERSION."""
        scene = generate_scene(3)
        assert scene.image.shape == GOLDEN_SHAPE
        assert scene.captions == GOLDEN_CAPTIONS
        # Glyph outlines may differ by a few pixels between FreeType versions.
        np.testing.assert_allclose(scene.masks.sum(axis=(1, 2)), GOLDEN_AREAS, rtol=0.02)

    @settings(max_examples=20, deadline=None)
    @given(seed=SEEDS)
    def test_pixels_have_the_colour_that_the_caption_names(self, seed: int) -> None:
        scene = generate_scene(seed)
        names = list(COLOURS)
        table = np.asarray([COLOURS[name] for name in names])
        for item in scene.objects:
            median = np.median(scene.image[item.mask], axis=0)
            assert names[int(np.abs(table - median).sum(axis=1).argmin())] == item.colour

    def test_masks_fit_the_drawn_objects_to_the_pixel(self) -> None:
        """Saturated pixels lie inside the masks and dull ones outside, but for the blended rim and faint thin tips."""
        for seed in range(20):
            scene = generate_scene(seed)
            spread = scene.image.max(axis=2).astype(int) - scene.image.min(axis=2)
            union = scene.masks.any(axis=0)
            grown = union.copy()
            for axis in (0, 1):
                grown |= np.roll(union, 1, axis) | np.roll(union, -1, axis)
            assert (spread[~grown] > 60).sum() <= 3
            assert np.percentile(spread[~grown], 99) <= 45
            assert (spread[union] > 60).mean() > 0.93

    def test_twins_alone_get_a_further_word_and_both_kinds_occur(self) -> None:
        words: Counter[str] = Counter()
        for seed in range(150):
            words.update(item.qualifier for item in generate_scene(seed, TWINS).objects)
        sized, placed = words["small"] + words["large"], sum(words[word] for word in POSITION_WORDS)
        assert min(words[word] for word in ("small", "large", *POSITION_WORDS)) > 10
        assert 0.35 < sized / (sized + placed) < 0.65
        plain = SceneOptions(twin_probability=0.0)
        assert not any(item.qualifier for seed in range(60) for item in generate_scene(seed, plain).objects)

    def test_twins_occur_as_often_as_asked_for(self) -> None:
        share = np.mean([any(o.qualifier for o in generate_scene(seed).objects) for seed in range(300)])
        assert 0.06 < share < 0.18

    def test_objects_share_shape_or_colour_as_often_as_asked_for(self) -> None:
        def rate(probability: float) -> float:
            options = SceneOptions(twin_probability=0, share_probability=probability, min_objects=2, max_objects=2)
            scenes = [generate_scene(seed, options) for seed in range(120)]
            return float(np.mean([a.shape == b.shape or a.colour == b.colour for a, b in (s.objects for s in scenes)]))

        assert rate(0.0) == 0.0
        assert rate(1.0) == 1.0
        assert 0.45 < rate(0.6) < 0.75

    def test_some_objects_are_partly_covered(self) -> None:
        fractions = [item.visible_fraction for seed in range(100) for item in generate_scene(seed).objects]
        assert 0.005 < np.mean(np.asarray(fractions) < 0.99) < 0.2

    def test_every_shape_and_colour_can_be_drawn_and_shapes_differ(self) -> None:
        outlines = []
        for shape in GLYPHS:
            options = SceneOptions(shapes=(shape,), colours=("orange", "pink"), max_objects=2)
            scene = generate_scene(1, options)
            assert {item.shape for item in scene.objects} == {shape}
            outlines.append(scene.masks.any(axis=0).tobytes())
        assert len(set(outlines)) == len(GLYPHS) == 16

    def test_paraphrases_keep_every_word_that_tells_objects_apart(self) -> None:
        for seed in range(40):
            scene = generate_scene(seed, TWINS)
            said = [text for item in scene.objects for text in (item.caption, *paraphrases(item))]
            assert len(set(said)) == len(said)
            for item in scene.objects:
                for text in paraphrases(item):
                    assert {item.colour, item.shape, *([item.qualifier] if item.qualifier else [])} <= set(text.split())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"shapes": ("star", "blob")}, "unknown shape 'blob'"),
            ({"colours": ("beige", "red")}, "unknown colour 'beige'"),
            ({"shapes": ("star",), "colours": ("red",)}, "different pairs"),
            ({"max_objects": 5}, "1..4"),
            ({"sizes": (60.0, 40.0)}, "smallest <= largest"),
            ({"sides": ()}, "sides"),
            ({"twin_probability": 1.5}, "twin_probability"),
        ],
    )
    def test_wrong_options_are_refused_by_name(self, change: dict, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            generate_scene(0, SceneOptions(**change))


class TestPairs:
    @settings(max_examples=25, deadline=None)
    @given(seed=SEEDS, twins=st.booleans())
    def test_the_same_objects_move_and_a_movable_caption_is_true_in_both(self, seed: int, twins: bool) -> None:
        first, second = generate_pair(seed, TWINS if twins else SceneOptions())
        assert [(o.shape, o.colour) for o in first.objects] == [(o.shape, o.colour) for o in second.objects]
        assert [o.centre for o in first.objects] != [o.centre for o in second.objects]
        assert movable_objects(first) == movable_objects(second) != ()
        for index in movable_objects(first):
            assert first.captions[index] == second.captions[index] == describe(second, index)


class TestPools:
    def test_pools_and_seeds_are_disjoint(self) -> None:
        pools = ("sav", "sa1b", "openimages", "refcoco/train", "refcoco/val", "pretrain/masks")
        drawn = [pool_seed(seed, pool, index) for seed in (0, 1) for pool in pools for index in range(500)]
        assert len(set(drawn)) == len(drawn)
        assert all(0 <= value < 2**63 for value in drawn)

    def test_a_seed_is_the_same_on_every_machine(self) -> None:
        expected = int.from_bytes(hashlib.sha256(b"5/refcoco/val/12").digest()[:8], "big") >> 1
        assert pool_seed(5, "refcoco/val", 12) == expected


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    counts = demo.write_demo_data(out, NUM_IMAGES, seed=5, num_val=3, refcoco_splits={"testA": 2})
    assert counts == {
        **{"sav": NUM_IMAGES, "sa1b": NUM_IMAGES, "openimages": NUM_IMAGES},
        **{"refcoco/train": NUM_IMAGES, "refcoco/val": 3, "refcoco/testA": 2},
    }
    return out


def expected_scene(pool: str, index: int) -> Scene:
    return generate_scene(pool_seed(5, pool, index))


def assert_close_images(path: Path, image: np.ndarray) -> None:
    """JPEG changes pixels, but not by much on average."""
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        decoded = np.asarray(picture.convert("RGB"), np.int16)
    assert decoded.shape == image.shape
    assert np.abs(decoded - image).mean() < 6


class TestFormats:
    def test_sav_pairs(self, root: Path) -> None:
        paths = sorted((root / "sav").rglob("masklet_data_*.npz"))
        assert len(paths) == NUM_IMAGES
        maxima = set()
        for path in paths:
            index = int(path.stem.rsplit("_", 1)[1])
            first, second = generate_pair(pool_seed(5, "sav", index))
            with np.load(path, allow_pickle=False) as data:
                np.testing.assert_array_equal(data["frame1"], first.image)
                np.testing.assert_array_equal(data["frame2"], second.image)
                assert data["mask1"].dtype == np.uint8
                maxima.add((int(data["mask1"].max()), int(data["mask2"].max())))
                chosen = [i for i in movable_objects(first) if np.array_equal(data["mask1"] > 0, first.masks[i])]
                assert len(chosen) == 1
                np.testing.assert_array_equal(data["mask2"] > 0, second.masks[chosen[0]])
        assert maxima == {(1, 1), (255, 255)}

    def test_sa1b(self, root: Path) -> None:
        stems = {path.stem for path in (root / "sa1b").iterdir()}
        assert stems == {f"sa_{number}" for number in range(1, NUM_IMAGES + 1)}
        for index in range(NUM_IMAGES):
            scene = expected_scene("sa1b", index)
            content = json.loads((root / "sa1b" / f"sa_{index + 1}.json").read_text())
            height, width = scene.image.shape[:2]
            name = f"sa_{index + 1}.jpg"
            assert content["image"] == {"image_id": index + 1, "width": width, "height": height, "file_name": name}
            assert_close_images(root / "sa1b" / name, scene.image)
            assert len(content["annotations"]) == len(scene.objects)
            for annotation, mask in zip(content["annotations"], scene.masks, strict=True):
                assert set(annotation) == {
                    *("id", "segmentation", "bbox", "area", "predicted_iou"),
                    *("stability_score", "crop_box", "point_coords"),
                }
                assert isinstance(annotation["segmentation"]["counts"], str)
                np.testing.assert_array_equal(coco_mask.decode(annotation["segmentation"]) > 0, mask)
                assert annotation["area"] == mask.sum()
                assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
                ((x, y),) = annotation["point_coords"]
                assert mask[int(y), int(x)]
                assert 0 < annotation["predicted_iou"] <= 1
                assert 0 < annotation["stability_score"] <= 1

    def test_open_images(self, root: Path) -> None:
        folder = root / "openimages"
        with (folder / "oidv7-class-descriptions.csv").open() as file:
            names = {row["LabelName"]: row["DisplayName"].lower() for row in csv.DictReader(file)}
        with (folder / "train-annotations-object-segmentation.csv").open() as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        header = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
        assert ",".join(reader.fieldnames or ()) == header
        image_ids = list(dict.fromkeys(row["ImageID"] for row in rows))
        assert len(image_ids) == NUM_IMAGES
        for index, image_id in enumerate(image_ids):
            scene = expected_scene("openimages", index)
            assert_close_images(folder / "images" / "train" / f"{image_id}.jpg", scene.image)
            own_rows = [row for row in rows if row["ImageID"] == image_id]
            assert [names[row["LabelName"]] for row in own_rows] == [item.shape for item in scene.objects]
            for row, mask in zip(own_rows, scene.masks, strict=True):
                self.check_open_images_row(row, mask, folder / "masks" / "train", 1.25 if index % 2 else 1.0)

    @staticmethod
    def check_open_images_row(row: dict[str, str], mask: np.ndarray, folder: Path, scale: float) -> None:
        label = row["LabelName"].replace("/", "")
        assert row["MaskPath"] == f"{row['ImageID']}_{label}_{row['BoxID']}.png"
        with Image.open(folder / row["MaskPath"]) as picture:
            assert picture.mode == "1"
            assert picture.size == (round(mask.shape[1] * scale), round(mask.shape[0] * scale))
            restored = np.asarray(picture.resize(mask.shape[::-1], Image.Resampling.NEAREST))
        np.testing.assert_array_equal(restored, mask)
        height, width = mask.shape
        columns, lines = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        box = [float(row[f"Box{side}"]) for side in ("XMin", "XMax", "YMin", "YMax")]
        expected = [columns[0] / width, (columns[-1] + 1) / width, lines[0] / height, (lines[-1] + 1) / height]
        np.testing.assert_allclose(box, expected, atol=1e-5)

    def test_refcoco(self, root: Path) -> None:
        folder = root / "ref_seg" / "refcoco"
        instances = json.loads((folder / "instances.json").read_text())
        refs = load_plain_pickle(folder / "refs(unc).p")
        annotations = {item["id"]: item for item in instances["annotations"]}
        images = {item["id"]: item for item in instances["images"]}
        categories = {item["id"]: item["name"] for item in instances["categories"]}
        for split, count in (("train", NUM_IMAGES), ("val", 3), ("testA", 2)):
            image_ids = list(dict.fromkeys(ref["image_id"] for ref in refs if ref["split"] == split))
            assert len(image_ids) == count
            for index, image_id in enumerate(image_ids):
                scene = expected_scene(f"refcoco/{split}", index)
                file_name = images[image_id]["file_name"]
                assert_close_images(folder / "coco2014" / "train2014" / file_name, scene.image)
                own_refs = [ref for ref in refs if ref["image_id"] == image_id]
                for ref, item in zip(own_refs, scene.objects, strict=True):
                    assert [s["sent"] for s in ref["sentences"]] == [item.caption]
                    assert [s["sent_id"] for s in ref["sentences"]] == ref["sent_ids"]
                    assert ref["file_name"] == file_name.replace(".jpg", f"_{ref['ann_id']}.jpg")
                    annotation = annotations[ref["ann_id"]]
                    assert categories[annotation["category_id"]] == item.shape
                    assert annotation["iscrowd"] == 0
                    np.testing.assert_array_equal(decode_any_rle(annotation["segmentation"]), item.mask)
        kinds = Counter(type(item["segmentation"]["counts"]) for item in annotations.values())
        assert min(kinds[str], kinds[list]) > 0

    def test_an_uncompressed_code_of_a_mask_that_starts_with_foreground_begins_with_zero(self) -> None:
        mask = np.zeros((4, 5), bool)
        mask[0, 0] = mask[2, 3] = True
        code = demo._uncompressed_rle(mask)
        assert code["counts"] == [0, 1, 13, 1, 5]
        np.testing.assert_array_equal(decode_any_rle(code), mask)


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        raise AssertionError(f"the pickle asks for {module}.{name}")


def load_plain_pickle(path: Path) -> list[dict]:
    content = path.read_bytes()
    assert content[:2] == b"\x80\x02"
    return PlainUnpickler(io.BytesIO(content), encoding="latin1").load()


def decode_any_rle(code: dict) -> np.ndarray:
    if isinstance(code["counts"], list):
        code = coco_mask.frPyObjects(code, *code["size"])
    return coco_mask.decode(code) > 0


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class TestWriter:
    def test_two_runs_write_the_same_bytes_whatever_the_clock_says(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("time.time", lambda: 1_000_000_000.0)
        demo.write_demo_data(tmp_path / "again", NUM_IMAGES, seed=5, num_val=3, refcoco_splits={"testA": 2})
        assert digest(tmp_path / "again") == digest(root)
        demo.write_demo_data(tmp_path / "other", NUM_IMAGES, seed=6, num_val=3, refcoco_splits={"testA": 2})
        assert digest(tmp_path / "other")["sa1b/sa_1.jpg"] != digest(root)["sa1b/sa_1.jpg"]

    def test_a_larger_data_set_begins_with_the_smaller_one(self, root: Path, tmp_path: Path) -> None:
        demo.write_demo_data(tmp_path / "more", NUM_IMAGES + 2, seed=5, sources=("sa1b",))
        small, large = digest(root / "sa1b"), digest(tmp_path / "more" / "sa1b")
        assert len(large) == len(small) + 4
        assert small.items() <= large.items()

    def test_a_finished_data_set_is_kept_and_another_is_refused(self, tmp_path: Path) -> None:
        out = tmp_path / "data"
        counts = demo.write_demo_data(out, 2, seed=1, sources=("sa1b",))
        times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        assert demo.write_demo_data(out, 2, seed=1, sources=("sa1b",)) == counts
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
        with pytest.raises(ConfigError, match="other arguments"):
            demo.write_demo_data(out, 3, seed=1, sources=("sa1b",))
        (out / "demo.json").unlink()
        with pytest.raises(ConfigError, match=r"no demo\.json"):
            demo.write_demo_data(out, 2, seed=1, sources=("sa1b",))

    def test_counts_can_be_given_for_each_source(self, tmp_path: Path) -> None:
        counts = demo.write_demo_data(tmp_path / "d", 1, num_sav=2, num_sa1b=0, num_refcoco=3, num_val=0)
        assert counts == {"sav": 2, "sa1b": 0, "openimages": 1, "refcoco/train": 3, "refcoco/val": 0}
        assert len(list((tmp_path / "d").rglob("*.npz"))) == 2
        assert not (tmp_path / "d" / "sa1b").exists()
        assert json.loads((tmp_path / "d" / "demo.json").read_text())["counts"] == counts

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sources": ("coco",)}, "unknown source 'coco'"),
            ({"refcoco_splits": {"dev": 3}}, "unknown split 'dev'"),
            ({"num_sav": -1}, "-1 images of sav"),
            ({"sources": ("sav",), "num_sav": 0}, "no images"),
        ],
    )
    def test_a_wrong_request_is_refused_before_anything_is_written(
        self, tmp_path: Path, arguments: dict, message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            demo.write_demo_data(tmp_path / "d", 2, **arguments)
        assert not (tmp_path / "d").exists()


def test_pools_with_captions_and_vague_captions(tmp_path):
    """The ceiling's data set holds the mask-only scenes again; vague captions touch the train split alone."""
    options = {"sources": ("sa1b", "openimages", "refcoco"), "num_val": 3}
    plain, vague = tmp_path / "plain", tmp_path / "vague"
    demo.write_demo_data(plain, 4, 3, captioned_pools=("sa1b", "openimages"), **options)
    demo.write_demo_data(vague, 4, 3, captioned_pools=("sa1b", "openimages"), vague_share=0.5, **options)
    train = RefCoco(plain / "ref_seg", datasets=("refcoco",), split="train")
    assert len(train) == 12
    copies = [train.load_all(index) for index in range(len(train))]
    pictures = {path.read_bytes() for path in (plain / "sa1b").glob("*.jpg")}
    images = (plain / "ref_seg" / "refcoco").rglob("*.jpg")
    assert len(pictures & {path.read_bytes() for path in images}) == 4
    assert all(len(text.split()) >= 3 for sample in copies for texts in sample.captions for text in texts)

    def texts(split):
        source = RefCoco(vague / "ref_seg", datasets=("refcoco",), split=split)
        samples = [source.load_all(index) for index in range(len(source))]
        return [text for sample in samples for own in sample.captions for text in own]

    short = [len(text.split()) == 2 for text in texts("train")]
    assert 0.25 < sum(short) / len(short) < 0.75
    assert all(len(text.split()) >= 3 for text in texts("val"))
    with pytest.raises(ConfigError, match="no pool 'sav' to caption"):
        demo.write_demo_data(tmp_path / "wrong", 2, 3, captioned_pools=("sav",))

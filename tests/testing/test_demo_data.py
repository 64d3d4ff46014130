"""The generated data sets: files in the documented formats, deterministic, and read back by the readers."""

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
from PIL import Image
from pycocotools import mask as coco_mask

from dual_loop.data.refcoco import RefCoco
from dual_loop.errors import ConfigError
from dual_loop.testing import demo_data
from dual_loop.testing.scenes import (
    Scene,
    generate_pair,
    generate_scene,
    movable_objects,
    pool_seed,
)

NUM_IMAGES = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    counts = demo_data.write_demo_data(out, NUM_IMAGES, seed=5, num_val=3, sizes={"refcoco/testA": 2})
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
        code = demo_data._uncompressed_rle(mask)
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
        demo_data.write_demo_data(tmp_path / "again", NUM_IMAGES, seed=5, num_val=3, sizes={"refcoco/testA": 2})
        assert digest(tmp_path / "again") == digest(root)
        demo_data.write_demo_data(tmp_path / "other", NUM_IMAGES, seed=6, num_val=3, sizes={"refcoco/testA": 2})
        assert digest(tmp_path / "other")["sa1b/sa_1.jpg"] != digest(root)["sa1b/sa_1.jpg"]

    def test_a_larger_data_set_begins_with_the_smaller_one(self, root: Path, tmp_path: Path) -> None:
        demo_data.write_demo_data(tmp_path / "more", NUM_IMAGES + 2, seed=5, sources=("sa1b",))
        small, large = digest(root / "sa1b"), digest(tmp_path / "more" / "sa1b")
        assert len(large) == len(small) + 4
        assert small.items() <= large.items()

    def test_a_finished_data_set_is_kept_and_another_is_refused(self, tmp_path: Path) -> None:
        out = tmp_path / "data"
        counts = demo_data.write_demo_data(out, 2, seed=1, sources=("sa1b",))
        times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        assert demo_data.write_demo_data(out, 2, seed=1, sources=("sa1b",)) == counts
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
        with pytest.raises(ConfigError, match="other arguments"):
            demo_data.write_demo_data(out, 3, seed=1, sources=("sa1b",))
        (out / "demo.json").unlink()
        with pytest.raises(ConfigError, match=r"no demo\.json"):
            demo_data.write_demo_data(out, 2, seed=1, sources=("sa1b",))

    def test_counts_can_be_given_for_each_source(self, tmp_path: Path) -> None:
        counts = demo_data.write_demo_data(tmp_path / "d", 1, num_refcoco=3, num_val=0, sizes={"sav": 2, "sa1b": 0})
        assert counts == {"sav": 2, "sa1b": 0, "openimages": 1, "refcoco/train": 3, "refcoco/val": 0}
        assert len(list((tmp_path / "d").rglob("*.npz"))) == 2
        assert not (tmp_path / "d" / "sa1b").exists()
        assert json.loads((tmp_path / "d" / "demo.json").read_text())["counts"] == counts

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"sources": ("coco",)}, "unknown source 'coco'"),
            ({"sizes": {"refcoco/dev": 3}}, "unknown pool 'refcoco/dev'"),
            ({"sizes": {"sav": -1}}, "-1 images of sav"),
            ({"sources": ("sav",), "sizes": {"sav": 0}}, "no images"),
        ],
    )
    def test_a_wrong_request_is_refused_before_anything_is_written(
        self, tmp_path: Path, arguments: dict, message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            demo_data.write_demo_data(tmp_path / "d", 2, **arguments)
        assert not (tmp_path / "d").exists()


def test_pools_with_captions_and_vague_captions(tmp_path):
    """The ceiling's data set holds the mask-only scenes again; vague captions touch the train split alone."""
    options = {"sources": ("sa1b", "openimages", "refcoco"), "num_val": 3}
    plain, vague = tmp_path / "plain", tmp_path / "vague"
    demo_data.write_demo_data(plain, 4, 3, captioned_pools=("sa1b", "openimages"), **options)
    demo_data.write_demo_data(vague, 4, 3, captioned_pools=("sa1b", "openimages"), vague_share=0.5, **options)
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
        demo_data.write_demo_data(tmp_path / "wrong", 2, 3, captioned_pools=("sav",))

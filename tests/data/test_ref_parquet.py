"""Parquet mirrors of RefCOCO: both column layouts, and what is refused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dual_loop.commands.common import open_measured
from dual_loop.config import DataConfig
from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.ref_parquet import RefParquet
from dual_loop.errors import ConfigError, SampleError

pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow (the extra [parquet])")
parquet = pytest.importorskip("pyarrow.parquet")

HEIGHT, WIDTH = 20, 30
POLYGON = [2.0, 2.0, 12.0, 2.0, 12.0, 12.0, 2.0, 12.0]


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def write(path: Path, rows: list[dict]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def jxu_row(ref_id: int, image_id: int, text: str) -> dict:
    info = {"file_name": f"COCO_train2014_{image_id:012d}.jpg", "height": HEIGHT, "width": WIDTH}
    return {
        "image_id": image_id,
        "ref_id": ref_id,
        "split": "test",
        "sentences": [{"sent": text, "raw": text.upper(), "sent_id": ref_id, "tokens": text.split()}],
        "raw_anns": json.dumps({"segmentation": [POLYGON], "id": 5}),
        "raw_image_info": json.dumps(info),
    }


def test_jxu_layout(tmp_path: Path) -> None:
    images = tmp_path / "train2014"
    images.mkdir()
    picture().save(images / "COCO_train2014_000000000007.jpg")
    picture().save(images / "000000000009.jpg")
    path = write(tmp_path / "testA.parquet", [jxu_row(1, 7, "a"), jxu_row(2, 9, "b"), jxu_row(3, 7, "c")])
    source = RefParquet(path, images)
    assert [source.entry_id(k) for k in range(len(source))] == ["testA/7", "testA/9"]
    sample = source.load_all(0)
    assert (sample.region_ids, sample.captions) == (("ref1", "ref3"), (("a",), ("c",)))
    assert sample.masks[0].sum() == 100
    assert source.image_path(1) == images / "000000000009.jpg"
    with pytest.raises(ConfigError, match="--refcoco_images"):
        RefParquet(path)
    (images / "000000000009.jpg").unlink()
    with pytest.raises(SampleError) as caught:
        source.load_all(1)
    assert caught.value.reason == "missing_file"


def test_lmms_layout(tmp_path: Path) -> None:
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    row = {
        "question_id": "q1",
        "image": {"bytes": stream.getvalue(), "path": "x.jpg"},
        "answer": ["left box", "box"],
        "segmentation": POLYGON,
        "file_name": "COCO_train2014_000000000007.jpg",
    }
    source = RefParquet(write(tmp_path / "val.parquet", [row, {**row, "answer": ["again"]}]))
    assert len(source) == 1
    assert source.image_path(0) is None
    sample = source.load_all(0)
    assert sample.captions == (("left box", "box"), ("again",))
    assert sample.image.shape == (HEIGHT, WIDTH, 3)
    assert len(set(sample.region_ids)) == 2
    broken = RefParquet(write(tmp_path / "bad.parquet", [{**row, "image": {"bytes": b"no", "path": "x"}}]))
    with pytest.raises(SampleError) as caught:
        broken.load_all(0)
    assert caught.value.reason == "truncated_file"


def test_one_bad_reference_of_a_photograph_is_one_bad_region(tmp_path: Path) -> None:
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    row = {
        "image": {"bytes": stream.getvalue(), "path": None},
        "answer": ["box"],
        "segmentation": POLYGON,
        "file_name": "a.jpg",
    }
    bad = [{**row, "segmentation": []}, {**row, "answer": ["<p> box"]}]
    sample = RefParquet(write(tmp_path / "val.parquet", [row, *bad])).load_all(0)
    assert sample.captions == (("box",),)
    assert [(one.region_id, one.reason) for one in sample.passed_over] == [
        ("ref1", "bad_polygon"),
        ("ref2", "special_token"),
    ]
    with pytest.raises(SampleError) as caught:
        RefParquet(write(tmp_path / "bad.parquet", bad)).load_all(0)
    assert caught.value.reason == "bad_polygon"


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a known layout"):
        RefParquet(write(tmp_path / "a.parquet", [{"x": 1}]))
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(ConfigError, match="cannot be read"):
        RefParquet(tmp_path / "b.parquet")


def test_refcoco_m(tmp_path: Path) -> None:
    """A row is a picture with its objects, and a folder of parts is one set."""
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    masks = np.zeros((3, HEIGHT, WIDTH), bool)
    for place, mask in enumerate(masks):
        mask[: place + 1, :4] = True
    objects = [{"sentences": [f"thing {place}", "it"], "mask": encode_rle(mask)} for place, mask in enumerate(masks)]
    objects.append({"sentences": ["gone"], "mask": {"size": [HEIGHT, WIDTH], "counts": "x"}})
    image = {"bytes": stream.getvalue(), "path": None}
    (tmp_path / "data").mkdir()
    for part in range(2):
        row = {"image": image, "samples": objects[2 * part : 2 * part + 2], "image_id": part}
        write(tmp_path / f"data/validation-0000{part}-of-00002.parquet", [row])
    [one] = open_measured(["refcoco-m"], replace(DataConfig(), eval_dir=str(tmp_path)))
    first, second = one.load(0, 0), one.load(1, 0)
    assert first.captions == (("thing 0", "it"), ("thing 1", "it"))
    assert np.array_equal(np.concatenate([first.masks, second.masks]), masks)
    assert [region.reason for region in second.passed_over] == ["broken_rle"]
    assert one.source.image_path(0) is None
    assert "its own masks" in str(one.description()["protocol"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \*\.parquet"):
        RefParquet(tmp_path / "empty")
    write(tmp_path / "odd.parquet", [{"image": image, "samples": [{"sentences": ["a"]}]}])
    with pytest.raises(SampleError, match=r"odd\.parquet, row 0: samples.*KeyError: 'mask'"):
        RefParquet(tmp_path / "odd.parquet").load_all(0)

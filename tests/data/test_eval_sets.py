"""Evaluation sets of the field, written here on a small scale: what is read, what is counted, what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dual_loop.cli import main
from dual_loop.data import eval_sets
from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.eval_sets import EvalSetReader
from dual_loop.errors import ConfigError, SampleError

from schemas import problems

HEIGHT, WIDTH = 10, 12


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def box(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    """Return (H, W) bool, the corners included."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return mask


def shape(label: str, x1: float, y1: float, x2: float, y2: float) -> dict[str, object]:
    return {"label": label, "points": [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]}


def write_reasonseg(root: Path, **changes: object) -> Path:
    """Write two pictures; ``changes`` are of the first one's JSON."""
    shapes = [shape("target", 2.9, 2.9, 5.9, 5.9), shape("Ignored", 4, 1, 9, 6), shape("flag", 0, 0, 11, 9)]
    first = {"text": ["a thing", "again"], "is_sentence": False, "shapes": shapes} | changes
    inner = [shape("ignore", 3, 3, 4, 4), shape("target", 1, 1, 8, 8)]
    second = {"text": ["Where is the café?"], "is_sentence": True, "shapes": inner}
    for name, tree in (("a", first), ("b", second)):
        file = picture(root / f"val/{name}.jpg").with_suffix(".json")
        file.write_bytes(json.dumps(tree, ensure_ascii=False).encode("cp1252"))
    return root


def gseval_line(number: int, image: str, kind: int, mask: np.ndarray) -> dict[str, Any]:
    found = {"idx": number, "image_path": f"unlabeled2017/{image}.jpg", "class_id": kind, "caption": f"thing {number}"}
    return {**found, "label": "a thing", "box": [0, 0, 1, 1], "segmentation": encode_rle(mask)}


def write_gseval(root: Path, *further: Mapping[str, Any]) -> Path:
    lines = [gseval_line(0, "1", 3, box(0, 0, 3, 3)), gseval_line(1, "2", 1, box(2, 2, 9, 9))]
    lines += [gseval_line(7, "1", 4, box(5, 5, 6, 6)), *further]
    for image in "12":
        picture(root / f"unlabeled2017/{image}.jpg")
    (root / "GroundingSuite-Eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def write_dlc(root: Path) -> Path:
    polygon = [2, 2, 8, 2, 8, 8, 2, 8]
    image = {"id": 5, "file_name": "o.jpg", "height": HEIGHT, "width": WIDTH}
    found = [(11, encode_rle(box(0, 0, 3, 3)), 0), (12, [polygon], 1)]
    regions = [{"id": one, "image_id": 5, "segmentation": mask, "iscrowd": crowd} for one, mask, crowd in found]
    picture(root / "annotations/images/o.jpg")
    tree = {"images": [image], "annotations": regions, "categories": []}
    (root / "annotations/annotations.json").write_text(json.dumps(tree))
    return root


def write_paradlc(root: Path) -> Path:
    found = [(0, box(0, 0, 3, 3)), (10, box(5, 5, 9, 9))]
    regions = [{"index": one, "category_name": "x", "bbox": [], "mask_rle": encode_rle(mask)} for one, mask in found]
    image = {"file_name": "p/o.jpg", "height": HEIGHT, "width": WIDTH, "image_id": "15"}
    picture(root / "images/o.jpg")
    (root / "annotations.json").write_text(json.dumps([image | {"annotations": regions}]))
    return root


def count(tmp_path: Path, data: str, root: Path, masks: Mapping[str, Sequence[np.ndarray | None]]) -> dict[str, Any]:
    """Return what ``dual-loop evaluate --predictions`` writes about saved masks."""
    lines = [
        {"name": name, "sentences": [{"mask": None if mask is None else encode_rle(mask)} for mask in own]}
        for name, own in masks.items()
    ]
    file, out = tmp_path / "saved.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--data", data, "--eval_dir", str(root), "--output_dir", str(out)]
    assert main(["evaluate", "--predictions", str(file), *arguments]) == 0
    written: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return written


def test_reasonseg_is_drawn_as_lisa_draws_it(tmp_path: Path) -> None:
    source = EvalSetReader("reasonseg", write_reasonseg(tmp_path / "ReasonSeg").parent)
    assert [source.entry_id(place) for place in range(len(source))] == ["val/a", "val/b"]
    first, second = source.load_all(0), source.load_all(1)
    # Corners are cut to whole pixels; the smaller target lies over the ignored shape, and the flag is no shape.
    target = box(2, 2, 5, 5)
    assert np.array_equal(first.masks[0], target)
    assert first.ignored is not None
    assert np.array_equal(first.ignored, box(4, 1, 9, 6) & ~target)
    assert (first.captions, first.groups) == ((("a thing",),), ("short",))
    assert np.array_equal(second.masks[0], box(1, 1, 8, 8) & ~box(3, 3, 4, 4))
    assert (second.captions, second.groups) == ((("Where is the café?",),), ("long",))


def test_reasonseg_in_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """First: 16 of 16 pixels, 16 more are ignored. Second: 32 pixels, 4 of them ignored, of a target of 60."""
    masks = {"reasonseg/val/a#target": [box(2, 2, 9, 5)], "reasonseg/val/b#target": [box(1, 1, 8, 4)]}
    written = count(tmp_path, "reasonseg:val", write_reasonseg(tmp_path / "set"), masks)
    found = written["figures"]["reasonseg:val"]["referring"]
    values = {name: one["value"] for name, one in found.items() if isinstance(one, dict)}
    assert values["gIoU"] == pytest.approx((1 + 28 / 60) / 2)
    assert values["cIoU"] == pytest.approx((16 + 28) / (16 + 60))
    assert (values["gIoU short"], values["cIoU short"]) == (1, 1)
    assert values["gIoU long"] == values["cIoU long"] == pytest.approx(28 / 60)
    assert (found["sentences"], found["sentences long"]) == (2, 1)
    assert "ignored shapes" in written["data"][0]["protocol"]
    assert "reasonseg:val: gIoU and cIoU (2308.00692)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"shapes": 3}, "broken_json", r"no usable 'shapes'; where: .*a\.json; seen: 3; expected: 'shapes': list"),
        ({"text": []}, "broken_json", "no usable 'text'"),
        ({"text": " "}, "broken_json", "an expression is empty"),
        ({"is_sentence": "no"}, "broken_json", "no usable 'is_sentence'"),
        ({"shapes": [{"points": []}]}, "broken_json", r"no usable 'label'; where: .*a\.json: shape 0"),
        ({"shapes": [{"label": "target", "points": []}]}, "bad_polygon", "no corners"),
        ({"shapes": [{"label": "target", "points": [[1e9, 1], [2, 2]]}]}, "bad_polygon", "near the image"),
        ({"shapes": [{"label": "target", "points": [[float("nan"), 1]]}]}, "bad_polygon", "no corners"),
        ({"shapes": [shape("target", 1, 1, 2, 2)] * 501}, "too_large", "at most 500"),
        ({"shapes": [{"label": "target", "points": [[1, 1]] * 50_001}]}, "too_large", "50,000 points"),
        ({"shapes": []}, "empty_mask", "a mask is empty"),
    ],
)
def test_a_bad_file_of_reasonseg(tmp_path: Path, changes: dict[str, object], reason: str, message: str) -> None:
    source = EvalSetReader("reasonseg", write_reasonseg(tmp_path, **changes))
    with pytest.raises(SampleError, match=message) as caught:
        source.load_all(0)
    assert caught.value.reason == reason
    assert source.load_all(1).num_regions == 1


def test_a_file_of_reasonseg_that_is_not_there(tmp_path: Path) -> None:
    source = EvalSetReader("reasonseg", write_reasonseg(tmp_path), "val")
    (tmp_path / "val/a.json").unlink()
    (tmp_path / "val/b.json").write_bytes(b"\xff{")
    for place, reason in enumerate(("missing_file", "broken_json")):
        with pytest.raises(SampleError) as caught:
            source.load_all(place)
        assert caught.value.reason == reason
    with pytest.raises(ConfigError, match=r"ReasonSeg is not there; where: .*test; seen: nothing there"):
        EvalSetReader("reasonseg", tmp_path, "test")


def test_gseval_in_figures(tmp_path: Path) -> None:
    """Multi: 8 of 16 pixels; single: no mask; stuff: all of 64."""
    root = write_gseval(tmp_path / "GSEval").parent
    masks = {
        "gseval/unlabeled2017/1#0": [box(0, 0, 3, 1)],
        "gseval/unlabeled2017/1#7": [None],
        "gseval/unlabeled2017/2#1": [box(2, 2, 9, 9)],
    }
    found = count(tmp_path, "gseval", root, masks)["figures"]["gseval"]["referring"]
    values = {name: one["value"] for name, one in found.items() if isinstance(one, dict)}
    assert values["gIoU"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert [values[f"gIoU {kind}"] for kind in ("multi", "single", "stuff")] == [0.5, 0, 1]
    assert "gIoU part" not in values


def test_what_gseval_refuses(tmp_path: Path) -> None:
    good = gseval_line(9, "1", 2, box(0, 0, 1, 1))
    for change, message in (
        ({"class_id": 5}, r"a stratum is unknown: 'class_id'; where: .*line 4; seen: 5; expected: 1, 2, 3, 4"),
        ({"caption": None}, "no usable 'caption'"),
        ({"idx": 0}, "two regions of an image have one name"),
    ):
        with pytest.raises(ConfigError, match=message):
            EvalSetReader("gseval", write_gseval(tmp_path, good | change))
    for change, reason in (({"image_path": "../x.jpg"}, "unsafe_path"), ({"image_path": "x.jpg"}, "missing_file")):
        source = EvalSetReader("gseval", write_gseval(tmp_path, good | change))
        with pytest.raises(SampleError) as caught:
            source.load_all([name for name, _ in source._images].index(change["image_path"]))
        assert caught.value.reason == reason
    sizes = {"size": [HEIGHT * 10_000_000, WIDTH], "counts": "0"}
    for mask, reason in (
        (None, "broken_json"),
        (sizes, "broken_rle"),
        (encode_rle(np.ones((5, 5), bool)), "size_mismatch"),
    ):
        sample = EvalSetReader("gseval", write_gseval(tmp_path, good | {"segmentation": mask})).load_all(0)
        assert sample.region_ids == ("0", "7")
        assert [one.reason for one in sample.passed_over] == [reason]
    (tmp_path / "GroundingSuite-Eval.jsonl").write_text("{")
    with pytest.raises(ConfigError, match=r"not JSON; where: .*line 1"):
        EvalSetReader("gseval", tmp_path)


def test_regions_of_judges_are_named_as_these_name_them(tmp_path: Path) -> None:
    dlc = EvalSetReader("dlc-bench", write_dlc(tmp_path / "DLC-Bench").parent).load_all(0)
    assert (dlc.sample_id, dlc.region_ids, dlc.captions) == ("o", ("11", "12"), ((), ()))
    assert [int(mask.sum()) for mask in dlc.masks] == [16, 36]
    para = EvalSetReader("paradlc-bench", write_paradlc(tmp_path / "para")).load_all(0)
    assert para.region_ids == ("15_0", "15_10")
    assert [int(mask.sum()) for mask in para.masks] == [16, 25]
    (tmp_path / "para/annotations.json").write_text('[{"file_name": "o.jpg", "height": "ten"}]')
    with pytest.raises(
        ConfigError, match=r"no usable 'height'; where: .*image 0; seen: 'ten'; expected: 'height': int"
    ):
        EvalSetReader("paradlc-bench", tmp_path / "para")


@pytest.mark.slow
def test_captions_are_written_for_the_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dlc(tmp_path / "root/DLC-Bench")
    write_paradlc(tmp_path / "root/ParaDLC-Bench")
    out = tmp_path / "out"
    arguments = ["--data", "dlc-bench", "paradlc-bench", "--eval_dir", str(tmp_path / "root"), "--output_dir", str(out)]
    assert main(["evaluate", *arguments, "--tasks", "captioning", "--device", "cpu"]) == 0
    written = json.loads((out / "evaluation.json").read_text())["submissions"]
    for name, keys in (("dlc-bench", {"11", "12"}), ("paradlc-bench", {"15_0", "15_10"})):
        captions = json.loads((out / f"{name}.json").read_text())
        assert captions.keys() == keys
        assert all(isinstance(text, str) for text in captions.values())
        assert written[name]["judge"] == eval_sets.SETS[name].judge
    assert "The judge is not run here" in capsys.readouterr().out
    assert problems(out / "regions.jsonl") == []

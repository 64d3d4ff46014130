"""``dual-loop caption``, ``segment`` and ``loop`` on the tiny checkpoint: files in, JSON and masks out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dual_loop.cli import main
from dual_loop.metrics import iou_table
from dual_loop.model.sa2va import Sa2VA
from dual_loop.testing.scenes import generate_scene

SCENE = generate_scene(1003)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("predict")
    for seed in (1003, 1002):
        scene = generate_scene(seed)
        (root / "images").mkdir(exist_ok=True)
        (root / "masks" / str(seed)).mkdir(parents=True)
        Image.fromarray(scene.image).save(root / "images" / f"{seed}.png")
        for number, mask in enumerate(scene.masks):
            Image.fromarray(np.asarray(mask).astype(np.uint8) * 255).save(root / "masks" / str(seed) / f"{number}.png")
    return root


def test_caption_and_loop_commands(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    image, mask = folder / "images/1003.png", folder / "masks/1003/0.png"
    assert main(["caption", str(image), "--mask", str(mask), "--box", "1,1,60,60", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"][0]["regions"][0] == {"region": "0", "caption": SCENE.captions[0]}
    assert result["images"][0]["regions"][1]["region"] == "box 1,1,60,60"
    arguments = ["loop", str(folder / "images"), "--mask", str(folder / "masks"), "--out", str(tmp_path / "back")]
    assert main([*arguments, "--json", str(tmp_path / "r.json"), "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert len(result["images"]) == 2
    for one in result["images"]:
        for number, region in enumerate(one["regions"]):
            assert region["iou_with_each"][number] == region["iou"]
            assert Path(region["mask"]).is_file()


def test_segment_command(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "one.png"
    image = str(folder / "images/1003.png")
    assert main(["segment", image, "--text", SCENE.captions[0], "--out", str(out), "--device", "cpu"]) == 0
    [text] = json.loads(capsys.readouterr().out)["images"][0]["texts"]
    mask = np.asarray(Image.open(out)) > 0
    assert text["pixels"] == mask.sum()
    assert iou_table(torch.from_numpy(mask[None]), torch.from_numpy(np.asarray(SCENE.masks[:1])))[0, 0] > 0.5
    assert main(["segment", image, "--text", "a", "--out", str(tmp_path / "folder"), "--device", "cpu"]) == 0
    assert (tmp_path / "folder" / "1003_0.png").is_file()
    capsys.readouterr()
    assert main(["segment", image, "--text", "a", "b", "--out", str(out), "--device", "cpu"]) == 2
    assert "give a folder" in capsys.readouterr().err


def test_every_result_has_a_file_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    for folder in (images, masks / "one", masks / "two"):
        folder.mkdir(parents=True)
    for name in ("a.png", "a.bmp", "A.png", "a.png.png"):
        Image.fromarray(SCENE.image).save(images / name)
    out, common = tmp_path / "out", ["--device", "cpu", "--json", str(tmp_path / "r.json")]
    assert main(["segment", str(images), "--text", "a", "b", "--out", str(out), *common]) == 0
    found = json.loads((tmp_path / "r.json").read_text())["images"]
    files = [text["mask"] for one in found for text in one["texts"]]
    assert len(files) == len({file.lower() for file in files}) == 8
    assert all(Path(file).is_file() for file in files)

    for number, folder in enumerate(("one", "two")):
        Image.fromarray(np.asarray(SCENE.masks[number]).astype(np.uint8) * 255).save(masks / folder / "cat.png")
    given = [str(masks / "one/cat.png"), str(masks / "two/cat.png")]
    assert main(["loop", str(images / "a.png"), "--mask", *given, "--out", str(out), *common]) == 0
    regions = json.loads((tmp_path / "r.json").read_text())["images"][0]["regions"]
    assert [region["region"] for region in regions] == ["cat", "cat (2)"]
    assert len({region["mask"] for region in regions}) == 2


@pytest.mark.parametrize("name", ["images/a.png", "images"])
def test_a_result_never_replaces_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for file in ("a.png", "a_0.png"):
        Image.fromarray(SCENE.image).save(images / file)
    before = (images / "a.png").read_bytes(), (images / "a_0.png").read_bytes()
    target = str(tmp_path / name)
    assert main(["segment", target, "--text", "a", "--out", target, "--device", "cpu"]) == 2
    assert "a result would replace an image" in capsys.readouterr().err
    assert before == ((images / "a.png").read_bytes(), (images / "a_0.png").read_bytes())


def test_images_are_cut_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as wide as high, so two tiles and the whole; the last of them bears the region."""
    Image.fromarray(np.concatenate([SCENE.image] * 2, axis=1)).save(tmp_path / "wide.png")
    counts, encode = [], Sa2VA.encode_vision
    monkeypatch.setattr(Sa2VA, "encode_vision", lambda self, tiles: counts.append(len(tiles)) or encode(self, tiles))
    for tiles, expected in ((1, 1), (12, 3)):
        flags = ["--max_tiles", str(tiles), "--device", "cpu"]
        assert main(["caption", str(tmp_path / "wide.png"), "--box", "1,1,60,60", *flags]) == 0
        assert (
            main(["segment", str(tmp_path / "wide.png"), "--text", "a", "--out", str(tmp_path / "m.png"), *flags]) == 0
        )
        assert counts == [expected] * 2
        counts.clear()


def test_bad_files_are_skipped_and_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    Image.fromarray(SCENE.image).save(images / "good.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    Image.fromarray(SCENE.image).save(images / "alone.png")
    Image.fromarray(np.asarray(SCENE.masks[0]).astype(np.uint8) * 255).save(masks / "good.png")
    assert main(["caption", str(images), "--mask", str(masks), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [Path(one["image"]).stem for one in result["images"]] == ["good"]
    assert {Path(one["image"]).stem for one in result["skipped"]} == {"broken", "alone"}
    assert captured.err.count("skipped:") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "images/1003.png"], "no region is marked"),
        (["caption", "images/1003.png", "--box", "1,2,3"], "4 numbers joined by commas"),
        (["loop", "images", "--mask", "masks/1003/0.png"], "a folder of images needs a folder of masks"),
        (["caption", "nowhere.png", "--box", "1,2,3,4"], "no such image"),
        (["segment", "masks", "--text", "x", "--out", "out"], "the folder holds no image"),
        (["segment", "images/1003.png", "--text", "x", "--out", "x.jpg"], "a mask has no such format"),
    ],
)
def test_wrong_calls(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    name, image, *rest = arguments
    rest = [str(folder / part) if part.startswith("masks/") else part for part in rest]
    assert main([name, str(folder / image), *rest, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err

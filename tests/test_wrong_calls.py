"""Ten ways of getting it wrong: each ends in one clear message and a status that is not 0."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dual_loop.cli import main
from dual_loop.preflight import machine
from dual_loop.testing.demo_data import write_demo_data
from dual_loop.testing.scenes import generate_scene

SCENE = generate_scene(1003)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wrong") / "demo"
    write_demo_data(root, 3, 1, num_val=2)
    return root


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wrong_image") / "scene.png"
    Image.fromarray(SCENE.image).save(path)
    return path


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *texts: str) -> None:
    """Run a command; its only complaint must hold ``texts``, and no traceback."""
    try:
        status = main(arguments)
    except SystemExit as error:  # argparse
        status = int(error.code or 0)
    captured = capsys.readouterr()
    assert status != 0
    for text in texts:
        assert text in captured.err, captured.err
    assert captured.err.count("error:") == 1, captured.err
    assert "Traceback" not in captured.err


def train(demo: Path, out: Path, *more: str) -> list[str]:
    index = f"data.index_dir={demo.parent / 'index'}"
    base = ["train", "--sa1b_dir", str(demo / "sa1b"), "--max_steps", "1", "--output_dir", str(out)]
    return [*base, "--device", "cpu", *more, "--cfg-options", index]


def test_missing_data_path(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["train", "--sa1b_dir", str(tmp_path / "nowhere")], "no such folder", "nowhere", "data.sa1b_dir")


def test_wrong_checkpoint(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"PK nothing")
    fails(capsys, train(demo, tmp_path / "run", "--pretrained_pth", str(weights)), "weights.pth")
    fails(capsys, ["caption", "x.png", "--box", "0,0,1,1", "--checkpoint", str(weights)], "")


def test_misspelt_flag(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, train(demo, tmp_path / "run", "--learning_rat_e", "1"), "--learning_rat_e")


def test_misspelt_config_key(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = train(demo, tmp_path / "run")
    fails(capsys, [*arguments, "train.max_step=3"], "unknown key 'train.max_step'", "did you mean train.max_steps")


def test_no_space(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    fails(capsys, train(demo, tmp_path / "run"), "not enough disk space", "1,000 bytes free", "output_dir")


def test_port_in_use(taken_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["serve", "--port", str(taken_port)], "cannot listen", str(taken_port), "another --port")


def test_mask_of_another_size(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = tmp_path / "mask.png"
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(mask)
    fails(capsys, ["caption", str(image), "--mask", str(mask), "--device", "cpu"], "differ in size", "(9, 9)")


def test_an_image_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "letter.jpg"
    path.write_text("Dear model,")
    arguments = ["segment", str(path), "--text", "a star", "--out", str(tmp_path / "o.png"), "--device", "cpu"]
    fails(capsys, arguments, "not a usable image", "letter.jpg")


def test_unknown_split(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = train(demo, tmp_path / "run", "--refcoco_dir", str(demo / "ref_seg"), "--refcoco_split", "tset")
    fails(capsys, arguments, "no RefCOCO data set has this split", "tset", "train")


def test_cpu_without_bf16(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_native_bfloat16", lambda: False)
    arguments = train(demo, tmp_path / "run", "--mixed_precision", "bf16")
    fails(capsys, arguments, "would have to emulate", "--mixed_precision no")

"""Weights with a NaN are never served: whoever reads a run or a file of weights refuses them with the tensor's name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import put_nan, write_small_run

from dual_loop.cli import main
from dual_loop.model.build import TINY_WEIGHTS
from dual_loop.testing.scenes import generate_scene

from end_to_end import BASE


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``: a run whose averages hold a NaN; ``weights.safetensors``: with one; an image and a mask beside them."""
    folder = tmp_path_factory.mktemp("broken")
    put_nan(write_small_run(folder / "run") / "ema.safetensors")
    shutil.copy(TINY_WEIGHTS, folder / "weights.safetensors")
    put_nan(folder / "weights.safetensors")
    scene = generate_scene(1003)
    Image.fromarray(scene.image).save(folder / "image.png")
    Image.fromarray(np.asarray(scene.masks[0]).astype(np.uint8) * 255).save(folder / "mask.png")
    return folder


@pytest.mark.parametrize("source", ["run", "weights.safetensors"])
@pytest.mark.parametrize(
    "command",
    [
        "caption image.png --mask mask.png --checkpoint SOURCE",
        "segment image.png --text star --out out.png --checkpoint SOURCE",
        "loop image.png --mask mask.png --checkpoint SOURCE",
        "evaluate SOURCE --data refcoco:val --refcoco_dir DEMO/ref_seg --output_dir out",
        "audit SOURCE --data sa1b --sa1b_dir DEMO/sa1b --output_dir out",
        "export SOURCE out --format original",
        "serve --port 0 --checkpoint SOURCE",
        "train --sa1b_dir DEMO/sa1b --output_dir fresh --pretrained_pth SOURCE",
        "train --sa1b_dir DEMO/sa1b --output_dir run --resume SOURCE",
    ],
)
def test_no_command_takes_them(
    broken: Path,
    demo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    source: str,
) -> None:
    words = command.replace("SOURCE", source).replace("DEMO", str(demo)).split()
    if (source == "run") != (words[-2] != "--pretrained_pth") and words[0] in ("export", "train"):
        pytest.skip("takes the other kind alone")
    more = {"export": [], "train": BASE}.get(words[0], ["--device", "cpu"])
    monkeypatch.chdir(broken)
    assert main([*words, *more]) == 2
    text = capsys.readouterr().err
    assert text.count("error: ") == 1
    assert "Traceback" not in text
    assert "not finite" in text
    assert "mllm." in text or "grounding_encoder." in text, "the tensor is named"
    assert not (broken / "out").exists()
    assert not (broken / "out.png").exists()
    assert not (broken / "fresh/checkpoints").exists()

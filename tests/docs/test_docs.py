"""What the documents say can be done is done here: every block marked ``run`` is executed, in order.

A block of bash or Python stands behind ``<!-- run -->``, or behind ``<!-- shown: why it is not run here -->``. They run
in a folder like the one that ``bash test_dual_loop.sh`` leaves: generated data, a run, and somebody's own masks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dual_loop.cli import COMMANDS, main
from dual_loop.config import CONFIG_DIR, SETTINGS
from dual_loop.testing.demo_data import write_demo_data
from dual_loop.testing.scenes import generate_scene

from warm_meteor import warm_meteor
from warm_python import warm_bin, warm_python

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IN_FULL = os.environ.get("DUAL_LOOP_DOCS_IN_FULL") == "1"
"""With as many steps as a block says, which takes two minutes more (scripts/nightly.sh)."""
BLOCK = re.compile(r"(?:<!-- (?P<mark>.*?) -->\n)?```(?P<language>bash|python)\n(?P<text>.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def blocks(path: Path) -> list[tuple[str, str, str]]:
    """Return (mark, language, text) of every block."""
    found = BLOCK.finditer(path.read_text(encoding="utf-8"))
    return [(match["mark"] or "", match["language"], match["text"]) for match in found]


def executed(path: Path) -> list[tuple[str, str]]:
    return [(language, text) for mark, language, text in blocks(path) if mark == "run"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    write_demo_data(folder / "outputs/demo_data", 6, 0, num_val=3)
    demo = folder / "outputs/demo_data"
    names = {"--sav_dir": "sav", "--sa1b_dir": "sa1b", "--openimage_dir": "openimages", "--refcoco_dir": "ref_seg"}
    data = [part for flag, name in names.items() for part in (flag, str(demo / name))]
    run = ["--output_dir", str(folder / "outputs/test_dual_loop"), "--eval_dir", str(demo / "ref_seg")]
    assert main(["train", "--config", "tiny_demo", "--max_steps", "2", "--device", "cpu", *data, *run]) == 0
    # Somebody's own masks: those that the page about them writes, and two as the README names them.
    [writing] = [text for language, text in executed(ROOT / "docs/own_masks.md") if language == "python"]
    subprocess.run([sys.executable, "-c", writing], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    for name, seed in (("cat", 1003), ("street", 1002)):
        scene = generate_scene(seed)
        masks = folder / "mine/masks" / ("" if name == "cat" else name)
        masks.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.image).save(folder / f"mine/images/{name}.jpg")
        for number, mask in enumerate(scene.masks):
            file = masks / ("cat.png" if name == "cat" else f"{number}.png")
            Image.fromarray(np.asarray(mask).astype(np.uint8) * 255).save(file)
            if name == "cat":
                break
    (folder / "mine/captions.json").write_text(json.dumps({"cat": generate_scene(1003).captions[0]}))
    return folder


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_is_run_or_says_why_not(path: Path) -> None:
    for mark, _, text in blocks(path):
        assert mark == "run" or mark.startswith("shown: "), f"{path.name}: unmarked block\n{text}"


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if executed(path)], ids=lambda path: path.name)
def test_the_blocks_run(path: Path, workspace: Path) -> None:
    # dual-loop, python and torchrun are the warm ones.
    variables = {**os.environ, "PATH": f"{warm_bin()}{os.pathsep}{warm_meteor()}"}
    variables.update(PYTHONPATH=str(ROOT), DUAL_LOOP_CACHE=str(workspace / "index"), OMP_NUM_THREADS="1")
    for language, text in executed(path):
        text = text if IN_FULL else text.replace("--max_steps 100", "--max_steps 10")
        command = [warm_python(), "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(
            command, cwd=workspace, env=variables, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, f"{path.name}\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    if path.name == "README.md" and IN_FULL:  # the example on one's own masks teaches something
        gain = json.loads((workspace / "outputs/mine/summary.json").read_text())["gain"]["gIoU"]
        assert gain["mean"] > 0.03, gain


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_flags_and_configs_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"dual-loop ([a-z][a-z-]+)", text):
        assert name in COMMANDS, f"{path.name}: dual-loop {name}"
    for name in re.findall(r"--config (?:configs/)?([a-z0-9_]+)", text):
        assert (CONFIG_DIR / f"{name}.py").is_file(), f"{path.name}: --config {name}"
    known = {about.flag for about in SETTINGS.values()}
    for name in re.findall(r"--([a-z0-9]+_dir|sa1b_max_samples|leakage_guard|caption_gradient)\b", text):
        assert name in known, f"{path.name}: --{name}"

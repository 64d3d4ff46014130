"""``dual-loop data check``, ``stats`` and ``preview``: what they find, show, and how they exit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dual_loop.cli import main
from dual_loop.config import load_config, resolve_config_path


def test_data_check_counts_reasons_and_exits_by_them(
    demo: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", *flags]) == 0
    assert "no problem was found" in capsys.readouterr().out
    broken = tmp_path / "sa1b"
    shutil.copytree(demo / "sa1b", broken)
    victim = sorted(broken.rglob("*.jpg"))[0]
    victim.write_bytes(victim.read_bytes()[:200])
    options = ["--cfg-options", f"data.index_dir={tmp_path / 'index'}"]
    assert main(["data", "check", "--json", "--sa1b_dir", str(broken), *options]) == 1
    result = json.loads(capsys.readouterr().out)
    [finding] = [f for f in result["findings"] if f["level"] == "problem"]
    assert "5 of 6 read are good (truncated_file 1)" in finding["what"]


def test_data_check_refuses_a_renamed_held_out_image(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An SA-1B-style set with a RefCOCO val image under another name, smaller and compressed again."""
    from dual_loop.data.leakage import held_out_of

    data = load_config(resolve_config_path("tiny_cpu"), {"data.refcoco_dir": str(demo / "ref_seg")}).data
    victim = next(i for i in held_out_of(data).values() if i.split == "refcoco val")
    folder = tmp_path / "sa1b"
    shutil.copytree(demo / "sa1b", folder)
    target = sorted(folder.rglob("*.jpg"))[0]
    size = Image.open(target).size
    assert victim.path is not None
    Image.open(victim.path).resize(size).save(target, quality=55)
    base = ["data", "check", "--sa1b_dir", str(folder), "--refcoco_dir", str(demo / "ref_seg")]
    options = ["--cfg-options", f"data.index_dir={tmp_path / 'index'}"]
    assert main([*base, "--json", *options]) == 1
    result = json.loads(capsys.readouterr().out)
    [leak] = result["leaks"]
    assert leak["entry"].endswith(target.stem)
    assert f"COCO image {victim.coco_id} of refcoco val (found by sight)" in leak["message"]
    assert main([*base, "--ids_only", *options]) == 0, "its name tells nothing"


def test_stats_and_preview(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", "--json", *flags]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["sa1b"]["entries"] == 6
    assert stats["refcoco"]["captioned regions"].split(" of ")[0] != "0"
    assert stats["sav"]["captioned regions"] == "0 of 6"
    out = tmp_path / "page.html"
    assert main(["data", "preview", "--samples", "2", "--out", str(out), *flags]) == 0
    page = out.read_text()
    assert page.count("<figure>") == 8
    assert page.count("data:image/jpeg") == 24
    assert "frame pair" in page
    assert "step 1 writes it" in page

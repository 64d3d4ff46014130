"""``dual-loop evaluate --data mevis:...`` and ``refdavis17:...`` on small copies, with the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dual_loop.cli import main
from dual_loop.evaluation.runner import REGIONS

from schemas import problems
from video_sets import FRAMES, SIZE, write_mevis, write_refdavis

pytestmark = pytest.mark.slow


def evaluate(root: Path, out: Path, data: str, *options: str) -> int:
    arguments = ["evaluate", "--data", data, "--eval_dir", str(root), "--output_dir", str(out), "--device", "cpu"]
    return main([*arguments, *options])


def test_mevis_with_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_mevis(tmp_path / "data", 2)
    assert evaluate(root, tmp_path / "out", "mevis:valid_u", "--frames", "3") == 0
    printed = capsys.readouterr()
    assert "157 tensors of SAM 2's video memory are in no file and drawn" in printed.err
    for part in ("| J&F |", "| J |", "| F |", "frames 3", "SAM 2's, with this model's mask decoder", "2 videos"):
        assert part in printed.out
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["tasks"] == ["video"]
    assert written["protocol"]["frames"] == 3
    figures = written["figures"]["mevis:valid_u"]["video"]
    low, value, high = (figures["J&F"][key] for key in ("ci95_low", "value", "ci95_high"))
    assert 0 < low <= value <= high < 1
    assert value == pytest.approx((figures["J"]["value"] + figures["F"]["value"]) / 2, abs=1e-12)
    lines = [json.loads(line) for line in (tmp_path / "out" / REGIONS).read_text().splitlines()]
    assert figures["J"]["value"] == pytest.approx(np.mean([line["jaccard"] for line in lines]), abs=1e-12)
    assert problems(tmp_path / "out" / REGIONS) == []
    assert not (tmp_path / "out" / "Annotations").exists()


def test_refdavis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_refdavis(tmp_path / "refdavis17").parent
    assert evaluate(root, tmp_path / "out", "refdavis17") == 0
    assert "one expression of each of 4 annotators" in capsys.readouterr().out
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())["figures"]["refdavis17"]["video"]
    assert figures["scored"] == figures["expressions"] == 8


def test_masks_that_are_not_public_are_written_for_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write_mevis(tmp_path / "data", 1, "valid", has_masks=False), tmp_path / "out"
    assert evaluate(root, out, "mevis:valid", "--protocol", "sa2va") == 0
    assert "VIDEO/EXPRESSION/FRAME.png" in capsys.readouterr().out
    expressions = json.loads((root / "valid" / "meta_expressions.json").read_text())["videos"]["video0"]["expressions"]
    files = sorted(str(path.relative_to(out)) for path in (out / "Annotations").rglob("*.png"))
    assert files == sorted(f"Annotations/video0/{k}/{n:05d}.png" for k in expressions for n in range(FRAMES))
    mask = Image.open(out / files[0])
    assert (mask.mode, mask.size) == ("L", SIZE)
    assert set(np.unique(np.asarray(mask))) <= {0, 255}


def test_a_broken_frame_skips_its_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_mevis(tmp_path / "data", 2)
    (root / "valid_u" / "JPEGImages" / "video0" / f"{FRAMES - 1:05d}.jpg").write_bytes(b"no image")
    assert evaluate(root, tmp_path / "out", "mevis") == 0
    assert "skipped mevis/video0" in capsys.readouterr().err
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [entry["entry"] for entry in written["skipped"]] == ["video0"]
    assert written["figures"]["mevis"]["images"] == 1


def test_what_cannot_be_combined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--data", "mevis", "gseval", "--eval_dir", str(tmp_path)]) == 2
    assert "videos are measured alone" in capsys.readouterr().err
    assert main(["audit", "--data", "mevis", "--eval_dir", str(tmp_path)]) == 2
    assert "captions of videos are not audited" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "--data", "mevis", "--frames", "0"])

"""The page of a run: made of whole and of half-written files, and of a real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dual_loop.cli import main
from dual_loop.errors import CheckpointError
from dual_loop.evaluation.report import read_run, report_page
from dual_loop.testing.demo_data import write_demo_data

from warm_meteor import warm_meteor


def write_run(folder: Path, **summary: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"train": {"seed": 3, "name": "<b>"}}')
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1200, before={"gIoU": 0.5, "caption_words": 3.0}, flags=["odd"])
    lines = [json.dumps({"step": step, "loss": 1.0 / step, "seconds": {"total": 2.0}}) for step in range(1, 1000)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 10']))
    run = read_run(folder)
    assert run.missing == ["versions.json"]
    assert len(run.metrics) == 999
    page = report_page([run])
    assert "1,200" in page
    assert "<td>50.0</td><td>-</td>" in page
    assert "<td>3.0</td>" in page
    assert "Flag: odd" in page
    assert "Not there: versions.json" in page
    assert "train.name" in page
    assert "&lt;b&gt;" in page
    assert page.count("<svg ") == 2  # loss and seconds
    assert ">loss 0.001001<" in page
    assert max(path.count("\nL ") for path in page.split(' d="')[1:]) < 500, "curves are thinned"


def test_two_runs_show_what_differs(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", sources={"sa1b": 4}), write_run(tmp_path / "b", counters={"x/y": 2})
    (second / "config.json").write_text('{"train": {"seed": 4, "name": "<b>"}}')
    page = report_page([read_run(first), read_run(second)])
    assert "Run a against b" in page
    assert "<td>train.seed</td><td>3</td><td>4</td>" in page
    assert "train.name" not in page
    assert "<td>x/y</td><td>-</td><td>2</td>" in page
    assert "<td>sa1b</td><td>4</td><td>-</td>" in page


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run folder"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text('{"step"\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"a record cannot be read.*line 1"):
        read_run(folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "summary.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be read.*summary\.json"):
        read_run(folder)


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.mark.slow
def test_report_of_a_run_and_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", warm_meteor())
    demo = tmp_path / "demo"
    write_demo_data(demo, 8, 5, num_val=6)
    out = demo.parent / "run"
    data = ["--sa1b_dir", demo / "sa1b", "--eval_dir", demo / "ref_seg", "--eval_max_samples", 6]
    run("train", "--config", "tiny_demo", *data, "--max_steps", 2, "--output_dir", out, "--device", "cpu")
    assert sorted(path.name for path in (out / "panels").glob("before_*")) == [f"before_{k}.png" for k in range(6)]
    run("evaluate", out, "--data", "refcoco:val", "--max_samples", 3, "--device", "cpu")
    run("report", out)
    page = (out / "report.html").read_text()
    for part in (
        "Held-out figures",
        "Curves",
        "before and after",
        "Evaluation of refcoco:val",
        "mask_loss",
        "Counters",
        "<td>data.sa1b_dir</td>",
        "<summary>all ",
    ):
        assert part in page
    assert 'src="http' not in page
    assert "https://" not in page.replace("http://www.w3.org", "")
    run("report", out, "--compare", out, "--out", demo.parent / "two.html")
    changed, _, others = page.partition("<summary>all ")
    assert "<td>train.seed</td>" not in changed
    assert "<td>train.seed</td>" in others
    assert "against run" in (demo.parent / "two.html").read_text()

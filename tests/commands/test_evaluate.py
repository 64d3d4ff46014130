"""``dual-loop evaluate`` on generated data with the tiny checkpoint: ranks, resume, predictions, errors."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dual_loop.cli import main
from dual_loop.evaluation.runner import PARTS, REGIONS
from dual_loop.testing.demo_data import write_demo_data

from schemas import problems
from warm_meteor import warm_meteor
from warm_python import warm_python

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("meteor")]
IMAGES = 20  # three chunks


@pytest.fixture(scope="module")
def meteor() -> Iterator[None]:
    """One METEOR for all evaluations, of this process and of the ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", warm_meteor())
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("measure") / "demo"
    write_demo_data(root, 8, 5, num_val=IMAGES)
    return root


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def evaluate_arguments(demo: Path, out: Path) -> list[str]:
    data = ["--data", "refcoco:val", "--refcoco_dir", str(demo / "ref_seg")]
    options = ["--cfg-options", "train.num_threads=1", f"data.index_dir={demo.parent / 'index'}"]
    return ["evaluate", *data, "--output_dir", str(out), "--device", "cpu", *options]


@pytest.fixture(scope="module")
def evaluated(demo: Path, meteor: None) -> Path:
    out = demo.parent / "evaluation"
    run(*evaluate_arguments(demo, out))
    return out


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / REGIONS).read_text().splitlines()]


def figures(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())["figures"]["refcoco:val"]


def test_what_is_written(evaluated: Path) -> None:
    written = json.loads((evaluated / "evaluation.json").read_text())
    assert written["protocol"]["seg"] == "forced"
    assert written["protocol"]["max_tiles"] == 1, "that of the checkpoint's configuration"
    assert len(written["checkpoint"]["sha256"]) == 64
    assert not (evaluated / PARTS).exists()
    found = figures(evaluated)
    assert found["images"] == IMAGES
    assert found["referring"]["sentences"] >= found["regions"]
    assert 0.2 < found["referring"]["gIoU"]["value"] < 0.9
    assert found["captioning"]["exact"]["value"] > 0.5
    low, value, high = (found["loop"]["cycle_gIoU"][key] for key in ("ci95_low", "value", "ci95_high"))
    assert low < value < high
    assert len(lines(evaluated)) == found["regions"]
    assert problems(evaluated / REGIONS) == []


@pytest.mark.distributed
def test_two_ranks_measure_the_same(demo: Path, evaluated: Path) -> None:
    out = demo.parent / "evaluation_2"
    command = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "dual_loop.cli", *evaluate_arguments(demo, out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "evaluation.json").read_text())["world_size"] == 2
    assert (out / REGIONS).read_text() == (evaluated / REGIONS).read_text()
    for task, values in figures(evaluated).items():
        for name, one in values.items() if isinstance(values, dict) else ():
            if isinstance(one, dict) and "value" in one:
                assert figures(out)[task][name]["value"] == pytest.approx(one["value"], abs=1e-12)


def test_a_killed_evaluation_goes_on(demo: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Finish one chunk, cut the second one off in the middle of its line, and start again."""
    out = demo.parent / "evaluation_3"
    header = {k: v for k, v in json.loads((evaluated / "evaluation.json").read_text()).items() if k in HEADER}
    first = [record for record in lines(evaluated) if record["entry"] < 8]
    line = json.dumps({"data": "refcoco:val", "chunk": 0, "records": first, "skipped": []})
    (out / PARTS).mkdir(parents=True)
    (out / PARTS / "header.json").write_text(json.dumps(header))
    (out / PARTS / "rank_0_of_1.jsonl").write_text(f'{line}\n{{"data": "refco')
    run(*evaluate_arguments(demo, out))
    assert (out / REGIONS).read_text() == (evaluated / REGIONS).read_text()
    assert main([*evaluate_arguments(demo, out)]) == 2
    assert "finished evaluation" in capsys.readouterr().err


HEADER = ("checkpoint", "data", "tasks", "protocol", "max_new_tokens")


def test_another_evaluation_in_the_folder_is_refused(
    demo: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = demo.parent / "evaluation_4"
    (out / PARTS).mkdir(parents=True)
    written = json.loads((evaluated / "evaluation.json").read_text())
    header = {**{k: written[k] for k in HEADER}, "tasks": ["loop"]}
    (out / PARTS / "header.json").write_text(json.dumps(header))
    assert main(evaluate_arguments(demo, out)) == 2
    message = capsys.readouterr().err
    assert "another evaluation" in message
    assert "tasks: ['loop']" in message


def test_saved_predictions_give_the_same_figures(
    demo: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = demo.parent / "predictions"
    arguments = ["--predictions", str(evaluated / REGIONS), "--output_dir", str(out)]
    base = [a for a in evaluate_arguments(demo, out) if a not in ("--output_dir", str(out))]
    run(*base, *arguments)
    assert main([*base, *arguments]) == 2
    assert "--overwrite" in capsys.readouterr().err
    run(*base, *arguments, "--overwrite")
    own, again = figures(evaluated)["referring"], figures(out)["referring"]
    assert again["gIoU"] == own["gIoU"]
    assert again["cIoU"] == own["cIoU"]


@pytest.fixture(scope="module")
def perfect(demo: Path) -> list[dict]:
    """Records of three images whose masks are right."""
    from dual_loop.config import DataConfig
    from dual_loop.data.dataset_builder import open_source
    from dual_loop.evaluation.measure import blank_regions
    from dual_loop.evaluation.runner import MeasuredData

    data = DataConfig(refcoco_dir=str(demo / "ref_seg"), refcoco_split="val", index_dir=str(demo.parent / "index"))
    source = MeasuredData("refcoco:val", open_source("refcoco", data))
    regions = [region for index in range(3) for region in blank_regions(source.load(index, 0), "refcoco:val")]
    return [{"name": r.name, "sentences": [{"mask": r.target} for _ in r.references]} for r in regions]


def count_again(demo: Path, out: Path, text: str) -> tuple[int, Path]:
    out.mkdir()
    (out / "saved.jsonl").write_text(text, encoding="utf-8")
    arguments = [*evaluate_arguments(demo, out), "--max_samples", "3", "--predictions", str(out / "saved.jsonl")]
    return main(arguments), out


def as_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def changed(records: list[dict], **first: object) -> list[dict]:
    """Return the records with another mask of the first sentence."""
    sentence, *others = records[0]["sentences"]
    return [{**records[0], "sentences": [{**sentence, **first}, *others]}, *records[1:]]


def test_a_mask_that_cannot_be_read_never_raises_a_score(
    demo: Path, tmp_path: Path, perfect: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    size = perfect[0]["sentences"][0]["mask"]["size"]
    bad = {
        "broken_rle": {"size": size, "counts": "xx"},
        "size_mismatch": {"size": [9, 9], "counts": [40, 41]},
        "no_mapping": "xx",
        "null": None,
        "number": 7,
    }
    count = sum(len(record["sentences"]) for record in perfect)
    for name, mask in bad.items():
        code, out = count_again(demo, tmp_path / name, as_lines(changed(perfect, mask=mask)))
        message = capsys.readouterr().err
        assert code == 0, message
        found = figures(out)["referring"]
        assert found["sentences"] == count
        assert found["gIoU"]["value"] == pytest.approx((count - 1) / count)
        written = json.loads((out / "evaluation.json").read_text())["masks_that_miss"]
        reason = {"null": None, "number": "bad_polygon", "no_mapping": "bad_polygon"}.get(name, name)
        assert written == ({} if reason is None else {reason: 1})
        assert ("count as misses" in message) == (reason is not None)
    code, out = count_again(demo, tmp_path / "missing", as_lines(perfect[1:]))
    assert code == 0
    missed = len(perfect[0]["sentences"])
    assert figures(out)["referring"]["gIoU"]["value"] == pytest.approx((count - missed) / count)
    assert json.loads((out / "evaluation.json").read_text())["masks_that_miss"] == {"missing": missed}


def test_predictions_that_do_not_fit_the_data_are_refused(
    demo: Path, tmp_path: Path, perfect: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    other = {**perfect[0], "name": perfect[0]["name"] + "9"}
    twice = [*perfect, *changed(perfect[:1], mask=None)]
    more = [{**perfect[0], "sentences": perfect[0]["sentences"] + [{"mask": None}]}, *perfect[1:]]
    cases = {
        "unknown": (as_lines([other, *perfect[1:]]), perfect[0]["name"]),
        "twice": (as_lines(twice), "predicted twice"),
        "more": (as_lines(more), "more predictions than expressions"),
        "empty": ("", "is empty"),
        "list": (json.dumps(perfect), "not a record of a region"),
    }
    for name, (text, expected) in cases.items():
        code, out = count_again(demo, tmp_path / name, text)
        message = capsys.readouterr().err
        assert code == 2, name
        assert expected in message
        assert message.count("error:") == 1
        assert not (out / "evaluation.json").exists()


def test_generated_answers(demo: Path) -> None:
    out = demo.parent / "generated"
    run(
        *evaluate_arguments(demo, out),
        "--protocol",
        "generated",
        "--max_samples",
        8,
        "--tasks",
        "referring",
        "--undo_target_shift",
    )
    assert json.loads((out / "evaluation.json").read_text())["protocol"]["undo_target_shift"] is True
    found = figures(out)
    assert found["images"] == 8
    assert found["referring"]["without_mask"]["value"] <= 0.2, "the tiny model writes [SEG] by itself"
    assert "captioning" not in found


@pytest.mark.parametrize(
    ("flags", "name", "tiles"),
    [((), "sa2va", 12), (("--max_tiles", "auto"), "sa2va", 12), (("--max_tiles", "2"), "sa2va*", 2)],
)
def test_the_protocol_of_the_original_cuts_images_as_it_does(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], name: str, tiles: int
) -> None:
    out = tmp_path / "tiles"
    run(*evaluate_arguments(demo, out), "--protocol", "sa2va", "--max_samples", 2, "--tasks", "referring", *flags)
    protocol = json.loads((out / "evaluation.json").read_text())["protocol"]
    assert (protocol["name"], protocol["max_tiles"]) == (name, tiles)
    assert f"max_tiles {tiles}" in capsys.readouterr().out


def test_figures_of_a_run_are_those_of_its_summary(demo: Path) -> None:
    out = demo.parent / "run"
    data = ["--sa1b_dir", demo / "sa1b", "--eval_dir", demo / "ref_seg"]
    run("train", "--config", "tiny_demo", *data, "--max_steps", 2, "--output_dir", out, "--device", "cpu")
    run("evaluate", out, "--device", "cpu")  # the held-out set of the run
    after = json.loads((out / "summary.json").read_text())["after"]
    found = figures(out / "evaluation")
    for name, figure in (
        ("gIoU", found["referring"]["gIoU"]),
        ("cIoU", found["referring"]["cIoU"]),
        ("cycle_gIoU", found["loop"]["cycle_gIoU"]),
        ("uniqueness", found["loop"]["uniqueness"]),
        ("caption_exact", found["captioning"]["exact"]),
    ):
        assert figure["value"] == pytest.approx(after[name], abs=1e-9), name


def test_errors_are_one_message(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("report", str(tmp_path)): "not a run folder",
        ("evaluate", str(tmp_path / "nothing")): "no such run or weights",
        ("evaluate", "--data", "refcoco:vla", "--refcoco_dir", str(demo / "ref_seg")): "no RefCOCO data set has this",
        ("evaluate", "--data", "coco"): "unknown data set",
        ("evaluate",): "no data set is given",
        ("audit", "--data", "sa1b"): "set --sa1b_dir",
    }
    for arguments, text in cases.items():
        assert main(list(arguments)) == 2, arguments
        message = capsys.readouterr().err
        assert text in message
        assert message.count("error:") == 1
        assert "Traceback" not in message

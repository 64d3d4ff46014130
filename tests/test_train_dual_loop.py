"""The training entry on generated data: what it prints, what it leaves, how it stops and goes on."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from dual_loop import train_dual_loop
from dual_loop.checkpoint.store import newest_whole
from dual_loop.cli import main as run_command
from dual_loop.data.coco_masks import encode_rle
from dual_loop.data.masks_dir import MasksDir
from dual_loop.testing.demo_data import demo_directories, write_demo_data
from dual_loop.testing.scenes import generate_scene, pool_seed
from dual_loop.train_dual_loop import TO_BE_CONTINUED, exit_status, main
from dual_loop.training.trainer import FitResult

from schemas import problems
from warm_python import warm_python

SOURCES = ("sav", "sa1b", "openimages", "refcoco")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    write_demo_data(out, 4, seed=3, num_val=2)
    return out


def _arguments(demo: Path, output_dir: Path, *more: str, evaluate: bool = False) -> list[str]:
    folders = [part for key, path in demo_directories(demo).items() for part in (f"--{key}", path)]
    if evaluate:
        folders += ["--eval_dir", str(demo / "ref_seg")]
    return [
        *("--config", "tiny_cpu", *folders, "--output_dir", str(output_dir), "--device", "cpu"),
        *("--batch_size", "1", "--gradient_accumulation_steps", "2", "--num_workers", "0", "--log_interval", "1"),
        *("--max_new_tokens", "4", *more),
        *("--cfg-options", "model.initial_weights=none", f"data.index_dir={output_dir.parent / 'index'}"),
        *("loop.max_rejected_fraction=1", "data.refcoco_datasets=refcoco", "data.eval_datasets=refcoco"),
    ]


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _start(arguments: list[str], log: Path, python: str = "") -> subprocess.Popen[bytes]:
    command = [python or warm_python(), "-m", "dual_loop.train_dual_loop", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env=environment)


def _wait_for_step(process: subprocess.Popen[bytes], folder: Path, step: int, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and len(_records_so_far(folder)) >= step:
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in time: {log.read_text()}")


def _records_so_far(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_a_run_prints_the_promised_lines_in_order_and_leaves_everything(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(_arguments(demo, folder, "--max_steps", "3", evaluate=True)) == 0
    text = capsys.readouterr().out
    promised = (
        *("Building VideoLLaVASAMModel...", "✓ Model built", "No pretrained weights"),
        *("✓ Dataset built: 16 total samples", "✓ Dataloader created: 16 batches", "Evaluation before"),
        *("Epoch 1/1", "loss=", "Evaluation after", "Done: 3 steps"),
    )
    positions = [text.index(line) for line in promised]
    assert positions == sorted(positions)
    assert "✓ Pretrained weights loaded" not in text
    assert [found for name in ("summary.json", "metrics.jsonl") for found in problems(folder / name)] == []
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["checkpointing"]["recomputed"] == 0
    assert set(summary["sources"]) == set(SOURCES)
    assert sum(summary["sources"].values()) == 6
    for name in ("before", "after"):
        assert {"gIoU", "cIoU", "cycle_gIoU", "caption_exact", "uniqueness", "vocabulary"} < set(summary[name])
    change = summary["gain"]["gIoU"]
    assert change["mean"] == pytest.approx(summary["after"]["gIoU"] - summary["before"]["gIoU"], abs=1e-9)
    assert change["ci95_low"] <= change["mean"] <= change["ci95_high"]
    record = _records(folder)[-1]
    for key in ("loss", "mask_loss", "dice_loss", "llm_loss", "grad_norm", "lr", "tokens", "regions", "counters"):
        assert key in record
    assert set(record["seconds"]) == {"total", "data", "rollout", "forward", "backward", "optimiser"}
    assert record["loss"] == pytest.approx(record["mask_loss"] + record["dice_loss"] + record["llm_loss"])
    assert list((folder / "panels").glob("step_000003_*.png"))
    config = json.loads((folder / "config.json").read_text())
    assert config["train"]["max_steps"] == 3


def test_memory_decides_how_many_layers_are_recomputed(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {}
    for memory, recomputed in ((64, 0), (0.1, 3)):
        folder = tmp_path / str(memory)
        options = ("model.gradient_checkpointing=True", f"speed.memory_gib={memory}", "speed.prefetch_to_device=True")
        assert main([*_arguments(demo, folder, "--max_steps", "2"), *options]) == 0  # --cfg-options stands last
        assert f"Checkpointing: {recomputed} of 3 decoder layers recomputed (memory: " in capsys.readouterr().out
        found = json.loads((folder / "summary.json").read_text())["checkpointing"]
        assert (found["recomputed"], found["layers"], found["chosen_by"]) == (recomputed, 3, "memory")
        assert found["fits"] == (recomputed == 0)
        losses[memory] = [record["loss"] for record in _records(folder)]
    assert losses[64] == losses[0.1]


def test_images_of_several_tiles_train_measure_and_are_kept(demo: Path, tmp_path: Path) -> None:
    """Some scenes fit one tile, others twelve and a thumbnail; features that are read again change nothing."""
    kept = f"speed.feature_cache={tmp_path / 'features'}"
    losses = {}
    for name, more in (("whole", ()), ("cut", (kept,)), ("cut again", (kept,))):
        folder, tiles = tmp_path / name, "1" if name == "whole" else "12"
        flags = _arguments(demo, folder, "--max_steps", "2", "--max_tiles", tiles, evaluate=True)
        assert main([*flags, "data.decode_scale=needed", *more]) == 0  # --cfg-options stands last
        assert json.loads((folder / "config.json").read_text())["data"]["max_tiles"] == int(tiles)
        losses[name] = [(record["loss"], record["tokens"]) for record in _records(folder)]
    assert losses["cut"] == losses["cut again"]
    more = sum(cut - whole for (_, cut), (_, whole) in zip(losses["cut"], losses["whole"], strict=True))
    assert more > 0
    assert more % (12 * 64) == 0


def test_evaluation_does_not_change_training(demo: Path, tmp_path: Path) -> None:
    flags = ("--eval_interval", "1", "--keep_best", "gIoU")
    for name, more in (("with", flags), ("without", ())):
        assert main(_arguments(demo, tmp_path / name, "--max_steps", "2", *more, evaluate=name == "with")) == 0
    records = [record for record in _records(tmp_path / "with") if "evaluation" in record]
    best = max(records, key=lambda record: record["evaluation"]["gIoU"])
    found = json.loads((tmp_path / "with/summary.json").read_text())
    assert found["best"] == {"figure": "gIoU", "value": best["evaluation"]["gIoU"], "step": best["step"]}
    assert found["after"]["gIoU"] == records[-1]["evaluation"]["gIoU"]
    digests = [_digest(tmp_path / name / "checkpoints/step_00000002/model.safetensors") for name in ("with", "without")]
    assert digests[0] == digests[1]


def test_a_used_folder_is_refused_and_a_finished_run_resumes_to_nothing(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(demo, tmp_path / "run", "--max_steps", "1", evaluate=True)
    assert main(arguments) == 0
    first = json.loads((tmp_path / "run/summary.json").read_text())
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "--resume auto" in captured.err
    assert "Building" not in captured.out
    assert main([*arguments, "--resume", "auto"]) == 0
    again = json.loads((tmp_path / "run/summary.json").read_text())
    assert again["before"] == first["before"]
    assert again["gain"] == first["gain"]
    assert len(_records(tmp_path / "run")) == 1


def test_bad_samples_are_named_counted_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_demo_data(tmp_path / "demo", 4, seed=5, sources=("sav", "sa1b"))
    broken = sorted((tmp_path / "demo/sav").rglob("*.npz"))[1]
    broken.write_bytes(broken.read_bytes()[:500])
    missing = sorted((tmp_path / "demo/sa1b").rglob("*.jpg"))[2]
    missing.unlink()
    arguments = _arguments(tmp_path / "demo", tmp_path / "run", "--max_steps", "6")
    for name in ("openimages", "ref_seg"):
        arguments = [part for part in arguments if name not in part]
    arguments = [part for part in arguments if part not in ("--openimage_dir", "--refcoco_dir")]
    assert main(arguments) == 0
    counters = json.loads((tmp_path / "run/summary.json").read_text())["counters"]
    assert counters["data/bad_samples_distinct"] >= 1
    assert any(key.startswith("data/bad_samples/sav/") for key in counters)
    captured = capsys.readouterr()
    assert f"Warning: skipped sav/npz/part_000/{broken.stem}" in captured.err
    assert "data/bad_samples=" in captured.out


@pytest.mark.slow
def test_killed_and_resumed_is_bitwise_a_straight_run(demo: Path, tmp_path: Path) -> None:
    steps = ("--max_steps", "6", "--save_interval", "1")
    sampling = ("loop.temperature=1.0", "model.lora_dropout=0.1")  # random numbers of both kinds
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    process = _start([*_arguments(demo, straight, *steps, "--num_workers", "1"), *sampling], tmp_path / "a.log")
    assert process.wait(timeout=200) == 0, (tmp_path / "a.log").read_text()
    arguments = [*_arguments(demo, broken, *steps, "--num_workers", "1"), *sampling]
    process = _start(arguments, tmp_path / "b.log")
    _wait_for_step(process, broken, 4, tmp_path / "b.log")
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (broken / "summary.json").exists()
    # Started from scratch: with a hash seed of its own.
    process = _start([*arguments, "train.resume=auto"], tmp_path / "c.log", sys.executable)
    assert process.wait(timeout=200) == 0, (tmp_path / "c.log").read_text()
    assert "Resumed from" in (tmp_path / "c.log").read_text()
    for name in ("model.safetensors", "ema.safetensors"):
        digests = [_digest(run / "checkpoints/step_00000006" / name) for run in (straight, broken)]
        assert digests[0] == digests[1], name
    keys = ("step", "loss", "grad_norm", "lr", "cycle_iou", "counters", "tokens")
    left, right = ([{key: r[key] for key in keys} for r in _records(run)] for run in (straight, broken))
    assert left == right
    summaries = [json.loads((run / "summary.json").read_text()) for run in (straight, broken)]
    assert summaries[0]["sources"] == summaries[1]["sources"]
    assert summaries[0]["counters"] == summaries[1]["counters"]


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_zero(demo: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    process = _start(_arguments(demo, folder, "--max_steps", "500", "--num_workers", "2"), log)
    _wait_for_step(process, folder, 2, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, log.read_text()
    step = len(_records(folder))
    assert f"Stopped by SIGTERM after step {step}" in log.read_text()
    assert "go on with --resume auto" in log.read_text()
    assert (folder / f"checkpoints/step_{step:08d}/manifest.json").is_file()
    assert json.loads((folder / "summary.json").read_text())["steps"] == step


@pytest.mark.slow
def test_of_two_starts_one_writes_and_a_requeue_after_kill_9_goes_on(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = _arguments(demo, folder, "--max_steps", "500", "--save_interval", "1")
    process = _start(arguments, log)
    _wait_for_step(process, folder, 2, log)
    assert main(arguments) == 2
    assert f"another run writes this folder; where: {folder / 'run.lock'}; seen: process" in capsys.readouterr().err
    process.kill()
    process.wait()
    assert (folder / "run.lock").exists()
    assert main(_arguments(demo, folder, "--max_steps", "4", "--save_interval", "1", "--resume", "auto")) == 0
    captured = capsys.readouterr()
    assert "took over" in captured.err
    assert "applied: train.max_steps: 500 -> 4" in captured.out
    assert not (folder / "run.lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_loader_that_is_killed_or_stopped_ends_the_run_with_one_message(
    demo: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    flags = _arguments(demo, folder, "--max_steps", "500", "--num_workers", "1", "--save_interval", "1")
    process = _start([*flags, "train.rank_timeout=5"], log)
    _wait_for_step(process, folder, 2, log)
    own = json.loads((folder / "run.lock").read_text())["pid"]
    children = psutil.Process(own).children()
    assert len(children) == 1
    for child in children:
        child.send_signal(number)
    assert process.wait(timeout=60) == 2, log.read_text()
    text = log.read_text()
    assert "Traceback" not in text
    assert text.count("\nerror: ") == text.count("error: a process that loads data was killed or hangs") == 1
    assert newest_whole(folder)[0] is not None
    assert not any(child.is_running() for child in children)


@pytest.mark.slow
@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="started in the background, without Ctrl-C"
)
def test_ctrl_c_while_starting_is_one_message(demo: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    process = _start(_arguments(demo, folder), log)
    while not (folder / "run.lock").exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    assert log.read_text().count("error: ") == 1
    assert not (folder / "run.lock").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_with_one_message(demo: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = _arguments(demo, folder, "--max_steps", "500", "--save_interval", "1", "--panel_interval", "1")
    process = _start(arguments, log)
    _wait_for_step(process, folder, 2, log)
    own = json.loads((folder / "run.lock").read_text())["pid"]
    resource.prlimit(own, resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    assert process.wait(timeout=60) == 2, log.read_text()
    text = log.read_text()
    assert "Traceback" not in text
    assert text.count("\nerror: ") == text.count("error: the checkpoint cannot be written; where: ") == 1
    assert "bytes of space" in text
    assert newest_whole(folder)[0] is not None


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_and_evaluate_as_one(demo: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    often = ("--max_steps", "2", "--eval_interval", "1", "--keep_best", "gIoU")
    assert main(_arguments(demo, one, *often, evaluate=True)) == 0
    arguments = _arguments(demo, two, *often, "--gradient_accumulation_steps", "1", evaluate=True)
    command = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "dual_loop.train_dual_loop", *arguments, "train.num_threads=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("✓ Model built") == 1
    left, right = (json.loads((run / "summary.json").read_text()) for run in (one, two))
    assert right["world_size"] == 2
    assert left["sources"] == right["sources"]
    assert left["counters"] == right["counters"]
    for name in ("before", "after"):
        assert left[name] == pytest.approx(right[name], abs=1e-4)
    assert left["best"] == pytest.approx(right["best"], abs=1e-4)
    assert (one / "checkpoints/best").resolve().name == (two / "checkpoints/best").resolve().name
    for a, b in zip(_records(one), _records(two), strict=True):
        if "evaluation" in a:
            assert a["evaluation"] == pytest.approx(b["evaluation"], abs=1e-4)
            continue
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no data set is given"),
        (["--sav_dir", "/no/such/a", "--eval_dir", "/no/such/b", "--pretrained_pth", "/no/such/c"], "3 problem(s)"),
        (["--config", "tiny_cup"], "did you mean tiny_cpu"),
        (["--batch_size", "0", "--cfg-options", "train.sede=1"], "did you mean train.seed"),
        pytest.param(
            ["--sav_dir", ".", "--device", "cuda"],
            "no GPU is visible",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible here"),
        ),
    ],
)
def test_problems_have_status_two_and_a_message(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert "\nerror: " in captured.err
    assert expected in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("max_restarts", "stopped_by", "is_own", "expected"),
    [
        ("100", "a signal on another rank", False, TO_BE_CONTINUED),
        ("100", "SIGTERM", True, 0),  # this machine is the one that leaves
        ("100", None, False, 0),
        ("100", None, True, 0),  # the signal came in the last step
        ("0", "a signal on another rank", False, 0),  # nobody would start it again
        (None, "a signal on another rank", False, 0),
    ],
)
def test_only_a_rank_that_stays_asks_its_launcher_to_start_it_again(
    monkeypatch: pytest.MonkeyPatch, max_restarts: str | None, stopped_by: str | None, is_own: bool, expected: int
) -> None:
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    if max_restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", max_restarts)
    result = FitResult(3, stopped_by, "checkpoints/step_00000003", is_own)
    assert exit_status(result) == expected
    monkeypatch.setattr(train_dual_loop, "train", lambda config: result)
    assert main([]) == expected


def test_dry_run_shares_out_the_effective_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["--dry_run", "--config", "tiny_cpu", "--batch_size", "2", "--effective_batch", "24"]) == 0
    assert "effective batch: 24 = 4 processes x 2 images x 3" in capsys.readouterr().out
    assert main(["--dry_run", "--config", "tiny_cpu", "--batch_size", "2", "--effective_batch", "20"]) == 2
    assert "a multiple of 8 = 4 processes x 2 images" in capsys.readouterr().err


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry_run", "--config", "tiny_cpu", "--output_dir", str(tmp_path / "run")]) == 0
    assert "effective batch: 8" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def _own_masks(folder: Path, count: int, captions: bool) -> Path:
    (folder / "images").mkdir(parents=True)
    with (folder / "masks.jsonl").open("w") as stream:
        for number in range(count):
            scene = generate_scene(pool_seed(5, "own", number))
            Image.fromarray(scene.image).save(folder / f"images/{number}.png")
            for place, item in enumerate(scene.objects):
                line = {"image": f"images/{number}.png", "id": place, "segmentation": encode_rle(item.mask)}
                stream.write(json.dumps(line | ({"caption": scene.captions[place]} if captions else {})) + "\n")
    return folder


@pytest.mark.parametrize("captions", [True, False])
def test_a_share_of_own_masks_is_measured_and_not_trained(
    tmp_path: Path, captions: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _own_masks(tmp_path / "own", 7, captions)
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", "tiny_cpu", "--masks_dir", "own"]
    arguments += ["--val_fraction", "0.3", "--eval_interval", "1", "--max_steps", "2", "--device", "cpu"]
    arguments += ["--batch_size", "2", "--gradient_accumulation_steps", "1", "--num_workers", "0"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--max_new_tokens", "4", "--cfg-options"]
    arguments += [f"data.index_dir={tmp_path / 'index'}", "loop.max_rejected_fraction=1"]
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    before = json.loads((tmp_path / "run/evaluation_before.json").read_text())
    held_out = MasksDir(tmp_path / "own", left_to_val=0.3, is_val=True)
    assert {region["image"].split("/")[-1] for region in before["regions"]} == {
        held_out.entry_id(index) for index in range(3)
    }
    assert (summary["before"]["gIoU"] is not None, "gIoU" in summary["gain"]) == (captions, captions)
    assert summary["gain"]["cycle_gIoU"]["ci95_low"] <= summary["gain"]["cycle_gIoU"]["mean"]
    evaluations = [record["evaluation"] for record in _records(tmp_path / "run") if "evaluation" in record]
    assert [one["cycle_gIoU"] for one in evaluations][1] == summary["after"]["cycle_gIoU"]
    assert list((tmp_path / "run/panels").glob("before_*.png"))
    if captions:
        return
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for wanted, images, note in (("", 3, False), ("--masks_dir ../own", 7, True), ("--val_fraction 0", 7, True)):
        capsys.readouterr()
        line = (
            f"evaluate ../run --tasks loop --device cpu --overwrite --json {wanted} --cfg-options loop.max_new_tokens=4"
        )
        assert run_command(line.split()) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["data"][0]["entries"] == images
        assert ("the run trained on these entries of masks" in printed.err) is note


def test_a_figure_that_is_not_measured_is_refused_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = str(_own_masks(tmp_path / "own", 2, captions=False))
    arguments = ["--config", "tiny_cpu", "--masks_dir", own, "--eval_masks_dir", own, "--eval_interval", "1"]
    arguments += ["--keep_best", "gIoU", "--output_dir", str(tmp_path / "run"), "--device", "cpu", "--num_workers", "0"]
    assert main([*arguments, "--cfg-options", f"data.index_dir={tmp_path / 'index'}"]) == 2
    assert "cannot measure gIoU" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()

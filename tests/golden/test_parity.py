"""Parity with recorded outputs of the original, and that the comparison notices what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY / "scripts")]

import check_parity as program  # noqa: E402
from synthetic_case import write_case  # noqa: E402

from parity.report import Report  # noqa: E402
from warm_python import warm_python  # noqa: E402


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("set") / "other_sizes")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_all_recorded_sets_agree(golden: Path, precision: str) -> None:
    sets = sorted(path.parent for path in golden.glob("*/outputs.safetensors"))
    if not sets:
        pytest.skip(f"no recorded set in {golden.name}/")
    for folder in sets:
        script = str(REPOSITORY / "scripts" / "check_parity.py")
        # The models are so small that two threads mostly wait for each other.
        command = [warm_python(), script, str(folder), "--mixed_precision", precision, "--threads", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = done.stdout.strip().splitlines()[-1]
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
        num_passed, num_failed = (int(part.split()[0]) for part in last.split(", "))
        assert num_failed == 0
        assert num_passed > 150, last


def run(program: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str]]:
    before = torch.get_num_threads()
    try:
        status = program.main([str(folder), "--threads", "1"])
    finally:
        torch.set_num_threads(before)
    return status, capsys.readouterr().out.strip().splitlines()


def test_a_set_of_other_sizes_and_counts_is_read_from_its_files(
    synthetic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = run(program, synthetic, capsys)
    assert status == 0, "\n".join(line for line in lines if "FAILED" in line)
    assert lines[-1].endswith(" passed, 0 failed")
    checked = {line.split("|")[0].strip() for line in lines}
    listed = {name for name in load_file(synthetic / "outputs.safetensors") if not name.startswith("clip_")}
    assert listed - checked == {"point_coords"}  # an input of the losses
    assert "not compared: clip_anything" in lines
    assert sum(line.startswith("losses.points.loss_mask") for line in lines) == 2


def test_every_kind_of_difference_is_a_failure(
    synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(synthetic, folder)
    outputs = load_file(folder / "outputs.safetensors")
    for name, step in (("logits", 2e-4), ("fpn_1", 2e-4), ("pred_masks_low_res", 3e-4), ("caption_step_logits", 2e-4)):
        outputs[name].view(-1)[0] += step
    outputs["vit_embeds"][0, 0, 0] = float("nan")
    outputs["predict_mask"][0, 0, 0] ^= True
    outputs["caption_generated_ids"][0, 0] += 1
    outputs["grad.text_hidden_fcs.0.bias"] *= 1.001
    outputs["surprise"] = torch.zeros(1)
    save_file(outputs, folder / "outputs.safetensors")
    inputs = load_file(folder / "inputs.safetensors")
    inputs["g_pixel_values"][2, 0, 0, 0] ^= 1
    inputs["labels"][0, -1] = 7
    save_file(inputs, folder / "inputs.safetensors")
    results = json.loads((folder / "outputs.json").read_text())
    results["losses"]["points"]["loss_dice"] += 2e-5
    results["parameters_without_grad"].pop()
    results["grad_norm_groups_points"]["lora_A"] *= 1.001
    (folder / "outputs.json").write_text(json.dumps(results))
    status, lines = run(program, folder, capsys)
    assert status == 1
    failed = {line.split("|")[0].strip() for line in lines if "| FAILED" in line}
    changed = {"logits", "fpn_1", "pred_masks_low_res", "caption_step_logits", "vit_embeds", "predict_mask"}
    changed |= {"caption_generated_ids", "grad.text_hidden_fcs.0.bias", "surprise", "labels, by the prompter"}
    changed |= {"g_pixel_values, photo2.png", "losses.points.loss_dice", "parameters_without_grad"}
    assert changed | {"grad_norm_groups_points.lora_A"} <= failed
    assert not {"hidden", "inputs_embeds", "seg_embeds", "losses.no_points.loss_mask"} & failed


def test_a_check_that_breaks_off_is_a_failure(
    synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(synthetic, folder)
    inputs = load_file(folder / "inputs.safetensors")
    del inputs["prompt_masks.1"]
    save_file(inputs, folder / "inputs.safetensors")
    (folder / "checkpoint_trainable.pth").unlink()
    status, lines = run(program, folder, capsys)
    assert status == 1
    assert lines[-1].endswith(" failed")
    failed = [line for line in lines if "| FAILED" in line]
    assert any(line.startswith("pre-processing") and "KeyError" in line for line in failed)
    assert any(line.startswith("checkpoint_full.pth") and "PromptError" in line for line in failed)
    assert any(line.startswith("checkpoint_trainable.pth") and "not there" in line for line in failed)


def test_a_bfloat16_run_has_tolerances_of_its_own() -> None:
    ones, near, far = torch.ones(100), torch.ones(100), torch.ones(100)
    near[0], far[:2] = 1.2, 1.5
    half, full = Report(is_half=True), Report()
    assert half.close("a", near, ones, absolute=1e-4, half=0.03).ok  # the root mean square is 0.02
    assert not half.close("b", far, ones, absolute=1e-4, half=0.03).ok
    assert not half.close("c", torch.full((2,), float("nan")), torch.ones(2), absolute=1e-4, half=0.03).ok
    assert not half.close("d", near, ones, absolute=1e-4).ok
    assert not full.close("e", near, ones, absolute=1e-4, half=0.03).ok
    assert half.number("f", 1.004, 1.0, absolute=1e-5, half=5e-3).ok
    assert not half.number("g", 1.006, 1.0, absolute=1e-5, half=5e-3).ok
    assert half.same("h", near > 1, ones > 1, half=0.01).ok
    assert not half.same("i", far > 1, ones > 1, half=0.01).ok
    assert not half.same("j", near > 1, ones > 1).ok
    assert not full.same("k", near > 1, ones > 1, half=0.01).ok


def test_the_report_counts_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    assert report.close("a", torch.ones(2), torch.tensor([1.0, 1.001]), absolute=2e-3).ok
    assert not report.close("b", torch.ones(2), torch.tensor([1.0, 1.001]), relative=1e-4).ok
    assert not report.close("c", torch.ones(2), torch.ones(3), absolute=1.0).ok
    assert not report.close("d", torch.tensor([float("nan")]), torch.tensor([float("nan")]), absolute=1.0).ok
    assert not report.close("e", torch.tensor([float("inf")]), torch.tensor([1.0]), relative=1.0).ok
    assert not report.close("f", torch.tensor(1e-9), torch.tensor(0.0), relative=1e-4).ok
    assert report.same("g", torch.tensor([True]), torch.tensor([True])).ok
    assert not report.same("h", torch.tensor([1]), torch.tensor([2])).ok
    assert not report.same("i", [1, 2], [2, 1]).ok
    quiet = [report.number("j", 1.0, 1.0, relative=1e-4, quiet=True), report.number("k", 2.0, 1.0, relative=1e-4)]
    report.worst("group", quiet)
    assert report.summary() == "3 passed, 8 failed"
    printed = capsys.readouterr().out
    assert "\nj " not in printed
    assert "worst: k" in printed
    with pytest.raises(ValueError, match="one tolerance"):
        report.close("l", torch.ones(1), torch.ones(1))

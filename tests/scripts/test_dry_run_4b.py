"""The program of ``scripts/dry_run_4b.sh`` on a small model of the same config, and its parts on their own."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dual_loop.config import CONFIG_DIR, load_config
from dual_loop.model.build import build_prompter, build_tokenizer
from dual_loop.preflight.dry_run import PlaceholderTokenizer

from warm_python import warm_python

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = CONFIG_DIR / "sa2va_4b_cpu.py"

# Every difference to the real size; dtype, precision, LoRA targets, sources and flags are those of the 4B run.
SMALL = """
_base_ = ["{base}"]
model = dict(
    vision=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                image_size=[64, 64], patch_size=[8, 8]),
    text=dict(vocab_size=2000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              intermediate_size=64),
    sam2=dict(_delete_=True, image_size=64, fpn_hidden_size=32,
              backbone=dict(hidden_size=8, num_attention_heads=1, blocks_per_stage=[1, 1, 2, 1],
                            window_size_per_stage=[8, 4, 8, 4], global_attention_blocks=[3]),
              mask_decoder=dict(mlp_dim=32, num_attention_heads=2)),
    lora_r=4, lora_alpha=8,
)
"""


def load_program() -> ModuleType:
    specification = importlib.util.spec_from_file_location(
        "real_size_step", REPOSITORY / "scripts" / "real_size_step.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


program = load_program()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "small.py"
    path.write_text(SMALL.format(base=CONFIG.as_posix()), encoding="utf-8")
    return path


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [warm_python(), "scripts/real_size_step.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)


def test_the_config_is_the_real_size() -> None:
    ours, full = load_config(CONFIG), load_config(CONFIG_DIR / "sa2va_4b_full.py")
    # "auto" is "none" for imported weights, which the full run has.
    assert full.model.train_embeddings == "auto"
    assert ours.model == dataclasses.replace(full.model, train_embeddings="none")
    assert ours.loss == full.loss
    assert ours.model.gradient_checkpointing
    assert (ours.model.sam2["image_size"], ours.model.text["vocab_size"]) == (1024, 151679)


@pytest.mark.slow
def test_a_whole_step_moves_every_group(small: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    arguments = ("--config", str(small), "--max_new_tokens", "5", "--folder", str(kept))
    done = run_program(*arguments, "--limit_gib", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    # 2 layers of 7 linear layers with A and B each; one of three mask candidates was chosen (2 x 6 tensors left out),
    # and the decoder has 7 attentions, each with a bias of its keys.
    assert "trainable groups moved: mask_decoder 94/94, lora 28/28, mlp1 6/6, text_hidden_fcs 4/4" in done.stdout
    assert "19 of them not counted below" in done.stdout
    assert "step 1: 5 new tokens" in done.stdout
    assert "(limit 8)" in done.stdout
    for phase in ("build", "step 1: vision tower", "backward", "panels, checkpoint", "total"):
        assert any(line.strip().startswith(phase) for line in done.stdout.splitlines()), phase
    groups = program.moved_groups(kept / "run" / "checkpoints" / "step_00000001", 0.1, 1e-5, 0.05, "random")
    # Adam's first step is the learning rate, up to rounding.
    assert all(group.largest_change == pytest.approx(1e-5, rel=0.2) for group in groups.values())


@pytest.mark.slow
def test_over_the_limit_and_lora_b_at_zero(small: Path) -> None:
    before = set((REPOSITORY / "outputs").glob("dry_run_4b_*"))
    done = run_program("--config", str(small), "--max_new_tokens", "2", "--limit_gib", "0.01", "--lora_b", "zero")
    assert done.returncode == 1
    assert "lora 14/14" in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "GiB is over the limit" in errors[0]
    assert set((REPOSITORY / "outputs").glob("dry_run_4b_*")) == before, "the folder is deleted at the end"


@pytest.mark.slow
def test_a_run_that_fails_is_reported(tmp_path: Path, small: Path) -> None:
    occupied = tmp_path / "kept"
    (occupied / "run" / "checkpoints").mkdir(parents=True)
    done = run_program("--config", str(small), "--folder", str(occupied))
    assert done.returncode == 1
    assert "error: the training entry ended with status 2" in done.stderr


@pytest.mark.parametrize("vocab_size", [2000, 151679])
def test_the_tokenizer_has_the_real_layout(vocab_size: int, tmp_path: Path) -> None:
    config = load_config(CONFIG)
    program.write_tokenizer(tmp_path, vocab_size)
    tokenizer = build_tokenizer(config.model, str(tmp_path))
    assert len(tokenizer) == vocab_size
    expected = PlaceholderTokenizer(vocab_size).ids
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in expected} == expected
    prompter = build_prompter(config, tokenizer)  # refuses markers that are not single tokens
    assert prompter.image_prefix(1).count(expected["<IMG_CONTEXT>"]) == 256
    text = "Please segment the red cross in this image."
    assert tokenizer.decode(prompter.encode(text)) == text
    if vocab_size == 151679:
        assert tokenizer.eos_token_id == 151643
        assert expected["<IMG_CONTEXT>"] == 151667


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 99"):
        program.add_pairs({"a": 0, "b": 1}, [], 99)


def write_step(folder: Path, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Write what a checkpoint holds after one step: parameters, and averages with decay 0.1."""
    save_file(after, folder / "model.safetensors")
    save_file({name: torch.lerp(before[name], after[name], 0.9) for name in after}, folder / "ema.safetensors")


def step_of(folder: Path, changes: dict[str, Any], lora_b: str = "random") -> Any:
    """Return the groups of a step with rate 1e-5 and decay 0.05 on random tensors; ``changes`` are added to them."""
    torch.manual_seed(0)
    before = {name: torch.randn(16, 16) for name in changes}
    # The same arithmetic as AdamW: decay first, then the step.
    after = {name: before[name] * (1 - 1e-5 * 0.05) + changes[name] for name in changes}
    write_step(folder, before, after)
    return program.moved_groups(folder, 0.1, 1e-5, 0.05, lora_b)


def test_weight_decay_alone_is_no_movement(tmp_path: Path) -> None:
    groups = step_of(tmp_path, {"text_hidden_fcs.0.weight": 0.0, "text_hidden_fcs.2.weight": 1e-5})
    assert groups["text_hidden_fcs"].still == ["text_hidden_fcs.0.weight"]
    assert program.group_problems(groups, ["text_hidden_fcs"]) != []
    assert str(groups["text_hidden_fcs"]) == "1/2"


def test_one_value_that_moved_is_enough(tmp_path: Path) -> None:
    change = torch.zeros(16, 16)
    change[3, 4] = -1e-5
    groups = step_of(tmp_path, {"text_hidden_fcs.0.weight": change})
    assert groups["text_hidden_fcs"].still == []
    assert program.group_problems(groups, ["text_hidden_fcs"]) == []


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    groups = step_of(tmp_path, {"text_hidden_fcs.0.weight": float("nan"), "text_hidden_fcs.2.weight": float("inf")})
    assert len(groups["text_hidden_fcs"].not_finite) == 2
    assert "2 tensors not finite" in program.group_problems(groups, ["text_hidden_fcs"])[0]


def test_a_group_without_tensors_is_a_problem(tmp_path: Path) -> None:
    groups = step_of(tmp_path, {"text_hidden_fcs.0.weight": 1e-5})
    assert program.group_problems(groups, ["text_hidden_fcs", "lora"]) == ["lora: no trained tensor"]


def candidate(index: int, part: str) -> str:
    return f"grounding_encoder.mask_decoder.output_hypernetworks_mlps.{index}.{part}.weight"


def test_candidates_that_were_not_chosen_need_not_move(tmp_path: Path) -> None:
    changes = {candidate(i, part): 1e-5 * (i == 2) for i in (1, 2, 3) for part in ("proj_in", "proj_out")}
    group = step_of(tmp_path, changes)["mask_decoder"]
    assert sorted(group.unreached) == sorted(candidate(i, part) for i in (1, 3) for part in ("proj_in", "proj_out"))
    assert (group.still, str(group)) == ([], "2/2")


@pytest.mark.parametrize(("chosen", "num_still"), [(0, 6), (1, 3)])
def test_some_candidate_must_move_as_a_whole(chosen: int, num_still: int, tmp_path: Path) -> None:
    """No candidate moved; or each moved in one part only, which no choice explains."""
    changes = {candidate(i, part): 1e-5 * (chosen and part == "proj_in") for i in (1, 2, 3)
               for part in ("proj_in", "proj_out")}  # fmt: skip
    group = step_of(tmp_path, changes)["mask_decoder"]
    assert (len(group.still), group.unreached) == (num_still, [])


def test_a_bias_of_keys_is_never_counted(tmp_path: Path) -> None:
    """Rounding moves it, which says nothing."""
    prefix = "grounding_encoder.mask_decoder.transformer.layers.0.self_attn"
    group = step_of(tmp_path, {f"{prefix}.k_proj.bias": 1e-5, f"{prefix}.q_proj.bias": 1e-5})["mask_decoder"]
    assert group.unreached == [f"{prefix}.k_proj.bias"]
    assert str(group) == "1/1"


def test_lora_a_may_stand_still_only_where_b_is_zero(tmp_path: Path) -> None:
    changes = {"x.q_proj.lora_A.default.weight": 0.0, "x.q_proj.lora_B.default.weight": 1e-5}
    assert step_of(tmp_path, changes, "zero")["lora"].still == []
    assert step_of(tmp_path, changes, "random")["lora"].still == ["x.q_proj.lora_A.default.weight"]


def test_the_record_of_the_step_is_checked() -> None:
    good = {"loss": 3.0, "mask_loss": 1.0, "dice_loss": 1.0, "llm_loss": 1.0, "grad_norm": 1.0, "caption_tokens": 16.0}
    assert program.step_problems(good, 16) == []
    assert program.step_problems({**good, "caption_tokens": None}, 16) != []
    assert program.step_problems({**good, "caption_tokens": 17.0}, 16) != []
    assert program.step_problems({**good, "llm_loss": float("nan")}, 16) != []
    assert program.step_problems({**good, "grad_norm": 0.0}, 16) != []


def test_phases_end_at_the_lines_of_the_run() -> None:
    phases = program.Phases(start=10.0)
    lines = [("warning", 11.0), ("Building VideoLLaVASAMModel...", 12.0), ("✓ Model built", 20.0), ("loss=1.0", 30.0),
             ("loss=0.9", 40.0), ("Done: 1 steps", 45.0)]  # fmt: skip
    for line, now in lines:
        phases.see(line, now)
    assert list(phases.seconds.values()) == [2.0, 8.0, 10.0, 15.0]

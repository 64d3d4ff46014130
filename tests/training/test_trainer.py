"""The optimiser step and the run around it, on hollow parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from dual_loop.checkpoint import manifest
from dual_loop.checkpoint.manifest import hash_file
from dual_loop.config import GATES
from dual_loop.errors import CheckpointError, EnvironmentProblem
from dual_loop.training.metrics_log import StepRecord
from dual_loop.training.optim import NonFiniteError
from dual_loop.training.trainer import Trainer, memory_errors_explained

from hollow import HollowTask, make_trainer
from warm_python import warm_python


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.task.model.state_dict().items()}


def _assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-5, atol=1e-6)


def _assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def break_at(trainer: Trainer, step: int) -> None:
    """Train until a step is logged, and be interrupted there."""
    original = trainer.log.write

    def write(record: StepRecord) -> None:
        original(record)
        if record.step == step:
            raise KeyboardInterrupt

    trainer.log.write = write  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def test_a_run_moves_what_trains_and_leaves_a_whole_folder(tmp_path: Path) -> None:
    lines: list[str] = []
    trainer = make_trainer(tmp_path / "run", lines=lines, max_steps=5)
    before = _weights(trainer)
    result = trainer.fit()
    after = _weights(trainer)
    assert (result.step, result.stopped_by, result.is_own_signal) == (5, None, False)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.startswith("frozen"), name
    records = _records(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["epoch"] for record in records] == [1, 1, 1, 1, 2]
    assert [record["ranks"] for record in records] == [1] * 5
    assert lines[0] == "Epoch 1/2"
    assert "Epoch 2/2" in lines
    assert lines[1].startswith("loss=")
    assert (tmp_path / "run/panels/step_000001_0.png").is_file()
    assert (tmp_path / "run/panels/step_000005_1.png").is_file()
    assert Path(result.checkpoint).name == "step_00000005"
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_totals_and_counters_add_up(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=5)
    trainer.fit()
    totals = trainer.totals()
    assert totals.steps == 5
    assert totals.sources == {"sav": 5, "sa1b": 5}
    assert totals.effective_batch == 2
    skipped = {"data/bad_samples": 2, "data/bad_samples_distinct": 2, "data/bad_samples/sav/broken": 2}
    gates = {f"gate/{name}": 0 for name in GATES}
    assert totals.counters == {"caption/rejected": 10, "prompt/grid_rescued": 0, **gates, **skipped}
    assert totals.peak_memory_mb > 10
    assert totals.seconds > 0


def test_the_reported_loss_is_the_global_mean_and_its_gradient_is_the_one_used(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, learning_rate=0.0)
    stream = trainer.data.batches(0)
    outputs = [trainer.task(packed) for packed in trainer.task.prepare([next(stream), next(stream)])]
    expected = {
        name: sum(o.terms[name].total for o in outputs) / sum(o.terms[name].count for o in outputs)
        for name in outputs[0].terms
    }
    gradients = torch.autograd.grad(sum(expected.values()), list(trainer.parameters.values()))
    trainer.fit()
    record = _records(tmp_path)[0]
    for name, value in expected.items():
        assert record[name] == pytest.approx(value.item(), rel=1e-5)
    assert record["loss"] == pytest.approx(sum(expected.values()).item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(torch.stack([g.norm() for g in gradients]).norm().item(), rel=1e-5)
    assert record["cycle_iou"] == 0.5


def test_batch_and_accumulation_are_interchangeable(tmp_path: Path) -> None:
    runs = []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = make_trainer(
            tmp_path / str(batch_size), batch_size=batch_size, gradient_accumulation_steps=accumulation
        )
        trainer.fit()
        runs.append(_weights(trainer))
    _assert_close(runs[0], runs[1])
    _assert_close(runs[0], runs[2])


def test_a_non_finite_loss_stops_before_anything_changes(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, HollowTask(spoil="sa1b/3#0"))
    states = []
    original = trainer.task.prepare

    def spy(*args: Any) -> Any:
        states.append(_weights(trainer))
        return original(*args)

    trainer.task.prepare = spy  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    assert "step 2" in str(caught.value)
    assert "sa1b/3#0" in str(caught.value)
    assert "sav/2#0" not in str(caught.value)
    assert trainer.progress.step == 1
    _assert_equal(states[-1], _weights(trainer))
    assert trainer.ema.num_updates == 1


def test_out_of_memory_names_flags(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, HollowTask(fail=torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB")))
    with pytest.raises(EnvironmentProblem, match="--batch_size"):
        trainer.fit()


def test_clipping_bounds_the_gradient_and_zero_turns_it_off(tmp_path: Path) -> None:
    norms = {}
    for max_norm in (0.0, 1e-3):
        trainer = make_trainer(tmp_path / str(max_norm), max_steps=1, max_grad_norm=max_norm)
        seen: list[float] = []
        original = trainer.optimizer.step

        def spy(*_: Any, trainer: Trainer = trainer, seen: list[float] = seen, original: Any = original) -> Any:
            seen.append(torch.stack([p.grad.norm() for p in trainer.parameters.values()]).norm().item())
            return original()

        trainer.optimizer.step = spy  # type: ignore[method-assign]
        trainer.fit()
        norms[max_norm] = seen[0]
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert norms[0.0] > 0.01


@pytest.mark.parametrize("rates", [{}, {"lr_schedule": "wsd", "lr_lora": 1e-3, "learning_rate": 1e-2}])
def test_resume_is_bitwise_a_straight_run(tmp_path: Path, rates: dict[str, Any]) -> None:
    """Noise in the loop makes the random states matter; both runs have the same number of steps in all."""
    straight = make_trainer(tmp_path / "straight", HollowTask(noise=0.1), max_steps=6, **rates)
    straight.fit()
    broken = make_trainer(tmp_path / "broken", HollowTask(noise=0.1), max_steps=6, save_interval=3, **rates)
    break_at(broken, 5)
    assert len(_records(tmp_path / "broken")) == 5
    torch.manual_seed(99)
    lines: list[str] = []
    resumed = make_trainer(tmp_path / "broken", HollowTask(noise=0.1), lines, max_steps=6, resume="auto", **rates)
    assert resumed.restore()
    assert resumed.progress.step == 3
    assert resumed.task.num_generated == 6
    resumed.fit()
    _assert_equal(_weights(straight), _weights(resumed))
    _assert_equal(straight.ema.values, resumed.ema.values)
    keys = ("step", "loss", "grad_norm", "lr", "counters")
    expected = [{key: record[key] for key in keys} for record in _records(tmp_path / "straight")]
    assert [{key: record[key] for key in keys} for record in _records(tmp_path / "broken")] == expected
    first, second = straight.totals(), resumed.totals()
    assert first.sources == second.sources
    assert first.counters == second.counters
    assert "at step 3" in lines[0]


def scaled(folder: Path, scale: float = 2.0**12, **settings: Any) -> Trainer:
    """Return a trainer with a loss scale, as fp16 has it on a GPU, that doubles every second step."""
    trainer = make_trainer(folder, max_steps=6, **settings)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    return trainer


def overflow_once(trainer: Trainer, step: int) -> None:
    """Let one gradient of a step be infinite, as beyond float16."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf") if trainer.progress.step == step - 1 else gradient

    next(iter(trainer.parameters.values())).register_hook(spoil)


def test_a_loss_scale_changes_no_update(tmp_path: Path) -> None:
    plain, other = make_trainer(tmp_path / "plain", max_steps=6), scaled(tmp_path / "scaled")
    plain.fit()
    other.fit()
    _assert_close(_weights(plain), _weights(other))
    norms = [[record["grad_norm"] for record in _records(tmp_path / name)] for name in ("plain", "scaled")]
    assert norms[0] == pytest.approx(norms[1])
    assert other.scaler.get_scale() == 2.0**15


def test_a_gradient_beyond_float16_lowers_the_scale_and_the_step_changes_nothing(tmp_path: Path) -> None:
    trainer = scaled(tmp_path)
    seen = [_weights(trainer)]
    original = trainer.log.write

    def watch(record: StepRecord) -> None:
        original(record)
        seen.append(_weights(trainer))

    trainer.log.write = watch  # type: ignore[method-assign]
    overflow_once(trainer, 3)
    trainer.fit()
    _assert_equal(seen[2], seen[3])
    assert trainer.ema.num_updates == 5
    records = _records(tmp_path)
    assert [record["grad_norm"] is None for record in records] == [False, False, True, False, False, False]
    assert records[-1]["counters"]["precision/overflows"] == 1
    assert trainer.scaler.get_scale() == 2.0**13  # 12 + 1 - 1 + 1
    assert not torch.equal(seen[3]["first.weight"], seen[4]["first.weight"])


def test_no_scale_hides_what_is_not_finite(tmp_path: Path) -> None:
    trainer = scaled(tmp_path / "lowest", scale=1.0)
    overflow_once(trainer, 1)
    with pytest.raises(NonFiniteError, match="gradient norm"):
        trainer.fit()
    trainer = scaled(tmp_path / "loss", task=HollowTask(spoil="sa1b/1#0"))
    with pytest.raises(NonFiniteError, match="sa1b/1#0"):
        trainer.fit()


def test_a_loss_scale_is_resumed(tmp_path: Path) -> None:
    straight = scaled(tmp_path / "straight")
    overflow_once(straight, 2)
    straight.fit()
    broken = scaled(tmp_path / "broken", save_interval=3)
    overflow_once(broken, 2)
    break_at(broken, 4)
    resumed = scaled(tmp_path / "broken", resume="auto")
    assert resumed.restore()
    resumed.fit()
    assert resumed.scaler.state_dict() == straight.scaler.state_dict()
    _assert_equal(_weights(straight), _weights(resumed))


def test_resume_hashes_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(tmp_path, max_steps=2).fit()
    resumed, hashed = make_trainer(tmp_path, max_steps=2, resume="auto"), []
    monkeypatch.setattr(manifest, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    assert resumed.restore()
    names = ["ema.safetensors", "model.safetensors", "optimizer.pt", "rng_0.pt", "state.json"]
    assert sorted(hashed) == names


def test_auto_resume_without_a_checkpoint_starts_afresh(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, resume="auto")
    assert not trainer.restore()
    assert trainer.fit().step == 4


def test_a_finished_run_resumes_to_nothing(tmp_path: Path) -> None:
    path = make_trainer(tmp_path).fit().checkpoint
    modified = Path(path).stat().st_mtime_ns
    again = make_trainer(tmp_path, resume="auto")
    assert again.restore()
    assert again.fit().checkpoint == path
    assert Path(path).stat().st_mtime_ns == modified


def test_resume_refuses_what_does_not_fit(tmp_path: Path) -> None:
    make_trainer(tmp_path).fit()
    other = make_trainer(tmp_path, resume="auto")
    other.parameters.pop("first.bias")
    with pytest.raises(CheckpointError, match=r"first\.bias"):
        other.restore()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        make_trainer(tmp_path, resume=str(tmp_path / "nowhere")).restore()


def test_another_number_of_steps_is_said(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2).fit()
    lines: list[str] = []
    trainer = make_trainer(tmp_path, lines=lines, max_steps=4, resume=str(tmp_path))
    trainer.restore()
    assert any("learning-rate schedule differs" in line for line in lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_after_the_step(tmp_path: Path, number: signal.Signals) -> None:
    trainer = make_trainer(tmp_path, max_steps=50)
    original = trainer.log.write

    def interrupt(record: StepRecord) -> None:
        original(record)
        if record.step == 2:
            os.kill(os.getpid(), number)

    trainer.log.write = interrupt  # type: ignore[method-assign]
    result = trainer.fit()
    assert (result.step, result.stopped_by, result.is_own_signal) == (3, number.name, True)
    assert Path(result.checkpoint).name == "step_00000003"
    assert (Path(result.checkpoint) / "manifest.json").is_file()


RANKS = """
import sys
sys.path.insert(0, sys.argv[2])
from hollow import HollowTask, make_trainer
import torch
from dual_loop.training.devices import end_processes
trainer = make_trainer(sys.argv[1], HollowTask(spoil=sys.argv[3]), batch_size=1, gradient_accumulation_steps=2)
trainer.fit()
totals = trainer.totals()
if trainer.accelerator.is_main_process:
    import json, os
    torch.save(trainer.task.model.state_dict(), os.path.join(sys.argv[1], "weights.pt"))
    json.dump(vars(totals), open(os.path.join(sys.argv[1], "summary.json"), "w"))
end_processes(trainer.accelerator)
"""


def _run_ranks(folder: Path, spoil: str = "") -> subprocess.CompletedProcess[str]:
    script = folder.parent / "ranks.py"
    script.write_text(RANKS)
    command = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command += [str(folder), str(Path(__file__).parent), spoil]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_are_one_rank_with_twice_the_batch(tmp_path: Path) -> None:
    done = _run_ranks(tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one = make_trainer(tmp_path / "one", batch_size=2, gradient_accumulation_steps=2)
    one.fit()
    _assert_close(_weights(one), torch.load(tmp_path / "two/weights.pt", weights_only=True))
    summary, own = json.loads((tmp_path / "two/summary.json").read_text()), vars(one.totals())
    assert summary["world_size"] == 2
    assert summary["effective_batch"] == own["effective_batch"] == 4
    assert summary["sources"] == own["sources"]
    assert summary["counters"]["data/bad_samples"] == own["counters"]["data/bad_samples"] > 0
    for left, right in zip(_records(tmp_path / "two"), _records(tmp_path / "one"), strict=True):
        assert (left["ranks"], right["ranks"]) == (2, 1)
        for name in ("loss", "mask_loss", "dice_loss", "llm_loss", "grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=1e-4), name


@pytest.mark.distributed
@pytest.mark.slow
def test_a_non_finite_loss_on_one_rank_stops_both_with_its_name(tmp_path: Path) -> None:
    done = _run_ranks(tmp_path / "two", spoil="sa1b/5#0")
    assert done.returncode != 0
    assert done.stderr.count("rank 1: mask_loss = nan") >= 2
    assert "sa1b/5#0" in done.stderr
    assert len(_records(tmp_path / "two")) == 1


def test_audits_come_at_their_interval_and_at_the_end(tmp_path: Path) -> None:
    def audited(name: str, max_steps: int, interval: int) -> list[int]:
        task, steps = HollowTask(), []
        trainer = make_trainer(tmp_path / name, task, max_steps=max_steps, audit_interval=interval, log_interval=100)
        original = task.prepare

        def prepare(batches: Any, progress: float = 0.0, audit: bool = False) -> Any:
            assert progress == pytest.approx(trainer.progress.step / max_steps)
            steps.extend([trainer.progress.step + 1] if audit else [])
            return original(batches, progress, audit)

        task.prepare = prepare  # type: ignore[method-assign]
        trainer.fit()
        assert {record["step"] for record in _records(tmp_path / name)} == {1, max_steps, *steps}
        return steps

    assert audited("long", 5, 2) == [2, 4, 5]
    records = {record["step"]: record for record in _records(tmp_path / "long")}
    assert "grad_norm/mask_loss" not in records[1]
    assert all(records[step]["grad_norm/mask_loss"] > 0 for step in (2, 4, 5))
    assert audited("short", 2, 50) == []


def test_the_norms_of_terms_change_no_step(tmp_path: Path) -> None:
    weights = []
    for interval in (1, 100):
        trainer = make_trainer(tmp_path / str(interval), max_steps=5, audit_interval=interval)
        trainer.fit()
        weights.append(_weights(trainer))
    _assert_equal(*weights)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate")]
)
def test_out_of_memory_says_which_flags_to_change(error: Exception) -> None:
    with pytest.raises(EnvironmentProblem) as caught, memory_errors_explained("step 3"):
        raise error
    for word in ("--batch_size", "--regions_per_image", "model.gradient_checkpointing=True", "--max_new_tokens"):
        assert word in str(caught.value)
    assert "loop.rollout_batch_size" in str(caught.value)


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_errors_explained("step 3"):
        raise RuntimeError("shape")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eval_interval": 2}, [2, 4, 6, 8]),
        ({"eval_strategy": "steps", "save_interval": 3}, [3, 6, 9]),
        ({"eval_strategy": "epoch"}, [4, 8]),
        ({}, []),
    ],
)
def test_the_held_out_set_is_measured_when_it_was_asked_for(
    tmp_path: Path, settings: dict[str, Any], expected: list[int]
) -> None:
    trainer = make_trainer(tmp_path, eval_dir="held_out", max_steps=9, **settings)
    seen: list[int] = []

    def evaluate() -> dict[str, float | None]:
        seen.append(trainer.progress.step)
        return {"gIoU": 0.5, "cycle_gIoU": None}

    trainer.fit(evaluate)
    assert seen == expected
    evaluations = {record["step"]: record["evaluation"] for record in _records(tmp_path) if "evaluation" in record}
    assert evaluations == {step: {"gIoU": 0.5, "cycle_gIoU": None} for step in expected}


def test_the_best_checkpoint_is_kept_and_training_ends_where_nothing_gets_better(tmp_path: Path) -> None:
    figures = {2: 0.5, 4: None, 6: 0.7, 8: 0.7, 10: 0.6, 12: 0.1, 14: 0.9}
    lines: list[str] = []

    def make(last: int, **more: str) -> Trainer:
        own = {"eval_interval": 2, "keep_best": "gIoU", "patience": 3, "keep_checkpoints": 1}
        return make_trainer(tmp_path, lines=lines, eval_dir="held_out", max_steps=last, **own, **more)

    trainer = make(9)
    trainer.fit(lambda: {"gIoU": figures[trainer.progress.step]})
    assert (tmp_path / "checkpoints/best").resolve().name == "step_00000006"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best", "step_00000006", "step_00000009"}
    resumed = make(20, resume="auto")
    assert resumed.restore(tmp_path / "checkpoints/step_00000009")
    result = resumed.fit(lambda: {"gIoU": figures[resumed.progress.step]})
    assert (result.step, result.stopped_by) == (12, None)
    assert lines[-1] == "No better gIoU since step 6"
    again = make(20, resume="auto")
    assert again.restore(tmp_path / "checkpoints/step_00000012")
    assert again.fit(lambda: {"gIoU": 1.0}).step == 12
    assert lines[-1] == "No better gIoU since step 6"
    assert (tmp_path / "checkpoints/best").resolve().name == "step_00000006"


def test_a_run_leaves_when_its_time_is_over(tmp_path: Path) -> None:
    result = make_trainer(tmp_path, max_steps=50, max_time=0.0).fit()
    assert (result.step, result.stopped_by, result.is_own_signal) == (1, "max_time", True)
    assert Path(result.checkpoint).name == "step_00000001"


def test_steps_can_be_profiled(tmp_path: Path) -> None:
    lines: list[str] = []
    make_trainer(tmp_path / "run", lines=lines, max_steps=5, profile_steps=2).fit()
    events = json.loads((tmp_path / "run/profile/rank_0.json").read_text())["traceEvents"]
    assert [one["name"] for one in events if "ProfilerStep" in one["name"]] == ["ProfilerStep#2", "ProfilerStep#3"]
    assert any("Self CPU time total" in line for line in lines)

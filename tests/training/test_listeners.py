"""Listeners that were trained apart: read from every form of weights, refused where they are of another start."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dual_loop.checkpoint.importer import load_weights
from dual_loop.checkpoint.key_rules import ORIGINAL, iterate_export
from dual_loop.config import load_config, resolve_config_path
from dual_loop.errors import CheckpointError
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.build import TINY_WEIGHTS, build_model, build_tokenizer
from dual_loop.model.stored_weights import StoredWeights, weights
from dual_loop.serve.loading import rebuild
from dual_loop.train_dual_loop import main
from dual_loop.training.listeners import read_listener

from small_model import scene_samples, small_batch

TINY = load_config(resolve_config_path("tiny_cpu"))


def apart(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors with other values wherever it trains."""
    torch.manual_seed(3)
    trained = trainable_parameters(model)
    return {n: v + 0.1 * torch.randn_like(v) if n in trained else v.clone() for n, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return rebuild(TINY, [TINY_WEIGHTS])


def trained_alone(state: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    return {name: state[name] for name in trainable_parameters(model)}


@pytest.mark.parametrize("form", ["original", "whole", "trained alone"])
def test_the_model_with_a_listener_inside_is_the_other_model(form: str, tiny: Any, tmp_path: Path) -> None:
    model, prompter = tiny
    state, path = apart(model), tmp_path / "weights.safetensors"
    if form == "original":
        path = tmp_path / "weights.pth"
        torch.save(dict(iterate_export(state.items(), ORIGINAL)), path)
    else:
        save_file(state if form == "whole" else trained_alone(state, model), path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    listener = StoredWeights(trainable_parameters(model), read_listener(path, model, prompter, TINY))
    other = build_model(TINY, build_tokenizer(TINY.model)).eval()
    load_weights(other, [TINY_WEIGHTS, path])
    batch = small_batch(TINY, scene_samples(1))
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, own = (_masks(one, prompter, batch) for one in (other, model))
            with weights(listener):
                assert torch.equal(_masks(model, prompter, batch), expected)
            assert torch.equal(_masks(model, prompter, batch), own)
        assert not torch.equal(own, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _masks(model: Any, prompter: Any, batch: Any) -> torch.Tensor:
    from dual_loop.loop.scorer import Scorer

    texts = [(region, f"the object {region}") for region in range(batch.num_regions)]
    return torch.cat(Scorer(model, prompter, TINY.loop).segment(batch, model.see(batch), texts))


def test_other_frozen_weights_are_refused_by_name(tiny: Any, tmp_path: Path) -> None:
    model, prompter = tiny
    state = apart(model)
    name = "mllm.model.vision_tower.encoder.layer.0.lambda_1"
    state[name] = state[name] + 1
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=f"1 problem.*\n.*{name} is frozen here and differs") as caught:
        read_listener(tmp_path / "weights.safetensors", model, prompter, TINY)
    assert "the weights that this model starts from" in str(caught.value)


def test_merged_adapters_and_missing_parts_are_refused(tiny: Any, tmp_path: Path) -> None:
    model, prompter = tiny
    state = trained_alone(apart(model), model)
    for name in [name for name in state if name.startswith("text_hidden_fcs.")]:
        del state[name]
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"missing text_hidden_fcs\.0\.bias"):
        read_listener(tmp_path / "weights.safetensors", model, prompter, TINY)
    with pytest.raises(CheckpointError, match="not found"):
        read_listener(tmp_path / "nowhere.pth", model, prompter, TINY)


def test_weights_without_adapters_listen_without(tiny: Any, tmp_path: Path) -> None:
    model, prompter = tiny
    state = {name: value.clone() for name, value in model.state_dict().items() if ".lora_" not in name}
    save_file(state, tmp_path / "weights.safetensors")
    found = read_listener(tmp_path / "weights.safetensors", model, prompter, TINY)
    assert all(not value.any() for name, value in found.items() if ".lora_" in name)
    assert torch.equal(found["text_hidden_fcs.0.weight"], state["text_hidden_fcs.0.weight"])


@pytest.fixture(scope="module")
def run(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps whose rewards and audits a run before it heard."""
    root = tmp_path_factory.mktemp("listeners")
    for name in ("first", "second"):
        more = []
        if name == "second":
            step = root / "first" / "checkpoints" / "step_00000002"
            more = ["--audit_listener", str(root / "first"), "--reward_listener", str(step / "model.safetensors")]
        arguments = [
            *("--config", "tiny_cpu", "--device", "cpu", "--sa1b_dir", str(demo / "sa1b"), "--max_steps", "2"),
            *("--batch_size", "2", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-2"),
            *("--num_workers", "0", "--log_interval", "1", "--audit_interval", "1", "--max_new_tokens", "6"),
            *("--caption_gradient", "scst", "--captions_per_region", "1", "--eval_dir", str(demo / "ref_seg")),
            *("--eval_max_samples", "2", "--output_dir", str(root / name), *more),
            *("--cfg-options", "data.eval_datasets=refcoco"),
        ]
        assert main(arguments) == 0
    return root / "second"


def test_a_run_is_heard_by_another(run: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= record["independent_cycle_iou"] <= 1 for record in records)
    assert records[0]["independent_cycle_iou"] != records[0]["frozen_cycle_iou"]
    summary = json.loads((run / "summary.json").read_text())
    for name in ("before", "after"):
        assert summary[name]["cycle_gIoU_independent"] is not None
    change = summary["after"]["cycle_gIoU_independent"] - summary["before"]["cycle_gIoU_independent"]
    assert summary["gain"]["cycle_gIoU_independent"]["mean"] == pytest.approx(change)
    first = json.loads((run.parent / "first" / "summary.json").read_text())
    assert "cycle_gIoU_independent" not in first["after"], "nobody was asked"


def test_a_run_listens_with_its_average(run: Path, tiny: Any) -> None:
    model, prompter = tiny
    for path in (run, run / "checkpoints" / "step_00000002"):
        found = read_listener(path, model, prompter, TINY)
        average = load_file(run / "checkpoints" / "step_00000002" / "ema.safetensors")
        assert found.keys() == average.keys()
        assert all(torch.equal(found[name], average[name]) for name in found)


def test_a_run_of_other_settings_is_refused(run: Path, tiny: Any) -> None:
    changed = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, lora_alpha=7))
    with pytest.raises(CheckpointError, match=r"model\.lora_alpha: .* there, 7 here"):
        read_listener(run, *tiny, changed)


def test_a_path_that_is_not_there_is_an_error_before_anything_is_built(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--sa1b_dir", str(demo / "sa1b"), "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main(["--config", "tiny_cpu", *data, "--reward_listener", "frozn", "--audit_listener", "nowhere"]) == 2
    told = capsys.readouterr().err
    assert "reward.listener (own, average, frozen or a path): no such file: frozn" in told
    assert "train.audit_listener: no such file: nowhere" in told

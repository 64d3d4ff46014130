"""The package on CUDA semantics in bf16: every option trains, evaluates, resumes and answers, and mixes no devices.

One process runs all commands (``emulated_run.py``); the tests look at what it wrote.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_build import build_device

from dual_loop.accelerate import lora, qwen2
from dual_loop.commands.demo_data import main as write_demo_data
from dual_loop.model.build import TINY_WEIGHTS
from dual_loop.model.decode import StaticLayer

HERE = Path(__file__).parent
LAYERS = 3
TRAINING = {
    "plain": "--cfg-options train.audit_interval=1 train.panel_interval=1",
    "grpo": "--caption_gradient grpo --captions_per_region 2 --kl_weight 0.1 --contrast_reward_weight 0.5",
    "gumbel": "--caption_gradient gumbel+scst --captions_per_region 2 --reward_listener average --eval_max_samples 4",
    "turns": "--segment_form turns --caption_gradient gumbel --cycle_keep 0.9 --cycle_drop 0.2 "
    "--cycle_score likelihood --reward_listener {tiny} --audit_listener {tiny} "
    "--cfg-options loss.num_points=0 train.audit_interval=1",
    "distill": "--distill_weight 0.5 --align_weight 0.5 --reward_listener frozen --caption_gradient scst "
    "--train_embeddings all",
    "fit": "--effective_batch 4 --use_dora on --use_rslora on "
    "--cfg-options speed.images_at_once=fit model.gradient_checkpointing=True "
    "train.deterministic=True speed.tf32=True loss.num_points=50",
}
TRAINING["watched"] = (
    "--eval_dir {data}/ref_seg --eval_interval 1 --keep_best gIoU --patience 1 --report_to tensorboard "
    "--profile_steps 1 --cfg-options data.eval_max_samples=2"
)
DECODED = "--max_new_tokens 24 --cfg-options model.dtype=bfloat16 loop.temperature=0.7"
TRAINING["fp16"] = "--mixed_precision fp16 --cfg-options model.dtype=float16"
TRAINING |= {"recorded": DECODED, "eager": f"{DECODED} speed.decode_graph=off"}
OTHERS = {
    "resume": "train --resume auto --max_steps 2 --output_dir {out}/plain",
    "cache": "train --max_steps 1 --output_dir {out}/cached --cfg-options speed.feature_cache={out}/features",
    "evaluate": "evaluate {out}/plain --device cuda --data sa1b --sa1b_dir {data}/sa1b --max_samples 3",
    "audit": "audit {out}/plain --device cuda --data sa1b --sa1b_dir {data}/sa1b --labels {out}/labels --max_samples 3 "
    "--listener {out}/plain --best_of 2",
    "caption": "caption {image} --box 10,10,60,60 --checkpoint {out}/plain --device cuda",
    "segment": "segment {image} --text circle --out {out}/mask.png --checkpoint {out}/plain --device cuda",
    "loop": "loop {image} --box 10,10,60,60 --checkpoint {out}/plain --device cuda",
}
SETTINGS = (
    "--config tiny_demo --sa1b_dir {data}/sa1b --refcoco_dir {data}/ref_seg --num_workers 0 --device cuda "
    "--mixed_precision bf16"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    library, reason = build_device()
    if library is None:
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("emulated")
    data = out / "data"
    assert write_demo_data([str(data), "--images", "8", "--captioned", "4", "--val", "4"]) == 0
    names = {"out": out, "data": data, "tiny": TINY_WEIGHTS, "image": next((data / "sa1b").glob("**/*.jpg"))}
    plan = {name: f"train --max_steps 1 --output_dir {out}/{name} {flags}" for name, flags in TRAINING.items()}
    plan |= OTHERS
    commands = {}
    for name, line in plan.items():
        # Settings first: --cfg-options takes all that follows.
        head, *rest = line.format(**names).split()
        commands[name] = [head, *(SETTINGS.format(**names).split() if head == "train" else []), *rest]
    (out / "plan.json").write_text(json.dumps(commands))
    subprocess.run(
        [sys.executable, str(HERE / "emulated_run.py"), str(out / "plan.json"), str(out / "answers.json")],
        check=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return {"out": str(out), **json.loads((out / "answers.json").read_text())}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRAINING, *OTHERS])
def test_a_command_runs_on_cuda_semantics(results, name):
    assert results[name]["status"] == 0, results[name]["output"][-3000:]


def number(results, name: str, kind: str, *phases: str) -> int:
    return sum(n for phase, k, _, _, n in results[name]["events"] if k == kind and phase in phases)


STEP = ("rollout", "forward", "backward", "optimiser")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recorded", "eager"])
def test_a_step_waits_for_the_device_only_where_it_looks(results, name):
    """At most four times a micro-batch (two in a step), one of them for all losses; and nothing is copied unpinned."""
    assert number(results, name, "pageable copy", *STEP) == 0
    assert number(results, name, "sync", "forward", "backward") == 0
    assert 0 < number(results, name, "sync", *STEP) <= 2 * 4


def stands_in(place: str, function, last: int | None = None) -> bool:
    """Tell whether a place ("file:line") is in the source of a function, or in its last lines."""
    lines, first = inspect.getsourcelines(function)
    file, _, line = place.partition(":")
    start = first if last is None else first + len(lines) - last
    return inspect.getfile(function).endswith(f"dual_loop/{file}") and start <= int(line or 0) < first + len(lines)


@pytest.mark.slow
def test_decoding_waits_once_in_eight_tokens_and_starts_few_kernels(results):
    rollout = [event[1:] for event in results["eager"]["events"] if event[0] == "rollout"]
    kernels, steps, looks = 0, 0, 0
    for kind, what, place, count in rollout:
        in_step = stands_in(place, qwen2.step)
        steps += count * (in_step and what == "attention")
        # The last line of a projection is what it does for a token; the cache is written for prompts too.
        in_layer = in_step or stands_in(place, lora.token_projection, last=1) or stands_in(place, StaticLayer.update)
        kernels += count * (in_layer and kind == "kernel")
        looks += count * (place.startswith("model/decode.py") and kind == "sync")
    tokens = steps // LAYERS + 1
    assert tokens >= 8
    assert 0 < looks <= tokens / 8
    assert kernels / steps <= 40


@pytest.mark.slow
def test_a_recorded_step_writes_what_the_step_writes(results):
    played, run = (
        {what for phase, _, what, _, _ in results[name]["events"] if phase == "rollout"}
        for name in ("recorded", "eager")
    )
    assert "of a graph" in played - run
    first, second = (
        [json.loads(line) for line in Path(results["out"], name, "metrics.jsonl").read_text().splitlines()]
        for name in ("recorded", "eager")
    )
    keys = ("loss", "mask_loss", "llm_loss", "grad_norm", "cycle_iou", "caption_tokens")
    assert [[row.get(key) for key in keys] for row in first] == [[row.get(key) for key in keys] for row in second]


@pytest.mark.slow
def test_the_device_did_the_work(results):
    for name in TRAINING:
        assert number(results, name, "kernel", "rollout", "forward", "backward", "optimiser") > 1000

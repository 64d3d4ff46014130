"""The package on CUDA semantics in bf16: every option trains, evaluates, resumes and answers, and mixes no devices.

One process runs all commands (``emulated_run.py``); the tests look at what it wrote.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_build import build_device

from dual_loop.commands.demo_data import main as write_demo_data

HERE = Path(__file__).parent
TRAINING = {
    "plain": "--cfg-options train.audit_interval=1 train.panel_interval=1",
    "grpo": "--caption_gradient grpo --captions_per_region 2 --kl_weight 0.1 --contrast_reward_weight 0.5",
    "gumbel": "--caption_gradient gumbel+scst --captions_per_region 2 --reward_listener average --eval_max_samples 4",
    "turns": "--segment_form turns --caption_gradient gumbel --cycle_keep 0.9 --cycle_drop 0.2 "
    "--cfg-options loss.num_points=0",
    "distill": "--distill_weight 0.5 --align_weight 0.5 --reward_listener frozen --caption_gradient scst "
    "--train_embeddings all",
}
OTHERS = {
    "resume": "train --resume auto --max_steps 2 --output_dir {out}/plain",
    "cache": "train --max_steps 1 --output_dir {out}/cached --cfg-options speed.feature_cache={out}/features",
    "evaluate": "evaluate {out}/plain --device cuda --data sa1b --sa1b_dir {data}/sa1b --max_samples 3",
    "audit": "audit {out}/plain --device cuda --data sa1b --sa1b_dir {data}/sa1b --labels {out}/labels --max_samples 3",
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
    names = {"out": out, "data": data, "image": next((data / "sa1b").glob("**/*.jpg"))}
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
    return json.loads((out / "answers.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRAINING, *OTHERS])
def test_a_command_runs_on_cuda_semantics(results, name):
    assert results[name]["status"] == 0, results[name]["output"][-3000:]


def number(results, name: str, kind: str, *phases: str) -> int:
    return sum(n for phase, k, _, _, n in results[name]["events"] if k == kind and phase in phases)


@pytest.mark.slow
def test_the_device_did_the_work(results):
    for name in TRAINING:
        assert number(results, name, "kernel", "rollout", "forward", "backward", "optimiser") > 1000

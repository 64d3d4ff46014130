"""Our side of the boundary: a trained and exported model, prompt strings and configs, written for the other side.

    python scripts/xtuner_boundary/ours.py FOLDER

Writes ``export.pth`` through ``dual-loop export``, and ``expected.safetensors``, ``prompts.json`` and ``configs.json``
from what this package itself holds.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from mmengine.config import Config
from safetensors.torch import save_file

from dual_loop.checkpoint.importer import weights_sources
from dual_loop.checkpoint.key_rules import ORIGINAL, iterate_export
from dual_loop.cli import main as dual_loop
from dual_loop.config import CONFIG_DIR, load_config
from dual_loop.model.prompts import TEMPLATES
from dual_loop.serve.loading import fill, find_run, rebuild

SYSTEM, QUESTIONS, ANSWERS = "Be brief.", ("Describe region1.", "Please segment it."), ("a red star", "Sure, [SEG].")


def main(folder: Path) -> None:
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        run = train_one_step(folder)
        status = dual_loop(["export", str(run), str(folder / "export.pth"), "--format", "original"])
    if status != 0:
        sys.exit(quiet.getvalue()[-2000:])
    write_expected(run, folder / "expected.safetensors")
    prompts = {name: render(name) for name in ("phi3_chat", "internlm2_chat", "qwen_chat")}
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    configs = {path.name: Config.fromfile(path).to_dict() for path in sorted(CONFIG_DIR.glob("*.py"))}
    (folder / "configs.json").write_text(json.dumps(configs, default=str), encoding="utf-8")


def train_one_step(folder: Path) -> Path:
    """Train the tiny model for one step on generated scenes; return the run folder."""
    data, run = folder / "data", folder / "run"
    dual_loop(["demo-data", str(data), "--images", "4", "--seed", "0"])
    arguments = ["train", "--config", "tiny_cpu", "--device", "cpu", "--num_workers", "0", "--batch_size", "1"]
    arguments += ["--sa1b_dir", str(data / "sa1b"), "--max_steps", "1", "--learning_rate", "1e-3"]
    if dual_loop([*arguments, "--output_dir", str(run)]) != 0:
        raise SystemExit("training failed")
    return run


def write_expected(run: Path, path: Path) -> None:
    """Write the averaged weights under the original's names without going through the exporter's files."""
    folder, checkpoint = find_run(run)
    config = load_config(folder / "config.json")
    model, _ = rebuild(config, weights_sources(config))
    fill(model, checkpoint, "ema")
    model.sync_new_tokens()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("new_token_rows.")}
    save_file({name: tensor.clone() for name, tensor in iterate_export(state.items(), ORIGINAL)}, path)


def render(name: str) -> dict[str, str]:
    """Render the template's stock form: one turn with a system text, and two turns."""
    form = TEMPLATES[name]
    turns = [
        form.caption_turn.format(question=q) + a + form.answer_end for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    return {
        "one turn": form.system_turn.format(system=SYSTEM) + form.caption_turn.format(question=QUESTIONS[0]),
        "two turns": "".join(turn + form.turn_separator for turn in turns),
        "stop texts": json.dumps(list(form.stop_texts)),
        "segmentation turn": form.segment_turn.format(question=QUESTIONS[1]),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))

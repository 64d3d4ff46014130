"""The other side of the boundary, run by xtuner's own environment: compares what ``ours.py`` wrote. Exit status 1 on
any difference.

    python scripts/xtuner_boundary/theirs.py FOLDER CONFIGS
"""

import json
import sys
from pathlib import Path

import mmengine
import torch
from mmengine.config import Config
from safetensors.torch import load_file
from xtuner.model.utils import guess_load_checkpoint
from xtuner.utils import PROMPT_TEMPLATE
from xtuner.version import __version__ as xtuner_version

SYSTEM, QUESTIONS, ANSWERS = "Be brief.", ("Describe region1.", "Please segment it."), ("a red star", "Sure, [SEG].")


def check_tensors(folder):
    """Return (problems, what was compared) of the exported weights."""
    loaded, expected = guess_load_checkpoint(str(folder / "export.pth")), load_file(folder / "expected.safetensors")
    problems = [f"{name}: only on one side" for name in sorted(loaded.keys() ^ expected.keys())]
    for name in sorted(loaded.keys() & expected.keys()):
        own, other = loaded[name], expected[name]
        if own.dtype != other.dtype or own.shape != other.shape or not torch.equal(own, other):
            problems.append(f"{name}: {own.dtype} {tuple(own.shape)} differs from {other.dtype} {tuple(other.shape)}")
    return problems, f"{len(loaded)} tensors through guess_load_checkpoint"


def check_prompts(folder):
    """Return (problems, what was compared) of the chat templates."""
    ours = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    problems = []
    for name, texts in ours.items():
        form = PROMPT_TEMPLATE[name]
        pairs = zip(QUESTIONS, ANSWERS, strict=True)
        turns = [
            form.INSTRUCTION.format(input=question) + answer + form.SUFFIX + form.SEP for question, answer in pairs
        ]
        theirs = {
            "one turn": form.SYSTEM.format(system=SYSTEM) + form.INSTRUCTION.format(input=QUESTIONS[0]),
            "two turns": "".join(turns),
            "stop texts": json.dumps(list(form.STOP_WORDS)),
        }
        problems += [
            f"{name}, {key}: {texts[key]!r} instead of {theirs[key]!r}" for key in theirs if texts[key] != theirs[key]
        ]
    # Sa2VA itself departs from the stock form here: no line break before <|assistant|>.
    known = PROMPT_TEMPLATE.phi3_chat.INSTRUCTION.format(input=QUESTIONS[1]).replace("<|end|>\n", "<|end|>")
    if ours["phi3_chat"]["segmentation turn"] != known:
        problems.append(
            f"phi3_chat, segmentation turn: {ours['phi3_chat']['segmentation turn']!r} instead of {known!r}"
        )
    return problems, "phi3_chat, internlm2_chat, qwen_chat; Sa2VA's segmentation turn but for its missing line break"


def check_configs(folder, configs):
    """Return (problems, what was compared) of the configuration files."""
    ours = json.loads((folder / "configs.json").read_text(encoding="utf-8"))
    theirs = {
        path.name: json.loads(json.dumps(Config.fromfile(path).to_dict(), default=str)) for path in configs.glob("*.py")
    }
    problems = [
        f"{name}: read differently"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    return problems, f"{len(theirs)} configs by mmengine {mmengine.__version__}"


def main(folder, configs):
    checks = {
        "export": check_tensors(folder),
        "prompts": check_prompts(folder),
        "configs": check_configs(folder, configs),
    }
    print(f"xtuner {xtuner_version}, torch {torch.__version__}")
    for name, (problems, compared) in checks.items():
        for problem in problems[:10]:
            print(f"  {problem}")
        print(f"{name}: {'FAILED' if problems else 'passed'} ({compared})")
    return 1 if any(problems for problems, _ in checks.values()) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))

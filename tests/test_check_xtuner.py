"""Our side of the xtuner boundary, and that the other side notices what differs. xtuner itself is not needed here."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).resolve().parent.parent / "scripts" / "xtuner_boundary"


def load(name):
    spec = importlib.util.spec_from_file_location(f"xtuner_boundary_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Form(dict):
    __getattr__ = dict.__getitem__


def chat_ml(stop):
    turn = "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n"
    return Form(
        SYSTEM="<|im_start|>system\n{system}<|im_end|>\n",
        INSTRUCTION=turn,
        SUFFIX="<|im_end|>",
        SEP="\n",
        STOP_WORDS=stop,
    )


@pytest.fixture
def theirs(monkeypatch):
    """The other side with the documented templates and a plain loader in xtuner's place."""
    phi3 = Form(
        SYSTEM="<|system|>\n{system}<|end|>\n",
        INSTRUCTION="<|user|>\n{input}<|end|>\n<|assistant|>\n",
        SUFFIX="<|end|>",
        SEP="\n",
        STOP_WORDS=["<|end|>"],
    )
    templates = Form(
        phi3_chat=phi3,
        internlm2_chat=chat_ml(["<|im_end|>"]),
        qwen_chat=chat_ml(["<|im_end|>", "<|endoftext|>"]),
    )
    utils = types.ModuleType("xtuner.model.utils")
    utils.guess_load_checkpoint = lambda path: torch.load(path, weights_only=True)["state_dict"]
    modules = {
        "xtuner": types.ModuleType("xtuner"),
        "xtuner.model": types.ModuleType("xtuner.model"),
        "xtuner.model.utils": utils,
        "xtuner.utils": types.SimpleNamespace(PROMPT_TEMPLATE=templates),
        "xtuner.version": types.SimpleNamespace(__version__="stand-in"),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return load("theirs")


@pytest.mark.slow
def test_both_sides_agree_and_differences_are_found(tmp_path, theirs, capsys):
    load("ours").main(tmp_path)
    configs = FOLDER.parent.parent / "configs"
    assert theirs.main(tmp_path, configs) == 0
    assert capsys.readouterr().out.count(": passed (") == 3
    content = torch.load(tmp_path / "export.pth", weights_only=True)
    assert content["state_dict"].keys() == load_file(tmp_path / "expected.safetensors").keys()
    content["state_dict"]["text_hidden_fcs.0.bias"][0] += 1
    torch.save(content, tmp_path / "export.pth")
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    prompts["qwen_chat"]["one turn"] += " "
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "configs.json").write_text("{}")
    assert theirs.main(tmp_path, configs) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 3
    assert "text_hidden_fcs.0.bias" in printed
    assert "qwen_chat, one turn" in printed

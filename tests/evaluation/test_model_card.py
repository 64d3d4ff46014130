"""The model card of an export: everything the run says, nothing that is made up, and no path of the machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from huggingface_hub import ModelCard

from dual_loop.config import Config, load_config, resolve_config_path
from dual_loop.evaluation.model_card import model_card
from dual_loop.evaluation.report import RunRecord
from dual_loop.model.build import TINY_WEIGHTS

COMMIT = "a" * 40
SUMMARY = {
    **{"steps": 5, "seconds": 22.0, "world_size": 1, "effective_batch": 8, "sources": {"sav": 8, "refcoco": 1300}},
    "before": {"gIoU": 0.5, "cIoU": 0.4, "vocabulary": 13.0},
    "after": {"gIoU": 0.6, "cIoU": 0.3, "vocabulary": 12.0},
    "gain": {"gIoU": {"mean": 0.1, "ci95_low": 0.05, "ci95_high": 0.15}},
    "flags": ["private_code: something"],
}
VERSIONS = {
    **{"packages": {"torch": "2.13.0"}, "python": "3.11.7", "git_commit": "c0ffee", "device": "cpu"},
    "command": ["train", "--sa1b_dir", "/data/of/somebody/sa1b"],
}


def card_of(config, sources=(), file_format="original", **documents):
    run = RunRecord(Path("run"), config=json.loads(json.dumps(config.to_dict())), **documents)
    text = model_card(run, config, sources, "group trained", file_format, "step_00000005, averaged weights")
    return ModelCard(text)


def test_it_says_what_was_trained_on_what_and_what_came_of_it():
    config = load_config(
        resolve_config_path("tiny_demo"),
        {"data.sa1b_dir": "/data/of/somebody/sa1b", "reward.judge_url": "http://intern/v1"},
    )
    evaluation = {
        "figures": {
            "/data/of/somebody/val.parquet": {
                "regions": 3,
                "images": 2,
                "referring": {"gIoU": {"value": 0.61, "ci95_low": 0.5, "ci95_high": 0.7}},
            }
        }
    }
    card = card_of(config, [TINY_WEIGHTS], summary=SUMMARY, versions=VERSIONS, evaluation=evaluation)
    assert (card.data.license, card.data.pipeline_tag, card.data.base_model) == (
        "apache-2.0",
        "image-text-to-text",
        None,
    )
    parts = ["step_00000005, averaged weights", "group trained", "LoRA of rank 32, alpha 64", "| sav | 8 | none |"]
    parts += ["5 optimiser steps of 8 images", "| `model.lora_r` | 32 | 128 |", "| refcoco | 1,300 | by people |"]
    parts += [
        "| gIoU, true captions | 50.0 | 60.0 | +10.0 (5.0 to 15.0) |",
        "| cIoU, true captions | 40.0 | 30.0 | - |",
    ]
    parts += [
        "| words in use | 13.0 | 12.0 | - |",
        "Flag: private_code",
        "**val.parquet**: 3 regions",
        "c0ffee",
        "2.13.0",
    ]
    parts += ["| gIoU | 61.0 | 50.0 to 70.0 |", "generated symbols only", "No figure here is from a GPU", "THIS_FOLDER"]
    for part in parts:
        assert part in card.text, part
    assert "somebody" not in str(card)
    assert "intern" not in card.text.replace("InternVL", "")


def test_a_run_that_says_nothing_of_itself_is_said_so():
    card = card_of(Config(), [Path("weights/Sa2VA-4B")])
    assert card.data.license == "unknown"
    for part in (
        "no summary",
        "Nothing was measured",
        "Commit unknown",
        "packages unknown",
        "- `Sa2VA-4B`",
        "base's card",
    ):
        assert part in card.text
    assert "Random weights." in card_of(Config()).text


def test_the_licence_of_qwen_3b_and_the_base_by_its_name(tmp_path):
    base = tmp_path / "models--ByteDance--Sa2VA-4B" / "snapshots" / COMMIT
    base.mkdir(parents=True)
    config = load_config(resolve_config_path("sa2va_4b_full"))
    card = card_of(config, [base], "adapter", versions={**VERSIONS, "device": "cuda", "weights": ["9 bytes"]})
    data = card.data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "qwen-research")
    assert (data["base_model"], data["base_model_relation"]) == (["ByteDance/Sa2VA-4B"], "adapter")
    assert f"- ByteDance/Sa2VA-4B@{COMMIT} (9 bytes)" in card.text
    assert f"--config PRESET --model_path ByteDance/Sa2VA-4B@{COMMIT}" in card.text
    assert "no commercial use" in card.text.replace("\n", " ")
    assert "from a GPU" not in card.text
    other = dataclasses.replace(config, model=load_config(resolve_config_path("sa2va_1b")).model)
    assert card_of(other, [base]).data.license == "unknown"

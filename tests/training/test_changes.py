"""A resumed run says what it was given other than it had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dual_loop.config import Config, load_config
from dual_loop.errors import ConfigError
from dual_loop.training.changes import HARMLESS, REFUSED, compare_with_run

OWN = {"model.lora_r": 8, "train.learning_rate": 1e-4}
WEIGHTS = ["12 bytes, hash ab"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(load_config(None, OWN).to_dict()))
    (tmp_path / "versions.json").write_text(json.dumps({"weights": WEIGHTS}))
    return tmp_path / "checkpoints/step_00000001"


def changed(checkpoint: Path, weights: list[str] = WEIGHTS, **settings: object) -> str:
    given = OWN | {key.replace("__", "."): value for key, value in settings.items()}
    return compare_with_run(load_config(None, given), checkpoint, weights)


def test_nothing_is_said_where_nothing_differs(checkpoint: Path, tmp_path: Path) -> None:
    assert changed(checkpoint, train__resume="auto", train__output_dir="elsewhere") == ""
    assert compare_with_run(Config(), tmp_path / "a/b/c/step_00000001", []) == ""


def test_every_other_setting_is_listed_as_applied_or_harmless(checkpoint: Path) -> None:
    text = changed(
        checkpoint,
        train__learning_rate=2e-4,
        train__weight_decay=0.5,
        train__seed=7,
        speed__tf32=True,
        train__log_interval=3,
        train__pretrained_pth="moved.pth",
    )
    assert (
        "applied: train.learning_rate: 0.0001 -> 0.0002, train.weight_decay: 0.05 -> 0.5, train.seed: 42 -> 7" in text
    )
    assert "harmless: speed.tf32: False -> True, train.pretrained_pth: None -> 'moved.pth', train.log_interval" in text


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model__lora_r": 16}, "model.lora_r: 8 -> 16"),
        ({"train__optimizer": "adamw8bit"}, "train.optimizer: 'adamw' -> 'adamw8bit'"),
        ({"model__use_dora": True}, "model.use_dora: False -> True"),
        ({"model__lora_alpha": 16}, "model.lora_alpha: 256 -> 16"),
        ({"model__text": {"hidden_size": 8}}, "model.text"),
        ({"weights": ["12 bytes, hash cd"]}, "frozen weights: 12 bytes, hash ab -> 12 bytes, hash cd"),
        ({"weights": [], "train__seed": 7}, "train.seed: 42 -> 7"),
    ],
)
def test_what_would_be_another_model_is_refused(checkpoint: Path, settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)cannot go on.*{named}.*to do:"):
        changed(checkpoint, **settings)  # type: ignore[arg-type]


def test_the_lists_name_settings() -> None:
    config = Config().to_dict()
    assert all(name in config[group] for group, name in (key.split(".") for key in (*REFUSED, *HARMLESS)))

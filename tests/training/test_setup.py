"""Start-up: where a model is made, what is drawn for it, and what it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dual_loop.config import Config, load_config, resolve_config_path
from dual_loop.training import setup
from dual_loop.training.devices import build_accelerator


def started(folder: Path, **options: Any) -> setup.Start:
    given = {"train.output_dir": str(folder), "train.device": "cpu"}
    given |= {name.replace("__", "."): value for name, value in options.items()}
    config: Config = load_config(resolve_config_path("tiny_cpu"), given)
    return setup.start(config, build_accelerator(config))


def test_a_model_that_weights_fill_is_made_empty_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    make = setup.build_model

    def build_model(config: Config, tokenizer: Any, **options: Any) -> Any:
        asked.append(options)
        return make(config, tokenizer, **options)

    monkeypatch.setattr(setup, "build_model", build_model)
    run = started(tmp_path / "imported")
    loaded = setup.load(run, setup.build(run))
    assert all(torch.isfinite(value).all() for value in loaded.model.state_dict().values())
    setup.build(started(tmp_path / "random", model__initial_weights="none"))
    assert [(options["device"], options["drawn"]) for options in asked] == [("cpu", False), ("cpu", True)]


def test_a_seed_gives_the_same_start_twice(tmp_path: Path) -> None:
    states = []
    for name in ("one", "other"):
        run = started(tmp_path / name)
        torch.manual_seed(run.config.train.seed)
        states.append(setup.load(run, setup.build(run)).model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

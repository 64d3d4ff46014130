"""Start-up: where a model is made, what is drawn for it, and what it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dual_loop.checkpoint import importer
from dual_loop.checkpoint.importer import load_weights, weights_sources
from dual_loop.checkpoint.key_rules import ORIGINAL, iterate_export
from dual_loop.config import Config, load_config, resolve_config_path
from dual_loop.model.build import build_model, build_tokenizer
from dual_loop.serve.loading import rebuild
from dual_loop.training import setup
from dual_loop.training.devices import build_accelerator


def started(folder: Path, **options: Any) -> setup.Start:
    given = {"train.output_dir": str(folder), "train.device": "cpu"}
    given |= {name.replace("__", "."): value for name, value in options.items()}
    config: Config = load_config(resolve_config_path("tiny_cpu"), given)
    return setup.start(config, build_accelerator(config))


def test_a_model_that_weights_fill_is_made_empty_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    make = importer.build_model

    def build_model(config: Config, tokenizer: Any, **options: Any) -> Any:
        asked.append(options)
        return make(config, tokenizer, **options)

    monkeypatch.setattr(importer, "build_model", build_model)
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


def test_what_a_file_may_lack_keeps_the_values_that_a_seed_gives_it(tmp_path: Path) -> None:
    """Its own, those of LoRA, and frozen ones, which no checkpoint of the run will hold: they are drawn again."""
    config = load_config(resolve_config_path("tiny_cpu"))
    tokenizer = build_tokenizer(config.model)
    torch.manual_seed(config.train.seed)
    expected = build_model(config, tokenizer).state_dict()
    model = build_model(config, tokenizer)
    load_weights(model, weights_sources(config), tokenizer=tokenizer)
    lora = [name for name in expected if "layers.0.self_attn.q_proj.lora_" in name]
    lacking = [*lora, *(name for name in expected if name.startswith("text_hidden_fcs."))]
    lacking += ["grounding_encoder.mask_decoder.conv_s0.weight", "mllm.model.vision_tower.encoder.layer.0.lambda_1"]
    with torch.no_grad():
        for name in lora:
            model.state_dict()[name].fill_(7.0)
    state = {name: value for name, value in model.state_dict().items() if name not in lacking}
    torch.save(dict(iterate_export(state.items(), ORIGINAL)), tmp_path / "lacking.pth")
    given = {"train__pretrained_pth": str(tmp_path / "lacking.pth"), "train__allow_missing": tuple(lacking)}
    run = started(tmp_path / "run", **given)
    trained = setup.load(run, setup.build(run)).model.state_dict()
    rebuilt = rebuild(run.config, weights_sources(run.config))[0].state_dict()
    assert len(lora) == 2
    for name, value in trained.items():
        wanted = expected[name] if name in lacking else model.state_dict()[name]
        assert torch.equal(value, wanted), name
        assert torch.equal(rebuilt[name], wanted), name

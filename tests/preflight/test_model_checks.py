"""Tokens and weights of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dual_loop.config import Config, load_config, resolve_config_path
from dual_loop.preflight import model_checks
from dual_loop.preflight.findings import OK, PROBLEM


def config_of(**changes: object) -> Config:
    config = load_config(resolve_config_path("tiny_cpu"))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def test_weights_and_tokens(tmp_path: Path) -> None:
    assert [f.level for f in model_checks.check_tokens(config_of())] == [OK]
    assert [f.level for f in model_checks.check_weights(config_of())] == [OK]
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    [finding] = model_checks.check_weights(config_of(pretrained_pth=str(tmp_path / "bad.pth")))
    assert finding.level == PROBLEM
    config = config_of()
    nowhere = dataclasses.replace(config, model=dataclasses.replace(config.model, tokenizer=str(tmp_path / "none")))
    [finding] = model_checks.check_tokens(nowhere)
    assert finding.level == PROBLEM

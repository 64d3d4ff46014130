"""``dual-loop serve``: what the server is told, and what stops it before the model is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dual_loop.cli import main
from dual_loop.errors import EnvironmentProblem
from dual_loop.serve import demo_app
from dual_loop.serve.predictor import Predictor


def test_the_server_gets_model_address_and_origin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    loaded = SimpleNamespace(origin={"path": "run", "checkpoint": "step_3", "weights": "ema", "sha256": "a" * 64})
    predictor, asked, served = SimpleNamespace(loaded=loaded), [], []
    monkeypatch.setattr(demo_app, "import_gradio", lambda: None)
    monkeypatch.setattr(demo_app, "check_port", lambda host, port: None)
    monkeypatch.setattr(demo_app, "serve", lambda *arguments: served.append(arguments))
    monkeypatch.setattr(Predictor, "load", lambda path, **options: asked.append((path, options)) or predictor)
    arguments = ["--checkpoint", "run", "--weights", "live", "--model_path", str(tmp_path), "--max_new_tokens", "7"]
    assert main(["serve", "--host", "0.0.0.0", "--port", "81", *arguments]) == 0
    origin = "run step_3 ema sha256 aaaaaaaaaaaaaaaa"
    assert served == [(predictor, "0.0.0.0", 81, origin)]
    assert capsys.readouterr().out == f"http://0.0.0.0:81  ({origin}); stop with Ctrl-C\n"
    [(path, options)] = asked
    assert path == "run"
    overrides = {"train.model_path": str(tmp_path), "loop.max_new_tokens": 7, "train.device": "auto"}
    assert options == {"weights": "live", "device": "auto", "config": None, "overrides": overrides}


def test_a_port_in_use_stops_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(host: str, port: int) -> None:
        raise EnvironmentProblem(f"cannot listen on {port}")

    monkeypatch.setattr(demo_app, "import_gradio", lambda: None)
    monkeypatch.setattr(demo_app, "check_port", refuse)
    monkeypatch.setattr(Predictor, "load", lambda *a, **b: pytest.fail("the model was loaded"))
    assert main(["serve"]) == 2
    assert capsys.readouterr().err.endswith("\nerror: cannot listen on 7860\n")

"""``dual-loop serve``: what the server is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dual_loop.cli import main
from dual_loop.serve import demo_app
from dual_loop.serve.loading import TINY_NOTE
from dual_loop.serve.predictor import Predictor


def test_the_server_gets_model_address_and_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    origin = {"path": "run", "checkpoint": "step_3", "weights": "ema", "sha256": "a" * 64}
    predictor, asked, told = SimpleNamespace(loaded=SimpleNamespace(origin=origin, is_tiny=True)), [], []

    class Server(demo_app.PageServer):
        def __init__(self, *arguments: object, **options: object) -> None:
            told.append((arguments, options))
            super().__init__("127.0.0.1", 0)

        def run(self, *arguments: object) -> None:
            told.append(arguments)
            told.append(self.server_port)

    monkeypatch.setattr(demo_app, "PageServer", Server)
    monkeypatch.setattr(Predictor, "load", lambda path, **options: asked.append((path, options)) or predictor)
    arguments = ["--checkpoint", "run", "--weights", "live", "--model_path", str(tmp_path), "--max_new_tokens", "7"]
    arguments += ["--auth", "me:word", "--max_queue", "5", "--allow_host", "a.org", "b.org"]
    assert main(["serve", "--host", "0.0.0.0", "--port", "81", *arguments]) == 0
    title = "run step_3 ema sha256 aaaaaaaaaaaaaaaa"
    options = {"auth": ("me", "word"), "max_queue": 5, "allow_host": ["a.org", "b.org"]}
    assert told[:2] == [(("0.0.0.0", 81), options), (predictor, title)]
    printed = capsys.readouterr()
    assert printed.out == f"http://0.0.0.0:{told[2]}  ({title}); stop with Ctrl-C\n"
    assert printed.err.endswith(f"serve\nnote: {TINY_NOTE}\n")
    [(path, options)] = asked
    assert path == "run"
    overrides = {"train.model_path": str(tmp_path), "loop.max_new_tokens": 7, "train.device": "auto"}
    assert options == {"weights": "live", "device": "auto", "config": None, "overrides": overrides}
    assert main(["serve"]) == 0
    assert told[3] == (("127.0.0.1", 7860), {}), "this machine alone, unless --host says otherwise"

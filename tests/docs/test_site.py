"""The site of the documents builds without a warning, and what only the site has is there."""

from __future__ import annotations

import html
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dual_loop.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the site needs the extra docs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        build, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    commands, api = (html.unescape((tmp_path / name).read_text("utf-8")) for name in ("commands.html", "api.html"))
    assert [name for name in COMMANDS if f"usage: dual-loop {name}" not in commands] == []
    assert "region_from_point" in api
    assert "Train a grounded multimodal model" in (tmp_path / "index.html").read_text("utf-8")
    # Nothing is loaded from elsewhere.
    assert not [page for page in tmp_path.rglob("*.html") if 'src="http' in page.read_text("utf-8")]

"""The page of what the model really sees."""

from __future__ import annotations

import shutil
from pathlib import Path

from dual_loop.config import load_config, resolve_config_path
from dual_loop.data.sa1b import Sa1b
from dual_loop.model.build import geometry
from dual_loop.preflight.preview import preview_page


def test_the_preview_shows_what_is_skipped(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sa1b"
    shutil.copytree(demo / "sa1b", folder)
    sorted(folder.rglob("*.json"))[0].write_text("{")
    source = Sa1b(folder, index_dir=tmp_path / "index")
    page = preview_page([source], 6, geometry(load_config(resolve_config_path("tiny_cpu"))), 0)
    assert "is skipped (broken_json)" in page

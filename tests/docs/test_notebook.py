"""The notebook runs from nothing to a report, and is stored without what it printed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_notebook_ends_in_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient and ipykernel are in the extra dev")
    pytest.importorskip("ipykernel", reason="nbclient and ipykernel are in the extra dev")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs/first_run.ipynb", as_version=4)
    assert [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("DUAL_LOOP_CACHE", str(tmp_path / "index"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "<html" in (tmp_path / "first_run/report.html").read_text(encoding="utf-8")

"""Whatever a data file holds: no signal, no exception but the package's own, and memory within bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 50


@pytest.mark.slow
def test_no_content_of_a_file_does_harm(tmp_path: Path, repository: Path) -> None:
    folder = Path(__file__).parent
    command = [sys.executable, "-X", "faulthandler", str(folder / "fuzz_readers.py"), str(tmp_path), str(SECONDS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), str(folder)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS * 6, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert "sav.npz: " in done.stdout

"""Generated data sets for the checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from dual_loop.testing.demo_data import write_demo_data


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preflight") / "demo"
    write_demo_data(root, 6, 9, num_val=4)
    return root

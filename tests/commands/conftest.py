"""The flags of the generated data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from end_to_end import data_flags


@pytest.fixture
def flags(demo: Path) -> list[str]:
    """Every source of ``demo``, indexed beside it."""
    return [*data_flags(demo), "--cfg-options", f"data.index_dir={demo.parent / 'index'}"]

"""The README's table of memory is what the code says, and the presets fit the cards that they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dual_loop.config import CONFIG_DIR, load_config
from dual_loop.preflight.machine import PRESETS

from plan.memory_table import NAMES, preset_gib, table_row

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_the_readme_says_what_the_code_says() -> None:
    start = README.index("| config | what | estimate a process |") + 2
    table = README[start : start + len(NAMES) + 1]
    assert table == [*(table_row(name) for name in NAMES), ""]


@pytest.mark.slow
def test_presets_fit_their_cards() -> None:
    """The estimate leaves out the caption cache: a fifth of the card is kept for it."""
    sizes = {name: size for size, name in PRESETS.items()}
    estimates = {name: preset_gib(name) for name in sizes}
    for name, estimate in estimates.items():
        assert estimate < 0.8 * sizes[name], (name, estimate)
        train = load_config(CONFIG_DIR / f"{name}.py").train
        assert 8 * train.batch_size * train.gradient_accumulation_steps == 64
    assert sorted(estimates.values()) == [estimates[PRESETS[size]] for size in sorted(PRESETS)]

"""The documents' table of memory is what the code says, and the presets fit the cards that they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dual_loop.config import CONFIG_DIR, load_config
from dual_loop.preflight.machine import PRESETS

from plan.memory_table import NAMES, preset_gib, table_row

PAGE = (Path(__file__).resolve().parents[2] / "docs/sa2va_4b.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_the_page_says_what_the_code_says() -> None:
    start = PAGE.index("| config | what | estimate a process |") + 2
    table = PAGE[start : start + len(NAMES) + 1]
    assert table == [*(table_row(name) for name in NAMES), ""]


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["none", "grpo"])
def test_presets_fit_their_cards(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On eight ranks, with captioned data, and with four sampled captions a region: at most 92 % of the card."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    options = {"data.refcoco_dir": "refcoco", "policy.caption_gradient": gradient}
    for size, name in PRESETS.items():
        if size < 24 and gradient == "grpo":
            continue  # the page says that it may not fit, and --dry_run does
        estimate = preset_gib(name, options)
        assert estimate <= 0.92 * size, (name, estimate)
        train = load_config(CONFIG_DIR / f"{name}.py").train
        assert 8 * train.batch_size * train.gradient_accumulation_steps == 64

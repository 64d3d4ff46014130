"""The page of settings is what the schema says."""

from __future__ import annotations

from pathlib import Path

from plan.settings_table import lines

PAGE = Path(__file__).resolve().parents[2] / "docs/settings.md"


def test_the_page_says_what_the_schema_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == "\n".join(lines()) + "\n"

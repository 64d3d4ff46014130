"""Print docs/settings.md: every setting with its flag, default, limits and explanation, from the schema.

python scripts/plan/settings_table.py > docs/settings.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dual_loop.config import SETTINGS, Config  # noqa: E402
from dual_loop.config.schema import MOST  # noqa: E402

HEAD = """# Settings

Set a setting by its flag, by `--cfg-options key=value`, or in a configuration file. Defaults are those without a file;
a preset in `configs/` may have others, which `dual-loop train --config NAME --help` shows. This page is printed by
`python scripts/plan/settings_table.py` from `dual_loop/config/schema.py`, and a test compares the two."""


def lines() -> Iterator[str]:
    """Yield the page: a table for each group of settings."""
    yield HEAD
    shown, defaults = "", Config().to_dict()
    for key, about in SETTINGS.items():
        group, name = key.split(".")
        if group != shown:
            shown = group
            yield f"\n## {group}\n\n| key | flag | default | what |\n| --- | --- | --- | --- |"
        default = defaults[group][name]
        value = ", ".join(map(str, default)) if isinstance(default, list) else "none" if default is None else default
        bounds = [
            f"{word} {limit:g}"
            for word, limit in (("from", about.at_least), ("to", about.at_most))
            if limit not in (None, MOST)
        ]
        limits = [text for text in (", ".join(about.choices), about.unit.lower(), " ".join(bounds)) if text]
        what = about.doc + (f" ({'; '.join(limits)})" if limits else "")
        flag = f"`--{about.flag}`" if about.flag else ""
        yield f"| `{key}` | {flag} | {value} | {what.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    print("\n".join(lines()))

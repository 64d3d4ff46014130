"""Print the table of configurations that stands in docs/sa2va_4b.md: what each is, and the memory of one process.

python scripts/plan/memory_table.py
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dual_loop.config import CONFIG_DIR, load_config  # noqa: E402
from dual_loop.model.build import build_model  # noqa: E402
from dual_loop.model.sa2va import Sa2VA  # noqa: E402
from dual_loop.preflight.dry_run import meta_tokenizer  # noqa: E402
from dual_loop.training.memory import GIB, estimate_memory  # noqa: E402

NAMES = (
    *("sa2va_4b_full", "sa2va_4b_smoke", *(f"sa2va_4b_{size}gb" for size in (12, 16, 24, 48, 80))),
    *("sa2va_1b", "sa2va_internvl3_2b", "sa2va_internvl3_8b", "sa2va_internvl3_14b", "tiny_cpu", "tiny_demo"),
)


def preset_gib(name: str, options: Mapping[str, object] | None = None) -> float:
    """Return the estimate of one process in GiB, built without memory; ``options`` are dotted settings, of no model."""
    config = load_config(CONFIG_DIR / f"{name}.py", options or {})
    return estimate_memory(config, hollow_model(name))[0].total / GIB


@cache
def hollow_model(name: str) -> Sa2VA:
    """Return the model of a config on the meta device."""
    config = load_config(CONFIG_DIR / f"{name}.py")
    return build_model(config, meta_tokenizer(config), device="meta", weights_imported=True)


def table_row(name: str) -> str:
    """Return one row: the name, the first line of the file's own description, the estimate."""
    text = ast.get_docstring(ast.parse((CONFIG_DIR / f"{name}.py").read_text(encoding="utf-8"))) or ""
    what, size = text.splitlines()[0].rstrip("."), preset_gib(name)
    return f"| `{name}` | {what} | {size:.1f} GiB |" if size >= 1 else f"| `{name}` | {what} | {size:.2f} GiB |"


def main() -> None:
    print("| config | what | estimate a process |\n| --- | --- | --- |")
    for name in NAMES:
        print(table_row(name), flush=True)


if __name__ == "__main__":
    main()

"""Hook of mkdocs.yml: the pages that have another source than docs/.

The README is the first page; the commands are what ``--help`` prints; the Python page lists what docstrings say.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
API = """# From Python

What `import dual_loop` offers, and what is behind the commands. Letters of shapes stand in `dual_loop.types`.
"""
BESIDE_THE_LAZY = (
    "dual_loop.serve.predictor.Predictor",
    "dual_loop.types",
    "dual_loop.data.reader.Reader",
    "dual_loop.loop.signals.base.Signal",
    "dual_loop.errors",
)


def first_page() -> str:
    """Return the README with its links as they lead from docs/."""
    return re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text(encoding="utf-8"))


def command_page() -> str:
    """Return the help of every command."""
    from dual_loop.cli import COMMANDS, main

    os.environ["COLUMNS"] = "110"
    parts = ["# Commands\n"]
    for name, about in COMMANDS.items():
        kinds = ([what] for what in ("check", "stats", "preview")) if name == "data" else ([],)
        parts.append(f"## dual-loop {name}\n\n{about[0].upper()}{about[1:]}.\n")
        for kind in kinds:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
                main([name, *kind, "--help"])
            parts.append(f"```text\n{printed.getvalue()}```\n")
    return "\n".join(parts)


def api_page() -> str:
    """Return the directives that mkdocstrings replaces."""
    import dual_loop

    names = [f"{module}.{name}" for name, module in dual_loop._LAZY.items()]
    return "\n\n".join([API, *(f"::: {name}" for name in (*names, *BESIDE_THE_LAZY))])


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of docs/."""
    for name, text in (("index.md", first_page()), ("commands.md", command_page()), ("api.md", api_page())):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead to the first page where the documents name the README."""
    return markdown.replace("](../README.md", "](index.md")


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Drop the names of Sphinx roles, which docstrings have and mkdocstrings prints."""
    return re.sub(r":(?:class|func|meth|mod|data|attr|exc):(<code>)~?", r"\1", html) if page.url == "api.html" else html

"""Whether files keep to the JSON schemas of the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dual_loop.config.load import PACKAGE


def problems(file: Path) -> list[str]:
    """Return what is against ``dual_loop/schemas/<name>.json`` in a ``.json`` file, or in the lines of a ``.jsonl``."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is in the extra dev")
    schema = json.loads((PACKAGE / f"schemas/{file.stem}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    text = file.read_text(encoding="utf-8")
    values = text.splitlines() if file.suffix == ".jsonl" else [text]
    assert values
    validator = jsonschema.Draft202012Validator(schema)
    return [error.message for value in values for error in validator.iter_errors(json.loads(value))]

"""What a section of the acceptance run is asked, and what it found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Cell = str | float | int | None


@dataclass(frozen=True)
class Asked:
    """One section's task.

    Attributes:
        section: its module in this package.
        device: ``cuda`` or ``cpu``.
        is_tiny: a rehearsal: the tiny model in place of the real one, small shapes.
        until: ``time.monotonic()`` at which the section is ended from outside.
        folder: a new folder for what it writes.
    """

    section: str
    device: str
    is_tiny: bool
    until: float
    folder: str

    @property
    def seconds_left(self) -> float:
        return self.until - time.monotonic()


@dataclass
class Found:
    """What a section found so far.

    Attributes:
        tables: rows by the title of their table.
        checks: what must hold: name, whether it did, and what was seen.
        notes: sentences.
        error: the traceback of what ended the section early.
    """

    tables: dict[str, list[dict[str, Cell]]] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    changed: Callable[[Found], None] = field(default=lambda _: None, repr=False)

    def row(self, table: str, **cells: Cell) -> None:
        """Add a row; names of columns are keyword arguments, with ``_`` for blanks."""
        rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in cells.items()}
        self.tables.setdefault(table, []).append({name.replace("_", " "): value for name, value in rounded.items()})
        self.changed(self)

    def check(self, name: str, passed: bool, seen: str) -> None:
        self.checks.append({"name": name, "passed": bool(passed), "seen": seen})
        self.changed(self)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.changed(self)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("tables", "checks", "notes", "error")}

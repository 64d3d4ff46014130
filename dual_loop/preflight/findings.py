"""What a check finds: one line each, with what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypedDict

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"
MARKS = {OK: "✓", NOTE: "·", WARNING: "!", PROBLEM: "✗"}


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        level: ``ok``, ``note`` (worth knowing), ``warning`` (will work, perhaps not as meant) or ``problem``.
        area: what was looked at, for grouping.
        fix: what to do; empty where nothing is to be done.
    """

    level: str
    area: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{MARKS[self.level]} {self.what}"
        return f"{line}; to do: {self.fix}" if self.fix else line


class FindingsReport(TypedDict):
    """Findings as JSON holds them, with their counts by level."""

    findings: list[dict[str, str]]
    counts: dict[str, int]


def as_text(findings: Iterable[Finding]) -> str:
    """Return the findings as pasteable text, grouped by area in the order they came."""
    areas: dict[str, list[str]] = {}
    for finding in findings:
        areas.setdefault(finding.area, []).append(f"  {finding}")
    return "\n".join(line for area, own in areas.items() for line in (area, *own))


def as_dict(findings: Sequence[Finding]) -> FindingsReport:
    """Return the findings as JSON holds them."""
    counts = {level: sum(finding.level == level for finding in findings) for level in MARKS}
    return {"findings": [asdict(finding) for finding in findings], "counts": counts}


def has_problem(findings: Iterable[Finding]) -> bool:
    """Tell whether anything would stop a run."""
    return any(finding.level == PROBLEM for finding in findings)

"""Findings as text and as JSON."""

from __future__ import annotations

from dual_loop.preflight.findings import OK, PROBLEM, WARNING, Finding, as_dict, as_text, has_problem


def test_findings_as_text_and_json() -> None:
    findings = [Finding(OK, "a", "fine"), Finding(PROBLEM, "b", "broken", "mend it"), Finding(WARNING, "a", "odd")]
    assert as_text(findings) == "a\n  ✓ fine\n  ! odd\nb\n  ✗ broken; to do: mend it"
    assert as_dict(findings)["counts"] == {"ok": 1, "note": 0, "warning": 1, "problem": 1}
    assert has_problem(findings)
    assert not has_problem(findings[::2])

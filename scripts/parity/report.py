"""The table of a parity run: one row a comparison, counted, with the worst of long groups printed alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One comparison: how far apart, what was allowed, and whether that was kept."""

    name: str
    largest: float
    relative: float
    tolerance: str
    ok: bool
    note: str = ""

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILED"
        text = f"{self.name:<52}|{self.largest:>10.2e} |{self.relative:>10.2e} | {self.tolerance:<9} | {verdict}"
        return text + (f"  {self.note}" if self.note else "")


class Report:
    """Collects rows and prints them.

    Args:
        verbose: print every row of a group, not only its worst and those that failed.
        is_half: what is compared was computed in bfloat16 autocast.
    """

    def __init__(self, verbose: bool = False, is_half: bool = False) -> None:
        self.verbose, self.is_half = verbose, is_half
        self.rows: list[Row] = []

    @property
    def num_failed(self) -> int:
        return sum(not row.ok for row in self.rows)

    def section(self, title: str) -> None:
        """Print the head of a part of the table."""
        print(f"\n== {title}\n{'name':<52}| {'max abs':>9} | {'max rel':>9} | tolerance | ", flush=True)

    def close(
        self,
        name: str,
        seen: Tensor,
        expected: Tensor,
        absolute: float | None = None,
        relative: float | None = None,
        half: float | None = None,
        quiet: bool = False,
    ) -> Row:
        """Compare two tensors; the relative difference is that of the largest expected magnitude.

        Args:
            absolute, relative: the largest difference allowed; exactly one of them is given.
            half: what is allowed instead where this report ``is_half``, for the root mean square of the difference over
                that of the expected values; None changes nothing.
            quiet: do not print the row unless it fails (see :meth:`worst`).
        """
        if seen.shape != expected.shape:
            return self.failed(name, f"shape {tuple(seen.shape)}, expected {tuple(expected.shape)}")
        if (absolute is None) == (relative is None):
            raise ValueError("one tolerance is needed, absolute or relative")
        difference, size = _distance(seen, expected)
        if self.is_half and half is not None:
            # One value of many may be far off: a value near a kink of the function lies on its other side.
            distance, length = (float(part.double().norm()) for part in (seen.detach() - expected, expected))
            ratio = distance / length if length > 0 else (0.0 if distance == 0 else math.inf)
            return self._add(Row(name, difference, ratio, f"{half:.0e} rms", ratio <= half), quiet)
        ratio = difference / size if size > 0 else (0.0 if difference == 0 else math.inf)
        # A difference that is not a number is never within the tolerance.
        ok = difference <= absolute if absolute is not None else ratio <= float(relative or 0.0)
        tolerance = f"{absolute:.0e} abs" if absolute is not None else f"{relative:.0e} rel"
        return self._add(Row(name, difference, ratio, tolerance, bool(ok)), quiet)

    def number(self, name: str, seen: float, expected: float, **options: Any) -> Row:
        """:meth:`close` for two numbers."""
        return self.close(name, torch.tensor(float(seen)).double(), torch.tensor(float(expected)).double(), **options)

    def same(self, name: str, seen: Any, expected: Any, half: float = 0.0) -> Row:
        """Compare two tensors, lists or values that must be identical.

        Args:
            half: the share of a tensor's values that may differ where this report ``is_half``.
        """
        if isinstance(seen, Tensor) and isinstance(expected, Tensor):
            if seen.shape != expected.shape:
                return self.failed(name, f"shape {tuple(seen.shape)}, expected {tuple(expected.shape)}")
            difference, size = _distance(seen, expected)
            if self.is_half and half and seen.numel():
                share = float((seen != expected).double().mean())
                return self._add(Row(name, difference, share, f"{half:.0e} of all", share <= half))
            # A number that is not one differs from everything, also from itself.
            return self._add(Row(name, difference, difference / size if size else 0.0, "identical", difference == 0))
        if seen == expected:
            return self._add(Row(name, 0.0, 0.0, "identical", True))
        return self.failed(name, f"seen {_short(seen)}, expected {_short(expected)}")

    def failed(self, name: str, why: str) -> Row:
        """Add a row that failed for a reason that has no number."""
        return self._add(Row(name, math.nan, math.nan, "-", False, why))

    def worst(self, title: str, rows: list[Row]) -> None:
        """Print the worst row of a group whose rows were added quietly."""
        if rows and not self.verbose:
            worst = max(
                rows, key=lambda row: (not row.ok, row.relative if row.tolerance.endswith(("rel", "rms")) else 0.0)
            )
            whole = Row(f"{title} ({len(rows)})", worst.largest, worst.relative, worst.tolerance, worst.ok)
            print(f"{whole}  worst: {worst.name}", flush=True)

    def summary(self) -> str:
        """Return the last line: ``N passed, N failed``."""
        return f"{len(self.rows) - self.num_failed} passed, {self.num_failed} failed"

    def _add(self, row: Row, quiet: bool = False) -> Row:
        self.rows.append(row)
        if self.verbose or not quiet or not row.ok:
            print(row, flush=True)
        return row


def _distance(seen: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest absolute difference, and the largest magnitude of ``expected``."""
    if not seen.numel():
        return 0.0, 0.0
    first, second = seen.detach().cpu().double(), expected.detach().cpu().double()
    return float((first - second).abs().max()), float(second.abs().max())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:160]}..."

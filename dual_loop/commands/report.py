"""``dual-loop report RUN``: one HTML page of a run, or of several compared."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dual_loop.errors import DualLoopError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for a problem that the user can mend."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="dual-loop report",
        description="Write one self-contained HTML page about a run.",
        epilog="example: dual-loop report outputs/run --compare outputs/other",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--compare", nargs="+", type=Path, default=[], metavar="RUN", help="runs to set beside it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    args = parser.parse_args(argv)
    from dual_loop.evaluation.report import read_run, report_page

    try:
        page = report_page([read_run(path) for path in (args.run, *args.compare)])
    except DualLoopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out: Path = args.out or args.run / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    print(f"{out} ({len(page) / 1e6:.1f} MB)")
    return 0

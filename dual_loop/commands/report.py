"""``dual-loop report RUN``: one HTML page of a run, or of several compared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dual_loop.commands.common import Command, write_page


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--compare", nargs="+", type=Path, default=[], metavar="RUN", help="runs to set beside it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")


def _report(args: argparse.Namespace) -> int:
    from dual_loop.evaluation.report import read_run, report_page

    page = report_page([read_run(path) for path in (args.run, *args.compare)])
    write_page(page, args.out or args.run / "report.html")
    return 0


main = Command(
    "report",
    "Write one self-contained HTML page about a run.",
    _add_arguments,
    _report,
    example="dual-loop report outputs/run --compare outputs/other",
)

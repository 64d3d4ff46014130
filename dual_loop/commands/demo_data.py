"""``dual-loop demo-data OUT``: a generated data set in the four on-disk formats."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dual_loop.errors import DualLoopError
from dual_loop.types import SOURCES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for a problem that the user can mend."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="dual-loop demo-data",
        description="Write a generated data set in the four on-disk formats.",
    )
    parser.add_argument("out", type=Path, help="new or empty folder for the data set")
    parser.add_argument("--images", type=int, default=200, help="images of each source (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides every scene (default: %(default)s)")
    parser.add_argument("--val", type=int, default=None, help="held-out RefCOCO images (default: a fifth of --images)")
    parser.add_argument("--captioned", type=int, default=None, help="RefCOCO training images (default: as --images)")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), help="default: all four")
    args = parser.parse_args(argv)
    from dual_loop.testing.demo_data import demo_directories, write_demo_data

    try:
        counts = write_demo_data(
            args.out, args.images, args.seed, sources=args.sources, num_refcoco=args.captioned, num_val=args.val
        )
    except DualLoopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for pool, count in counts.items():
        print(f"{pool:16} {count:6} images")
    for setting, folder in demo_directories(args.out).items():
        if Path(folder).is_dir():
            print(f"--{setting} {folder}")
    return 0

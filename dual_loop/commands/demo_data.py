"""``dual-loop demo-data OUT``: a generated data set in the four on-disk formats."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dual_loop.commands.common import Command
from dual_loop.types import SOURCES


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("out", type=Path, help="new or empty folder for the data set")
    parser.add_argument("--images", type=int, default=200, help="images of each source (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides every scene (default: %(default)s)")
    parser.add_argument("--val", type=int, default=None, help="held-out RefCOCO images (default: a fifth of --images)")
    parser.add_argument("--captioned", type=int, default=None, help="RefCOCO training images (default: as --images)")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), help="default: all four")


def _write(args: argparse.Namespace) -> int:
    from dual_loop.testing.demo_data import demo_directories, write_demo_data

    counts = write_demo_data(
        args.out, args.images, args.seed, sources=args.sources, num_refcoco=args.captioned, num_val=args.val
    )
    for pool, count in counts.items():
        print(f"{pool:16} {count:6} images")
    for setting, folder in demo_directories(args.out).items():
        if Path(folder).is_dir():
            print(f"--{setting} {folder}")
    return 0


main = Command("demo-data", "Write a generated data set in the four on-disk formats.", _add_arguments, _write)

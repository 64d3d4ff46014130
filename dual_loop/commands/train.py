"""``dual-loop train`` and ``python -m dual_loop.train_dual_loop``: the flags, and the exit status.

The work is in ``dual_loop.train_dual_loop``, imported when the flags are read, so that ``--help`` needs no torch.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from dual_loop.config import add_training_flags, load_config, overrides_from, resolve_config_path
from dual_loop.errors import DualLoopError


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return the exit status. Messages of errors go to stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="dual-loop train", description="Train with the dual loop.", usage="%(prog)s [flags]"
    )
    add_training_flags(parser, arguments)
    args = parser.parse_args(arguments)
    try:
        config = load_config(resolve_config_path(args.config), overrides_from(args))
        from dual_loop import train_dual_loop

        if args.dry_run:
            print(train_dual_loop.dry_run(config))
            return 0
        return train_dual_loop.exit_status(train_dual_loop.train(config))
    except DualLoopError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except Exception:
        traceback.print_exc()
        return 1

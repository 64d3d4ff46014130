"""``dual-loop train`` and ``python -m dual_loop.train_dual_loop``: the flags, and the exit status.

The work is in ``dual_loop.train_dual_loop``, imported when the flags are read, so that ``--help`` needs no torch.
"""

from __future__ import annotations

import argparse
import threading
import traceback

from dual_loop.commands.common import Command
from dual_loop.config import add_training_flags, load_config, overrides_from, resolve_config_path
from dual_loop.errors import REFUSALS, DualLoopError


def _train(args: argparse.Namespace) -> int:
    show = threading.excepthook
    # The main thread meets what a thread could not write, and says so.
    threading.excepthook = lambda found: None if isinstance(found.exc_value, OSError) else show(found)
    try:
        config = load_config(resolve_config_path(args.config), overrides_from(args))
        from dual_loop import train_dual_loop

        if args.dry_run:
            print(train_dual_loop.dry_run(config))
            return 0
        return train_dual_loop.exit_status(train_dual_loop.train(config))
    except Exception as error:
        if isinstance(error, DualLoopError) or (isinstance(error, OSError) and error.errno in REFUSALS):
            raise
        traceback.print_exc()
        return 1
    finally:
        threading.excepthook = show


main = Command("train", "Train with the dual loop.", add_training_flags, _train, usage="[flags]")

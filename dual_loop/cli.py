"""``dual-loop <command>``. A command's heavy imports happen only when it runs, so ``--help`` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from dual_loop import __version__
from dual_loop.config import add_training_flags
from dual_loop.errors import DualLoopError

COMMANDS = {
    "doctor": "look at machine, data, weights and settings the way a run would",
    "data": "check, measure or preview data sets",
    "train": "train with the dual loop (the same as python -m dual_loop.train_dual_loop)",
    "evaluate": "measure a model: referring segmentation, captioning, the loop",
    "audit": "run the loop over a mask set without training; rank the result, export pseudo-labels",
    "report": "write one HTML page about a run, or about several compared",
    "caption": "describe masked regions of images",
    "segment": "segment what a text describes",
    "loop": "describe regions, segment the descriptions, compare",
    "serve": "the loop in a browser: draw, caption, edit, segment",
    "export": "write a run's weights in the formats of Sa2VA, transformers or peft, and read them back",
    "demo-data": "write a generated data set in the four on-disk formats",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0 done, 2 a problem that the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="dual-loop", description="Train grounded multimodal models from masks alone."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Each command's own arguments are read by its own parser, made after the choice.
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    args = parser.parse_args(arguments[:1] or ["--help"])
    if args.command in ("caption", "segment", "loop"):
        from dual_loop.commands.predict import main as predict

        return predict(args.command, arguments[1:])
    own = {"train": _train, "export": _export, "demo-data": _demo_data}
    if args.command in own:
        return own[args.command](arguments[1:])
    return int(import_module(f"dual_loop.commands.{args.command}").main(arguments[1:]))


def _train(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        parser = argparse.ArgumentParser(
            allow_abbrev=False, prog="dual-loop train", description=COMMANDS["train"], usage="%(prog)s [flags]"
        )
        add_training_flags(parser)
        parser.print_help()
        return 0
    from dual_loop.train_dual_loop import main as train

    return train(arguments)


def _export(arguments: list[str]) -> int:
    from dual_loop.export_run import main as export

    return export(arguments)


def _demo_data(arguments: list[str]) -> int:
    from dual_loop.data import demo

    parser = argparse.ArgumentParser(allow_abbrev=False, prog="dual-loop demo-data", description=COMMANDS["demo-data"])
    demo.add_arguments(parser)
    try:
        return int(demo.run(parser.parse_args(arguments)))
    except DualLoopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

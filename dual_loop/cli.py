"""``dual-loop <command>``: a table of commands, each in a module of ``dual_loop.commands``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from dual_loop import __version__
from dual_loop.errors import ConfigError, did_you_mean, explain

if TYPE_CHECKING:
    from dual_loop.commands.common import Command

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
    "completion": "print what completes commands and flags in bash, zsh or tcsh",
}
OF_PREDICT = ("caption", "segment", "loop")
"""They share a module; each other command is the ``main`` of its own."""


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
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(
            f"unknown command {arguments[0]}{did_you_mean(arguments[0], COMMANDS)} (one of {', '.join(COMMANDS)})"
        )
    command = parser.parse_args(arguments[:1] or ["--help"]).command
    return _find(command)(arguments[1:])


def _find(name: str) -> Command:
    from dual_loop.commands.common import Command

    if name == "completion":
        text = "Print a script for a shell, which completes commands, flags and their choices."
        return Command(name, text, _add_shell, _complete, example="dual-loop completion bash >> ~/.bashrc")
    module, found = ("predict", name) if name in OF_PREDICT else (name.replace("-", "_"), "main")
    command: Command = getattr(import_module(f"dual_loop.commands.{module}"), found)
    return command


def _add_shell(parser: argparse.ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def _complete(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        what, fix = "completion scripts cannot be written without shtab", "pip install 'dual-loop[completion]'"
        raise ConfigError(explain(what, "dual-loop completion", error, fix=fix)) from error
    parser = argparse.ArgumentParser("dual-loop")
    commands = parser.add_subparsers()
    for name, text in COMMANDS.items():
        _find(name).add_arguments(commands.add_parser(name, help=text), [])
    print(shtab.complete(parser, args.shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())

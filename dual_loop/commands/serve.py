"""``dual-loop serve``: the loop in a browser, on this machine alone unless told otherwise."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dual_loop.commands.common import Command, add_model_arguments, describe_origin
from dual_loop.commands.predict import load_predictor
from dual_loop.errors import ConfigError, explain


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    text = "address to listen on (default: this machine alone; 0.0.0.0 lets everybody in your network in)"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    text = "ask visitors for a name and a password; @FILE reads them, so that the process list does not show them"
    parser.add_argument("--auth", metavar="NAME:PASSWORD|@FILE", help=text)
    parser.add_argument("--max_queue", type=int, metavar="QUESTIONS", help="that wait at most (default: 32)")
    text = "another name of this server, where a proxy or DNS gives it one; requests for other names are refused"
    parser.add_argument("--allow_host", nargs="+", metavar="NAME", help=text)
    add_model_arguments(parser)


def _serve(args: argparse.Namespace) -> int:
    from dual_loop.serve.demo_app import PageServer

    options: dict[str, Any] = {}
    if args.auth is not None:
        options["auth"] = read_auth(args.auth)
    if args.max_queue is not None:
        if args.max_queue < 1:
            raise ConfigError(explain("no queue of that size", "--max_queue", args.max_queue, "at least 1"))
        options["max_queue"] = args.max_queue
    if args.allow_host:
        options["allow_host"] = args.allow_host
    with PageServer(args.host, args.port, **options) as server:  # a port that is taken is told before the model loads
        predictor = load_predictor(args)
        origin = describe_origin(predictor.loaded.origin)
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{host}:{server.server_port}  ({origin}); stop with Ctrl-C", flush=True)
        server.run(predictor, origin)
    return 0


def read_auth(text: str) -> tuple[str, str]:
    """Return name and password of ``NAME:PASSWORD``, or of the first line of ``@FILE``.

    Raises:
        ConfigError: the file cannot be read, or there is no name or no password; the message shows neither.
    """
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, ValueError) as error:
            raise ConfigError(explain("the file of --auth cannot be read", text[1:], error)) from error
    name, _, password = text.partition(":")
    if not (name and password):
        raise ConfigError(explain("no name and password", "--auth", expected="NAME:PASSWORD, or @FILE that holds it"))
    return name, password


main = Command(
    "serve",
    "Draw masks in a browser, read and edit captions, watch the masks that come back.",
    _add_arguments,
    _serve,
    example="dual-loop serve --checkpoint outputs/run --port 7860",
)

"""``dual-loop serve``: the loop in a browser, on this machine alone unless told otherwise."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dual_loop.commands.common import Command, add_model_arguments, describe_origin
from dual_loop.commands.predict import load_predictor


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    text = "address to listen on (default: this machine alone; 0.0.0.0 lets everybody in your network in)"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    add_model_arguments(parser)


def _serve(args: argparse.Namespace) -> int:
    from dual_loop.serve.demo_app import check_port, import_gradio, serve

    import_gradio()
    check_port(args.host, args.port)  # before the model takes its time
    predictor = load_predictor(args)
    origin = describe_origin(predictor.loaded.origin)
    print(f"http://{args.host}:{args.port}  ({origin}); stop with Ctrl-C", flush=True)
    serve(predictor, args.host, args.port, origin)
    return 0


main = Command(
    "serve",
    "Draw masks in a browser, read and edit captions, watch the masks that come back.",
    _add_arguments,
    _serve,
    example="dual-loop serve --checkpoint outputs/run --port 7860",
)

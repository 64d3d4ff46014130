"""``dual-loop serve``: the loop in a browser, on this machine alone unless told otherwise."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dual_loop.commands.arguments import add_model_arguments, describe_origin
from dual_loop.commands.predict import load_predictor
from dual_loop.errors import DualLoopError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it is stopped; return 0, or 2 for a problem that the user can mend."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="dual-loop serve",
        description="Draw masks in a browser, read and edit captions, watch the masks that come back.",
        epilog="example: dual-loop serve --checkpoint outputs/run --port 7860",
    )
    text = "address to listen on (default: this machine alone; 0.0.0.0 lets everybody in your network in)"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    from dual_loop.serve.demo_app import check_port, import_gradio, serve

    try:
        import_gradio()
        check_port(args.host, args.port)  # before the model takes its time
        predictor = load_predictor(args)
        origin = describe_origin(predictor.loaded.origin)
        print(f"http://{args.host}:{args.port}  ({origin}); stop with Ctrl-C", flush=True)
        serve(predictor, args.host, args.port, origin)
    except DualLoopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

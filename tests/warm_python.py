"""Python processes that start with torch and transformers imported: a server that has imported them forks one for each.

Seven of the eight seconds of a short run are imports. ``warm_bin()`` is a folder with ``python``, ``dual-loop`` and
``torchrun`` that ask the server; each hands its arguments, folder, environment and files over, passes signals on and
ends as the forked process does. One that is killed takes the forked process with it. What a forked process starts with
its ``sys.executable`` is forked too.

What is not that of a process of its own: all share one hash seed, so a test that two processes agree starts one of them
with ``sys.executable``.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import selectors
import signal
import socket
import sys

PRELOADED = (
    *("dual_loop.train_dual_loop", "dual_loop.cli", "dual_loop.accelerate", "dual_loop.serve.predictor"),
    *("torch.distributed.run", "torch.utils.tensorboard", "matplotlib.figure", "mmengine.config"),
    *("peft.utils.transformers_weight_conversion", "transformers.models.qwen2.modeling_qwen2"),
)
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def start_server(arguments, held):
    """Start a Python program that says ``ready`` and serves until its input ends.

    It and the temporary folder ``held`` go with this process.
    """
    import subprocess

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"

    def end() -> None:
        server.stdin.close()  # what the server waits for
        server.wait(timeout=60)
        held.cleanup()

    atexit.register(end)


@functools.cache
def warm_bin() -> str:
    """Start the server of this test process; return the folder with the programs that ask it."""
    import tempfile
    from pathlib import Path

    held = tempfile.TemporaryDirectory(prefix="warm_python_")
    folder = Path(held.name)
    for name, module in (("python", ""), ("dual-loop", "-m dual_loop.cli"), ("torchrun", "-m torch.distributed.run")):
        ask = f"exec '{sys.executable}' -I -S '{__file__}' ask '{folder}/socket' {module}"
        # PYTHON_EXEC is torchrun's name for the program of its ranks.
        (folder / name).write_text(f"#!/bin/sh\nexport PYTHON_EXEC='{folder}/python'\n{ask} \"$@\"\n")
        (folder / name).chmod(0o700)
    start_server([__file__, "serve", str(folder / "socket")], held)
    return str(folder)


def warm_python() -> str:
    """Return the program that stands in for ``sys.executable``."""
    return f"{warm_bin()}/python"


def ask(address: str, arguments: list[str]) -> int:
    """Let the server fork a process; return its exit status, or die of the signal that it died of."""
    request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        for number in PASSED_ON:
            signal.signal(number, lambda number, frame: server.send(bytes([number])))
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        status = int(server.makefile().read() or 1)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def serve(address: str) -> None:
    """Fork a process for each request until standard input ends; in a forked process, run what was asked for."""
    for name in PRELOADED:
        __import__(name)
    gc.freeze()  # a collection in a forked process would copy every page that it looks at
    selector, waiting = selectors.DefaultSelector(), socket.socket(socket.AF_UNIX)
    waiting.bind(address)
    waiting.listen()
    selector.register(0, selectors.EVENT_READ)
    selector.register(waiting, selectors.EVENT_READ)
    print("ready", flush=True)
    clients: dict[int, socket.socket] = {}  # by the process that runs for it
    while True:
        # One event at a time: what it does may answer the next.
        key = selector.select()[0][0]
        if key.fd == 0:
            return
        if key.fileobj is waiting:
            client = waiting.accept()[0]
            size, files, _, _ = socket.recv_fds(client, 8, 3)
            request = json.loads(client.makefile("rb").read(int.from_bytes(size, "big")))
            process = os.fork()
            if process == 0:
                for one in (waiting, client, *clients.values()):
                    one.close()
                return become(files, *request)
            for file in files:
                os.close(file)
            clients[process] = client
            selector.register(client, selectors.EVENT_READ, process)
            selector.register(os.pidfd_open(process), selectors.EVENT_READ, process)
        elif key.fileobj is clients[key.data]:
            numbers = clients[key.data].recv(1)
            os.kill(key.data, numbers[0] if numbers else signal.SIGKILL)
            if not numbers:
                selector.unregister(clients[key.data])
        else:
            status = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
            selector.unregister(key.fd)
            os.close(key.fd)
            client = clients.pop(key.data)
            if client in selector.get_map():
                selector.unregister(client)
                client.sendall(str(status).encode())
            client.close()


def become(files: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Run ``python ARGUMENTS`` here as in a new process: ``-u`` or ``-W ignore``, then ``-m``, ``-c``, or a file."""
    import runpy
    import types
    import warnings

    import numpy as np
    import torch

    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    np.random.seed()
    sys.executable = environment["PYTHON_EXEC"]  # what this process starts is warm too
    # Imported here is not imported by what runs.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
    if "-u" in arguments[:1]:
        arguments = arguments[1:]
        sys.stdout.reconfigure(line_buffering=True)
    if arguments[:2] == ["-W", "ignore"]:
        arguments = arguments[2:]
        warnings.simplefilter("ignore")
    kind, *sys.argv = arguments if arguments[0] in ("-m", "-c") else ("", *arguments)
    paths = [folder if kind else os.path.dirname(os.path.abspath(sys.argv[0]))]
    sys.path[:1] = paths + [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if kind == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        code, sys.argv[0] = sys.argv[0], "-c"
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    what, address, *rest = sys.argv[1:]
    sys.exit(ask(address, rest) if what == "ask" else serve(address))

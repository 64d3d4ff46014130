"""One METEOR for all that score with it: its Java program takes 14 seconds to read its paraphrases.

``warm_meteor()`` is a PATH that finds a ``java`` first which hands the lines for METEOR to the one that runs; any other
Java program starts as always. METEOR looks at a line at a time and keeps nothing of it, so whoever comes next finds it
as new.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading

PROGRAM = "meteor-1.5.jar"


@functools.cache
def warm_meteor() -> str:
    """Return the PATH, and start what its ``java`` asks, which ends with this process; PATH as it is without Java."""
    java = shutil.which("java")
    if java is None:
        return os.environ["PATH"]
    held = tempfile.TemporaryDirectory(prefix="warm_meteor_")
    path, address = f"{held.name}/java", f"{held.name}/meteor"
    with open(path, "w") as script:
        ask = f"exec '{sys.executable}' -I -S '{__file__}' ask '{address}' '{java}' \"$@\""
        script.write(f'#!/bin/sh\ncase "$*" in *{PROGRAM}*) {ask} ;; esac\nexec \'{java}\' "$@"\n')
    os.chmod(path, 0o700)
    from warm_python import start_server  # not in the program that asks: it starts without site-packages

    start_server(["-I", "-S", __file__, "serve", address], held)
    return f"{held.name}{os.pathsep}{os.environ['PATH']}"


def ask(address: str, command: list[str]) -> None:
    """Hand standard input and output over; return when the input has ended."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        request = json.dumps([command, os.getcwd()]).encode()
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1])
        server.sendall(request)
        server.recv(1)


def serve(address: str) -> None:
    """Answer one after the other until standard input ends."""
    waiting, started = socket.socket(socket.AF_UNIX), []
    waiting.bind(address)
    waiting.listen()
    print("ready", flush=True)
    threading.Thread(target=answer_all, args=(waiting, started), daemon=True).start()
    sys.stdin.read()
    for program in started:
        program.kill()


def answer_all(waiting: socket.socket, started: list[subprocess.Popen[str]]) -> None:
    while True:
        client = waiting.accept()[0]
        size, files, _, _ = socket.recv_fds(client, 8, 2)
        command, folder = json.loads(client.makefile("rb").read(int.from_bytes(size, "big")))
        if not started:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            started.append(subprocess.Popen(command, cwd=folder, text=True, **pipes))
        with client, open(files[0]) as lines, open(files[1], "w") as answers:
            for line in lines:
                # To EVAL and N statistics it answers N + 1 lines, to all else one.
                number = 1 + line.count("|||") * line.startswith("EVAL")
                started[0].stdin.write(line)
                started[0].stdin.flush()
                answers.write("".join([started[0].stdout.readline() for _ in range(number)]))
                answers.flush()


if __name__ == "__main__":
    what, address, *rest = sys.argv[1:]
    ask(address, rest) if what == "ask" else serve(address)

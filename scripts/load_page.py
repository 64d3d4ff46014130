"""Put load on the page of ``dual-loop serve``: many visitors at once, each with masks of its own.

python scripts/load_page.py --clients 8 --minutes 5 [--checkpoint RUN]

Starts a server, lets every client ask about a mask of its own scene again and again, and compares each answer with the
one that the client got when it was alone. Prints one JSON object: answers a second, p50 and p99 in seconds, the
server's memory at start and end in MiB, errors, and answers that were another client's. Exit status 1 where there were
any.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import psutil
from PIL import Image

from dual_loop.testing.scenes import generate_scene

FIRST_SEED = 1000


class Visitor:
    """One client: its question, and the answer that it has to get."""

    def __init__(self, address: str, number: int) -> None:
        scene = generate_scene(FIRST_SEED + number)
        pictures = [Image.fromarray(scene.image), Image.fromarray(np.asarray(scene.masks[0]).astype(np.uint8) * 255)]
        image, mask = map(data_url, pictures)
        self.question = urllib.request.Request(
            f"{address}/loop",
            json.dumps({"image": image, "masks": [mask]}).encode(),
            {"Content-Type": "application/json"},
        )
        self.seconds: list[float] = []
        self.errors: list[str] = []
        self.expected = self.ask()
        self.seconds.clear()
        self.strange = 0

    def ask(self) -> bytes:
        started = time.perf_counter()
        with urllib.request.urlopen(self.question, timeout=300) as answer:
            found: bytes = answer.read()
        self.seconds.append(time.perf_counter() - started)
        return found

    def keep_asking(self, until: float) -> None:
        while time.monotonic() < until:
            try:
                self.strange += self.ask() != self.expected
            except Exception as error:  # whatever goes wrong is what is counted here
                self.errors.append(f"{type(error).__name__}: {error}")


def data_url(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def start_server(arguments: list[str]) -> tuple[subprocess.Popen[str], str]:
    """Start ``dual-loop serve`` on a free port; return it and its address when it answers."""
    command = [sys.executable, "-m", "dual_loop.cli", "serve", "--port", "0", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = server.stdout.readline() if server.stdout else ""
    return (server, line.split()[0]) if line else sys.exit("the server did not start")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--checkpoint", help="default: the tiny checkpoint")
    args = parser.parse_args()
    server, address = start_server(["--device", "cpu", *(["--checkpoint", args.checkpoint] if args.checkpoint else [])])
    memory = psutil.Process(server.pid).memory_info
    try:
        visitors = [Visitor(address, number) for number in range(args.clients)]
        if len({visitor.expected for visitor in visitors}) < len(visitors):
            sys.exit("two clients expect the same answer, so that nobody could tell them apart")
        at_start, started = memory().rss, time.monotonic()
        until = started + 60 * args.minutes
        threads = [threading.Thread(target=visitor.keep_asking, args=(until,)) for visitor in visitors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        passed, at_end = time.monotonic() - started, memory().rss
    finally:
        server.terminate()
        server.wait(30)
    seconds = np.array([one for visitor in visitors for one in visitor.seconds])
    errors = [error for visitor in visitors for error in visitor.errors]
    strange = sum(visitor.strange for visitor in visitors)
    result = {
        "clients": args.clients,
        "answers": len(seconds),
        "answers_a_second": round(len(seconds) / passed, 2),
        "p50_s": round(float(np.quantile(seconds, 0.5)), 2) if len(seconds) else None,
        "p99_s": round(float(np.quantile(seconds, 0.99)), 2) if len(seconds) else None,
        "memory_start_mib": at_start >> 20,
        "memory_end_mib": at_end >> 20,
        "errors": len(errors),
        "first_errors": errors[:3],
        "answers_of_another_client": strange,
    }
    print(json.dumps(result, indent=1))
    return 1 if errors or strange else 0


if __name__ == "__main__":
    sys.exit(main())

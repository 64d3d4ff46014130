"""Everything that only a GPU can tell, in one command: is it right, how fast is it, what does it hold.

    python scripts/gpu_acceptance.py --out DIR --minutes 8
    python scripts/gpu_acceptance.py --out DIR --device cpu --tiny       # a rehearsal without a GPU, in minutes

It writes DIR/gpu.json and DIR/gpu.md after every section, so a run that is cut leaves what it measured, and
DIR/log.txt with all that was printed on the way. Exit status 1 when anything that must hold does not, 0 else. A
section that has no time left is skipped and said to be. A section that takes the process with it, or outlasts its
share, is ended, and the next one starts in a new process.

One GPU of 80 GB or more, Python 3.10 or newer, torch 2.6 or newer with CUDA; no network, no weights, no data. Beyond
torch and numpy these packages are needed. Bring as wheels what the machine lacks; sizes in MB, for Python 3.12 on
Linux, of the tested versions:

    transformers 13.3, peft 0.8, mmengine 0.5, pycocotools 0.4, yapf 0.3, snowballstemmer 0.1, addict and termcolor 0.0
      15.4 in all: enough where accelerate 1.10 is installed with what it and transformers need, and Pillow, tensorboard
    Pillow 6.9, tensorboard 5.5, tokenizers 3.4, huggingface_hub 0.9, PyYAML 0.8, regex 0.8, safetensors 0.5,
      accelerate 0.4, rich 0.3, psutil 0.2, packaging 0.1, tqdm 0.1
      20.0 more on a machine with nothing but torch and numpy

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
        --platform manylinux2014_x86_64 -c scripts/constraints.txt -d wheels NAME ...     # where there is a network
    pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=site:.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

from acceptance.found import Asked, Found  # noqa: E402

SECTIONS: Mapping[str, tuple[str, int]] = {
    "machine": ("Versions and floors", 60),
    "equality": ("Small models against the CPU", 150),
    "swaps": ("Weights swapped in bf16", 60),
    "resume": ("30 steps with resume", 90),
    "ranks": ("Process groups", 90),
    "step": ("A step of the real size", 150),
    "decoding": ("Decoding", 150),
    "presets": ("Presets under the memory of their cards", 150),
    "plain": ("Against the plain flow", 120),
}
"""Module of ``acceptance`` to title, and most seconds of a run of 8 minutes; what must be equal comes first."""
LEAST_SECONDS = 15
"""With less time left a section is not started."""
WORKER = (sys.executable, "-W", "ignore", "-m", "acceptance.worker")


class Worker:
    """The process that runs sections, one after the other."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        paths = [str(ROOT / "scripts"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def run(self, asked: Asked) -> tuple[str, dict[str, Any]]:
        """Return how a section ended (``done``, ``cut`` or ``died``) and what it found."""
        assert self.process.stdin is not None
        found: dict[str, Any] = Found().to_dict()
        try:
            self.process.stdin.write(json.dumps(asdict(asked)) + "\n")
            self.process.stdin.flush()
            while True:
                line = self.lines.get(timeout=max(asked.seconds_left, 0.01))
                if line is None:
                    found["error"] = f"the process ended with status {self.process.wait()}"
                    return "died", found
                answer = json.loads(line)
                found = next(iter(answer.values()))
                if "done" in answer:
                    return "done", found
        except BrokenPipeError:
            found["error"] = f"the process ended with status {self.process.wait()}"
            return "died", found
        except queue.Empty:
            self.end()
            return "cut", found

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def markdown(results: Mapping[str, Any]) -> str:
    """Return the report."""
    lines = ["# GPU acceptance", "", f"`{results['command']}`: {verdict(results)}", ""]
    for name, section in results["sections"].items():
        lines += [f"## {SECTIONS[name][0]}", "", f"{section['status']}, {section['seconds']:.0f} s", ""]
        lines += [f"- {note}" for note in section["notes"]] + [""] * bool(section["notes"])
        for title, rows in section["tables"].items():
            columns = list(rows[0])
            lines += [f"### {title}", "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
            lines += [
                f"| {' | '.join(str(row[c]) if row.get(c) is not None else '-' for c in columns)} |" for row in rows
            ]
            lines.append("")
        checks = section["checks"]
        if checks:
            lines += [f"{sum(one['passed'] for one in checks)} of {len(checks)} checks hold.", ""]
            failed = [one for one in checks if not one["passed"]]
            lines += [f"- FAILED: {one['name']}: {one['seen']}" for one in failed] + [""] * bool(failed)
        if section["error"]:
            lines += ["```", section["error"].strip(), "```", ""]
    return "\n".join(lines)


def verdict(results: Mapping[str, Any]) -> str:
    sections = results["sections"].values()
    checks = [one for section in sections for one in section["checks"]]
    failed = sum(not one["passed"] for one in checks)
    by_status = {word: sum(one["status"] == word for one in sections) for word in ("died", "cut", "skipped")}
    errors = sum(bool(one["error"]) and one["status"] == "done" for one in sections)
    ends = [f"{count} sections {word}" for word, count in {**by_status, "with errors": errors}.items() if count]
    return ", ".join([f"{len(checks) - failed} of {len(checks)} checks hold", *ends])


def is_accepted(results: Mapping[str, Any]) -> bool:
    """Tell whether all that was checked holds, and no section broke; one that was cut or skipped is no failure."""
    return all(
        not section["error"] and all(one["passed"] for one in section["checks"])
        for section in results["sections"].values()
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where gpu.json and gpu.md go")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N", help="time for all of it (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to compute (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="the tiny model in place of the real one")
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), metavar="A,B", help="which, in their order (%(default)s)"
    )
    args = parser.parse_args(argv)
    args.sections = args.sections.split(",")
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown sections {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return args


def main(argv: Sequence[str] | None = None, worker_command: Sequence[str] = WORKER) -> int:
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    given = " ".join(["gpu_acceptance.py", *(sys.argv[1:] if argv is None else argv)])
    results: dict[str, Any] = {"command": given, "sections": {}}
    worker: Worker | None = None
    for name in args.sections:
        start = time.monotonic()
        status, found = "skipped", Found(notes=["no time was left"]).to_dict()
        if end - start >= LEAST_SECONDS:
            worker = worker or Worker(worker_command, args.out / "log.txt")
            until = min(end, start + SECTIONS[name][1] * args.minutes / 8)
            with tempfile.TemporaryDirectory(prefix="gpu_acceptance_") as folder:
                status, found = worker.run(Asked(name, args.device, args.tiny, until, folder))
            if status != "done":
                worker = worker.end()
        results["sections"][name] = {"status": status, "seconds": time.monotonic() - start, **found}
        (args.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (args.out / "gpu.md").write_text(markdown(results), encoding="utf-8")
        only = {"sections": {name: results["sections"][name]}}
        print(f"{name}: {status}, {time.monotonic() - start:.0f} s, {verdict(only)}", flush=True)
        for one in found["checks"]:
            if not one["passed"]:
                print(f"  FAILED {one['name']}: {one['seen']}", flush=True)
        if found["error"]:
            print(f"  {found['error'].strip().splitlines()[-1]}", flush=True)
    if worker is not None:
        worker.end()
    print(f"{verdict(results)}; {args.out / 'gpu.md'}")
    return 0 if is_accepted(results) else 1


if __name__ == "__main__":
    sys.exit(main())

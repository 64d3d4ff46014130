"""The label-scarce experiment: what is each signal worth, when few scenes have captions and many have masks?

    python scripts/experiments/label_scarce.py OUT [--arms A B Z] [--seeds 0 1 2] [--steps 450] [--jobs 2]

Every run has its own folder ``OUT/<arm>_s<seed>`` and is started through the trainer's own entry. A finished run is
not run again and a broken one goes on from its checkpoint, so the command may be stopped and started at will. All arms
take the same number of optimiser steps of the same number of images; seconds stand beside.

The held-out scenes have two to four objects, most of which share their shape or colour with another one. All scenes of
the mask-only part are written twice: as SA-1B and Open Images without text, and (for the ceiling) with captions. With
``--vague 0.5`` half of the training captions name the shape alone: they describe, and do not tell apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from dual_loop.testing.demo_data import write_demo_data  # noqa: E402
from experiments.arms import ALL, ARMS, CAPTIONED, MASKS  # noqa: E402
from experiments.table import markdown, read_runs, rows_of  # noqa: E402

DATA_SEED = 11


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=450, help="optimiser steps of every arm")
    parser.add_argument("--captioned", type=int, default=60, help="scenes with captions")
    parser.add_argument("--scenes", type=int, default=900, help="mask-only scenes of each of the two sources")
    parser.add_argument("--val", type=int, default=200, help="held-out scenes")
    parser.add_argument("--vague", type=float, default=0.0, help="share of training captions that name the shape alone")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--list", action="store_true", help="print the arms with their flags and stop")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of what is there")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse_arguments()
    if args.list:
        print("\n".join(f"{name:4} {arm.description}: {arm.data}, {' '.join(arm.flags)}" for name, arm in ARMS.items()))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        write_data(args)
        run_all(args)
    print(write_table(args.out))
    return 0


def write_data(args: argparse.Namespace) -> None:
    """Write both data sets: masks with few captions, and everything captioned."""
    masks = ("sa1b", "openimages")
    for name, pools in (("data", ()), ("data_all", masks)):
        write_demo_data(
            args.out / name,
            args.scenes,
            DATA_SEED,
            sources=(*masks, "refcoco"),
            num_refcoco=args.captioned,
            num_val=args.val,
            captioned_pools=pools,
            vague_share=args.vague,
        )


def arm_arguments(arm: str, seed: int, out: Path, steps: int) -> list[str]:
    """Return the trainer's arguments of one run."""
    data, kind = out / "data", ARMS[arm].data
    held_out = ["--eval_dir", str(data / "ref_seg")]
    options = ["train.num_threads=1", "data.sav_weight=None"]
    if kind == CAPTIONED:
        sources = ["--refcoco_dir", str(data / "ref_seg")]
    elif kind == ALL:
        sources = ["--refcoco_dir", str(out / "data_all" / "ref_seg")]
    else:
        assert kind == MASKS
        sources = ["--refcoco_dir", str(data / "ref_seg"), "--sa1b_dir", str(data / "sa1b")]
        sources += ["--openimage_dir", str(data / "openimages")]
    shares = ("0.375", "0.375", "0.25") if kind == MASKS else ("None", "None", "1.0")
    names = ("sa1b_weight", "openimage_weight", "refcoco_weight")
    options += [f"data.{name}={share}" for name, share in zip(names, shares, strict=True)]
    options += [f"data.{name}_repeats=1" for name in ("sa1b", "openimage", "refcoco")]
    return [
        *("--config", str(ROOT / "configs" / "tiny_demo.py"), "--device", "cpu", "--max_steps", str(steps)),
        *(*sources, *held_out, "--seed", str(seed), "--output_dir", str(out / f"{arm}_s{seed}"), "--resume", "auto"),
        *(*ARMS[arm].flags, "--panel_interval", "100000", "--cfg-options", *options),
    ]


def is_done(folder: Path, steps: int) -> bool:
    """Tell whether a run was trained to its end and measured."""
    path = folder / "summary.json"
    if not path.is_file():
        return False
    summary = json.loads(path.read_text(encoding="utf-8"))
    return "after" in summary and int(summary["steps"]) == steps


def run_all(args: argparse.Namespace) -> None:
    """Run what is not done yet, ``--jobs`` at a time, seed by seed."""
    waiting = [(arm, seed) for seed in args.seeds for arm in args.arms]
    waiting = [(arm, seed) for arm, seed in waiting if not is_done(args.out / f"{arm}_s{seed}", args.steps)]
    running: dict[subprocess.Popen[bytes], tuple[str, float]] = {}
    while waiting or running:
        while waiting and len(running) < args.jobs:
            arm, seed = waiting.pop(0)
            running[_start(arm, seed, args)] = (f"{arm}_s{seed}", time.time())
        time.sleep(1.0)
        for process in [process for process in running if process.poll() is not None]:
            name, started = running.pop(process)
            state = "done" if process.returncode == 0 else f"FAILED (see {args.out / name}.log)"
            print(f"{name}: {state}, {time.time() - started:.0f} s", flush=True)


def _start(arm: str, seed: int, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dual_loop.train_dual_loop", *arm_arguments(arm, seed, args.out, args.steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (args.out / f"{arm}_s{seed}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)


def write_table(out: Path) -> str:
    """Write ``table.md`` and ``table.json`` of every run below ``out`` and return the text."""
    found: dict[str, list[int]] = {}
    for path in sorted(out.glob("*_s*/config.json")):
        arm, _, seed = path.parent.name.rpartition("_s")
        if arm in ARMS:
            found.setdefault(arm, []).append(int(seed))
    runs = read_runs(out, [arm for arm in ARMS if arm in found], found)
    rows = rows_of(runs)
    start = next((run.summary["before"] for run in runs if run.summary is not None), None)
    text = f"{_origin(out, runs)}\n\n{markdown(rows, start)}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "table.json").write_text(json.dumps({"rows": rows, "start": start}, indent=2) + "\n", encoding="utf-8")
    return text


def _origin(out: Path, runs: Sequence[Any]) -> str:
    """Say which commits, machine and command the runs come from."""
    commits, torch_version = set(), "?"
    for run in runs:
        path = out / f"{run.arm}_s{run.seed}" / "versions.json"
        if path.is_file():
            versions: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            commits.add(str(versions["git_commit"])[:12])
            torch_version = versions["packages"]["torch"]
    steps = sorted({run.summary["steps"] for run in runs if run.summary is not None})
    return (
        f"commit {', '.join(sorted(commits))}; {os.cpu_count()} CPU cores ({platform.machine()}), one thread a run, "
        f"torch {torch_version}; {', '.join(map(str, steps))} optimiser steps; "
        "`python scripts/experiments/label_scarce.py OUT`"
    )


if __name__ == "__main__":
    sys.exit(main())

"""How seconds and memory of a step grow with regions, image tokens, new tokens, vocabulary and ranks; as plots.

    python scripts/bench_growth.py --preset mid --out outputs/growth
    python scripts/bench_growth.py --preset tiny --axes regions new_tokens --out outputs/growth_tiny

For each axis one number grows and all others stay; a step is taken by the real trainer (``bench_step``). The exponent
of a phase is the slope of log seconds over log size between the two largest sizes, where fixed costs weigh least: 1 is
linear, and what is above 1.15 is named. Of ranks only the exchange of gradients is measured, between processes of this
machine: on two cores the steps themselves would only wait for each other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

import torch  # noqa: E402
from bench_step import run_variants  # noqa: E402

from bench.phases import PHASES  # noqa: E402
from bench.setup import Setting  # noqa: E402

AXES: dict[str, tuple[int, ...]] = {
    "regions": (1, 2, 4, 8, 16, 32, 64),
    "image_tokens": (64, 144, 256, 576, 1024),
    "new_tokens": (8, 16, 32, 64, 128),
    "vocabulary": (2048, 8192, 32768, 131072),
    "ranks": (1, 2),
}
MORE_THAN_LINEAR = 1.15
LEAST_SHARE = 0.03


def grow(axis: str, sizes: Sequence[int], base: Setting, repeats: int, threads: int) -> list[dict[str, Any]]:
    """Measure a step at every size of one axis."""
    rows = []
    for size in sizes:
        setting = replace(base, **{axis: size})
        result = run_variants(setting, ["default"], repeats, threads, True)["variants"]["default"]
        row = {key: result[key] for key in ("seconds", "peak_above_imports_mb", "phases", "flops")}
        rows.append({"size": size, **row})
        print(f"{axis} {size}: {row['seconds']:.2f} s, {row['peak_above_imports_mb']:.0f} MB", flush=True)
    return rows


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the exponent of every phase that is worth a name, of all seconds and of the memory."""
    before, last = rows[-2], rows[-1]
    ratio = math.log(last["size"] / before["size"])
    found = {
        name: math.log(last["phases"][name] / before["phases"][name]) / ratio
        for name in PHASES
        if last["phases"].get(name, 0) > LEAST_SHARE * last["seconds"] and before["phases"][name] > 0
    }
    for name in ("seconds", "peak_above_imports_mb"):
        found[name] = math.log(last[name] / before[name]) / ratio
    return found


def grow_ranks(sizes: Sequence[int], num_values: int) -> list[dict[str, Any]]:
    """Measure one all-reduce of ``num_values`` float32 gradients over so many processes, gloo."""
    rows = []
    for size in sizes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
        torch.multiprocessing.spawn(exchange, args=(size, port, num_values, queue), nprocs=size)
        seconds = queue.get()
        rows.append({"size": size, "seconds": seconds, "values": num_values})
        print(f"ranks {size}: {seconds * 1e3:.1f} ms for {num_values / 1e6:.1f} M gradients", flush=True)
    return rows


def exchange(rank: int, size: int, port: int, num_values: int, queue: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    gradients, seconds = torch.ones(num_values), []
    for _ in range(6):
        start = time.perf_counter()
        torch.distributed.all_reduce(gradients)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        queue.put(median(seconds[1:]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def plot(axis: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw seconds by phase (stacked) and memory over one axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [row["size"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    if "phases" in rows[0]:
        names = [name for name in PHASES if max(row["phases"][name] / row["seconds"] for row in rows) > LEAST_SHARE]
        left.stackplot(sizes, *([row["phases"][name] for row in rows] for name in names), labels=names)
        left.legend(fontsize=7, loc="upper left")
        right.plot(sizes, [row["peak_above_imports_mb"] for row in rows], "o-")
        right.set(xlabel=axis.replace("_", " "), ylabel="peak memory above the imports, MB", ylim=(0, None))
    else:
        left.plot(sizes, [row["seconds"] for row in rows], "o-")
        right.axis("off")
    left.set(
        xlabel=axis.replace("_", " "), ylabel="seconds a step" if "phases" in rows[0] else "seconds", ylim=(0, None)
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "mid"), default="mid")
    parser.add_argument("--axes", nargs="+", choices=sorted(AXES), default=list(AXES), help="default: all")
    parser.add_argument("--most", type=int, help="leave out larger sizes")
    parser.add_argument("--repeats", type=int, default=1, help="measured steps (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder for the plots and growth.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    import real_size_step

    args.out.mkdir(parents=True, exist_ok=True)
    # One image a step: what grows here grows with every image.
    base = Setting(args.preset, batch=1, accumulation=1, new_tokens=32, regions=4)
    results: dict[str, Any] = {"commit": real_size_step.commit(), "machine": real_size_step.machine()}
    for axis in args.axes:
        sizes = [size for size in AXES[axis] if args.most is None or size <= args.most]
        if axis == "ranks":
            rows = grow_ranks(sizes, 7_400_000)
            results[axis] = {"rows": rows}
        else:
            rows = grow(axis, sizes, base, args.repeats, args.threads)
            results[axis] = {"rows": rows, "exponents": exponents(rows)}
            steep = {name: slope for name, slope in results[axis]["exponents"].items() if slope > MORE_THAN_LINEAR}
            shown = ", ".join(f"{name} {slope:.2f}" for name, slope in steep.items()) or "nothing"
            print(f"{axis}: faster than linear between the two largest sizes: {shown}", flush=True)
        plot(axis, rows, args.out / f"growth_{axis}.png")
    (args.out / "growth.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

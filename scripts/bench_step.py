"""Whole optimiser steps of the real trainer with random weights and generated batches: where the time goes.

    python scripts/bench_step.py --preset mid --plain
    python scripts/bench_step.py --preset mid --regions_per_image 4 --off fused_lora --off lean_sam2
    python scripts/bench_step.py --preset mid --off all --json levers.json
    python scripts/bench_step.py --preset 4b --batch 8 --accumulation 1 --new_tokens 16 --on pack_weights

Every variant is a process of its own; their steps are taken in turn, so that a slow moment of the machine meets all of
them. Printed are medians, ratios, and beside each phase its floor: what the counted operations need at the speed of a
matrix product of the step's own shape, or what the operands of its products need at the speed of a memory copy,
whichever is more; both speeds are measured in the same call. ``--plain`` is the flow without levers: the libraries'
layers as they are, all images of a micro-batch at once, whole embedding tables trained.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

import torch  # noqa: E402

from bench.floors import measure_floors  # noqa: E402
from bench.phases import PHASES  # noqa: E402
from bench.setup import LEVERS, NEW_TOKEN_ROWS, PRESETS, Setting  # noqa: E402

CAPTIONING = ("prompt prefill", "decode")
"""The phases of step 1 behind the vision tower."""


class Worker:
    """One variant's process."""

    def __init__(self, setting: Setting, name: str, threads: int) -> None:
        self.name = name
        paths = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "bench.worker"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._write(json.dumps([asdict(setting), name]))
        self._read()

    def ask(self, command: str) -> dict[str, Any]:
        self._write(command)
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit(f"error: the process of variant {self.name} ended with status {self.process.wait()}")


def run_variants(
    setting: Setting, names: Sequence[str], repeats: int, threads: int, at_once: bool, is_cold: bool = False
) -> dict[str, Any]:
    """Take a step of each variant in turn, ``repeats`` times after one that is not counted; return all results.

    Where ``is_cold``, each takes one step alone, the first, and its operations are counted while it is timed.
    """
    if not at_once:
        results: dict[str, Any] = {"variants": {}}
        for name in names:
            one = run_variants(setting, [name], repeats, threads, True, is_cold)
            results = {**one, **results, "variants": {**results["variants"], **one["variants"]}}
        return results
    workers = [Worker(setting, name, threads) for name in names]
    if not is_cold:
        for worker in workers:
            worker.ask("step")
    shape, device = workers[0].ask("shape").values()
    torch.set_num_threads(threads)
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    floors = []
    for number in range(1 if is_cold else repeats):
        for worker in workers:
            steps[worker.name].append(worker.ask("counted" if is_cold else "step"))
            print(f"round {number + 1}, {worker.name}: {steps[worker.name][-1]['seconds']:.2f} s", file=sys.stderr)
        # Here and not in a worker, whose peak memory it would raise.
        rows, width, inner, dtype = shape
        floors.append(measure_floors(rows, width, inner, getattr(torch, dtype), device))
    # The machine's best, not that of a disturbed moment.
    floor = {key: max(one[key] for one in floors) for key in floors[0]}
    variants = {}
    for worker in workers:
        ended = worker.ask("end")
        counted = steps[worker.name][0] if is_cold else worker.ask("counted")
        variants[worker.name] = summary(steps[worker.name], counted, ended, floor)
        worker.close()
    return {"variants": variants, "floor": floor, "device": device}


def summary(
    steps: Sequence[dict[str, Any]], counted: dict[str, Any], ended: dict[str, Any], floor: dict[str, float]
) -> dict[str, Any]:
    """Return medians of one variant, with the floor of every phase."""
    phases = {name: median(step["phases"][name] for step in steps) for name in PHASES}
    floors = {
        name: max(
            counted["flops"][name] / floor["flops_per_second"], counted["bytes"][name] / floor["bytes_per_second"]
        )
        for name in PHASES
    }
    num_decoded = max(1, len(counted["decode_rows"]))
    rows = counted["decode_rows"][0] if counted["decode_rows"] else 0
    return {
        "seconds": median(step["seconds"] for step in steps),
        "peak_mb": ended["peak_mb"],
        "peak_above_imports_mb": ended["peak_mb"] - ended["imports_mb"],
        "parameters": ended["parameters"],
        "trained": ended["trained"],
        "phases": phases,
        "floors": floors,
        "flops": counted["flops"],
        "bytes": counted["bytes"],
        **{key: counted[key] for key in ("captions", "rejected", "allocated", "reserved")},
        "caption_share": sum(phases[name] for name in CAPTIONING) / sum(phases.values()) if rows else None,
        "decode_step": {
            "rows": rows,
            "seconds": phases["decode"] / num_decoded,
            "floor_flops": counted["flops"]["decode"] / num_decoded / floor["flops_per_second"],
            "floor_bytes": counted["bytes"]["decode"] / num_decoded / floor["bytes_per_second"],
        },
    }


def add_ratios(results: dict[str, Any]) -> None:
    """Add how much more a variant takes than the default, and ``ratio_plain``.

    ``seconds`` is plain / default (3 means three times as fast), ``peak_mb`` default / plain (0.6 means 60 %).
    """
    variants = results["variants"]
    default = variants["default"]
    for values in variants.values():
        values["times_default"] = values["seconds"] / default["seconds"]
    if "plain" in variants:
        plain = variants["plain"]
        results["ratio_plain"] = {
            "seconds": plain["seconds"] / default["seconds"],
            "peak_mb": default["peak_mb"] / plain["peak_mb"],
            "peak_above_imports_mb": default["peak_above_imports_mb"] / plain["peak_above_imports_mb"],
        }


def print_report(results: dict[str, Any], setting: Setting) -> None:
    import real_size_step

    gpu = f"; {torch.cuda.get_device_name()}" if results["device"] != "cpu" else ""
    print(f"commit {real_size_step.commit()}\nmachine {real_size_step.machine()}{gpu}")
    print(f"setting {json.dumps(asdict(setting))}")
    floor = results["floor"]
    print(
        f"floor: {floor['flops_per_second'] / 1e9:.0f} GFLOP/s in a product of {floor['rows']:.0f} x "
        f"{floor['width']:.0f} x {floor['inner']:.0f}, copy {floor['bytes_per_second'] / 1e9:.1f} GB/s"
    )
    for name, values in results["variants"].items():
        print(f"\n{name}: {values['parameters'] / 1e6:.1f} M parameters, {values['trained'] / 1e6:.1f} M trained")
        print(f"{'phase':<18}{'seconds':>9}{'floor':>9}{'ratio':>7}{'GFLOP':>10}{'GB':>8}")
        for phase in PHASES:
            seconds, least = values["phases"][phase], values["floors"][phase]
            ratio = f"{seconds / least:.1f}" if least > 1e-4 else ""
            flops, moved = values["flops"][phase] / 1e9, values["bytes"][phase] / 1e9
            print(f"{phase:<18}{seconds:>9.3f}{least:>9.3f}{ratio:>7}{flops:>10.1f}{moved:>8.2f}")
        step = values["decode_step"]
        print(f"{len(values['captions'])} captions, {values['rejected']} of them rejected and replaced")
        if not step["rows"]:
            continue
        print(
            f"decoding step of {step['rows']} rows: {step['seconds'] * 1e3:.1f} ms, floors "
            f"{step['floor_flops'] * 1e3:.1f} ms (product) and {step['floor_bytes'] * 1e3:.1f} ms (memory); "
            f"captions take {values['caption_share']:.0%} of the step"
        )
    print(f"\n{'variant':<28}{'s/step':>9}{'x default':>11}{'peak MB':>9}{'above imports':>15}")
    for name, values in results["variants"].items():
        print(
            f"{name:<28}{values['seconds']:>9.3f}{values['times_default']:>11.2f}{values['peak_mb']:>9.0f}"
            f"{values['peak_above_imports_mb']:>15.0f}"
        )
    if "ratio_plain" in results:
        ratio = results["ratio_plain"]
        print(
            f"plain / default: {ratio['seconds']:.2f} x the seconds; default / plain: {ratio['peak_mb']:.0%} of the "
            f"peak memory ({ratio['peak_above_imports_mb']:.0%} above the imports)"
        )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--preset", choices=sorted(PRESETS), default="mid", help="size (%(default)s)")
    size.add_argument("--config", metavar="NAME|FILE", help="a configuration, or a config.json of the original's kind")
    for name, default, text in (
        ("batch", 2, "images of a micro-batch"),
        ("accumulation", 4, "micro-batches of a step"),
        ("new_tokens", 32, "tokens of a caption"),
        ("regions_per_image", 1, "regions of an image"),
        ("repeats", 3, "measured steps"),
        ("threads", 2, "threads of a process"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--image_tokens", type=int, metavar="N", help="tokens of an image tile, a square number")
    parser.add_argument("--vocabulary", type=int, metavar="N", help="size of the vocabulary")
    parser.add_argument("--spread", action="store_true", help="let captions end at different lengths")
    parser.add_argument("--plain", action="store_true", help="measure the flow without any lever too")
    choices = [*LEVERS, NEW_TOKEN_ROWS]
    parser.add_argument("--off", action="append", default=[], choices=[*choices, "all"], help="measure without a lever")
    parser.add_argument("--on", action="append", default=[], metavar="LEVER", help="measure with an optional lever")
    parser.add_argument("--cfg-options", nargs="*", default=[], metavar="KEY=VALUE", help="dotted configuration keys")
    parser.add_argument("--sequential", action="store_true", help="one process after the other (where memory is short)")
    parser.add_argument("--cold", action="store_true", help="take the first step alone (where steps take minutes)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    setting = Setting(
        config=args.config or args.preset,
        batch=args.batch,
        accumulation=args.accumulation,
        new_tokens=args.new_tokens,
        regions=args.regions_per_image,
        image_tokens=args.image_tokens,
        vocabulary=args.vocabulary,
        is_spread=args.spread,
        changes=dict(option.split("=", 1) for option in args.cfg_options),
        device=args.device,
    )
    off = [*LEVERS, NEW_TOKEN_ROWS] if "all" in args.off else args.off
    names = ["default", *(["plain"] if args.plain else []), *(f"off:{n}" for n in off), *(f"on:{n}" for n in args.on)]
    results = run_variants(setting, names, args.repeats, args.threads, not args.sequential, args.cold)
    results["setting"] = asdict(setting)
    add_ratios(results)
    print_report(results, setting)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

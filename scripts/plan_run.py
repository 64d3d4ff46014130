"""What a run will take: memory, seconds a step and days for N GPUs of stated rates, from counted operations and bytes.

    python scripts/plan_run.py --gpus 8 --tflops 989 --bandwidth_gbs 3350 --memory_gib 80 --images 2000000
    python scripts/plan_run.py tiny_cpu --gpus 1 --tflops 0.1 --utilisation 1 --bandwidth_gbs 10 --steps 1000
    python scripts/bench_step.py --preset mid --repeats 1 --json step.json; python scripts/plan_run.py --check step.json

No rate is known to this program: all are yours, and a plan is the least that they allow. One step is counted by
running the package's own loop on tensors without values, so neither a GPU nor the model's memory is needed; the 4B
model takes about a minute on a CPU core. ``--check`` plans the very setting of a step that ``bench_step.py`` measured,
with the rates measured beside it, and prints planned against counted and measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

from dual_loop.config import Config, load_config, resolve_config_path  # noqa: E402
from dual_loop.errors import CheckpointError, ConfigError, DualLoopError, explain  # noqa: E402

FLAGS = {
    "batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "regions_per_image": "data.regions_per_image",
    "new_tokens": "loop.max_new_tokens",
}


def plan(args: argparse.Namespace) -> tuple[str, Any]:
    """Return the report of a plan, and its values."""
    from plan.report import Machines, plan_values, report, steps_of
    from plan.step import count_step

    config = read_config(args)
    machines = Machines(
        gpus=args.gpus,
        flops_per_second=args.tflops * 1e12 * args.utilisation,
        bytes_per_second=args.bandwidth_gbs * 1e9,
        memory_bytes=None if args.memory_gib is None else args.memory_gib * 2**30,
        link_bytes_per_second=None if args.interconnect_gbs is None else args.interconnect_gbs * 1e9,
    )
    with tempfile.TemporaryDirectory(prefix="plan_run_") as folder:
        step = count_step(
            config,
            read_tokenizer(config, Path(folder)),
            world_size=machines.gpus,
            compare_checkpointing=args.compare_checkpointing,
        )
    steps = args.steps or config.train.max_steps
    if args.images:
        steps = steps_of(args.images, config.train.num_epochs, step.images * machines.gpus)
    values = plan_values(step, machines, config, steps)
    stated = f"({args.tflops:g} TFLOP/s stated, of which {args.utilisation:.0%} are taken to be reached)"
    return f"{report(values, config)}\n{stated}", values


def check(file: str) -> tuple[str, Any]:
    """Return planned against measured of a file that ``bench_step.py --json`` wrote."""
    from dual_loop.model.build import geometry
    from dual_loop.training.device_prefetch import split_window
    from dual_loop.training.devices import device_type, images_at_once

    from bench.setup import GeneratedData, Setting, build_config, build_tokens
    from plan.report import check_report
    from plan.step import PlannedCaptions, count_step

    found = json.loads(Path(file).read_text(encoding="utf-8"))
    if not {"setting", "floor", "variants"} <= set(found) or "default" not in found["variants"]:
        message = "not a file of bench_step.py", file, ", ".join(found), "setting, floor and variants.default"
        raise ConfigError(explain(*message, "run scripts/bench_step.py --json again"))
    setting = Setting(**found["setting"])
    if setting.is_spread:
        raise ConfigError(explain("captions of different lengths are not planned", file, "--spread", "none"))
    config = build_config(setting, "default")
    with tempfile.TemporaryDirectory(prefix="plan_run_") as folder:
        tokenizer = build_tokens(config, Path(folder))
    batches = GeneratedData(setting, geometry(config)).batches(0)
    micros = [next(batches) for _ in range(setting.accumulation)]
    window = split_window(micros, images_at_once(config, device_type(config)))
    measured = found["variants"]["default"]
    # How long a caption of random tokens is when step 2 reads it again is known from the step alone.
    captions = PlannedCaptions(range(len(tokenizer)), None, measured.get("captions", ()))
    step = count_step(config, tokenizer, window=window, captions=captions)
    return check_report(step, measured, found["floor"])


def read_config(args: argparse.Namespace) -> Config:
    """Return the configuration with the overrides of the command line."""
    changes: dict[str, Any] = {}
    for option in args.cfg_options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(explain("not KEY=VALUE", "--cfg-options", option))
        changes[key] = value
    changes.update({key: value for flag, key in FLAGS.items() if (value := getattr(args, flag)) is not None})
    return load_config(resolve_config_path(args.config), changes)


def read_tokenizer(config: Config, folder: Path) -> Any:
    """Return the configuration's tokenizer; where it is not at hand, one of the same size made from the tiny one."""
    from real_size_step import write_tokenizer

    from dual_loop.model.build import build_tokenizer, load_tokenizer_file
    from dual_loop.model.prompts import NEW_TOKENS

    try:
        return build_tokenizer(config.model, config.train.model_path)
    except CheckpointError:
        if "vocab_size" not in config.model.text:
            raise
    print("note: no tokenizer at hand; texts are cut by a stand-in of the same size, a little finer", file=sys.stderr)
    write_tokenizer(folder, int(config.model.text["vocab_size"]))
    tokenizer = load_tokenizer_file(folder / "tokenizer.json")
    tokenizer.add_tokens(list(NEW_TOKENS), special_tokens=True)
    return tokenizer


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="sa2va_4b_full", metavar="NAME|FILE", help="(%(default)s)")
    whole = (
        ("batch_size", "images of a micro-batch"),
        ("gradient_accumulation_steps", "micro-batches of a step"),
        ("regions_per_image", "regions of an image"),
        ("new_tokens", "tokens of a caption, its end included"),
        ("steps", "optimiser steps of the run"),
        ("images", "images of an epoch, in place of --steps"),
    )
    for name, text in whole:
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="processes, one a GPU (%(default)s)")
    rates = (
        ("tflops", None, "dense rate of one GPU in the model's dtype, TFLOP/s"),
        ("utilisation", 0.4, "share of --tflops that is reached (%(default)s, a guess: state your own)"),
        ("bandwidth_gbs", None, "memory bandwidth of one GPU, GB/s"),
        ("memory_gib", None, "memory of one GPU, GiB"),
        ("interconnect_gbs", None, "what one GPU sends during an all-reduce, GB/s"),
    )
    for name, default, text in rates:
        parser.add_argument(f"--{name}", type=float, default=default, metavar="X", help=text)
    parser.add_argument("--cfg-options", nargs="*", default=[], metavar="KEY=VALUE", help="dotted configuration keys")
    parser.add_argument("--compare_checkpointing", action="store_true", help="count activations with and without")
    parser.add_argument("--check", metavar="FILE", help="compare with a step that bench_step.py --json measured")
    parser.add_argument("--json", metavar="FILE", help="write the values there")
    args = parser.parse_args(argv)
    if not args.check and (args.tflops is None or args.bandwidth_gbs is None):
        parser.error("--tflops and --bandwidth_gbs are needed: no rate is assumed")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    from plan.step import quiet

    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        with quiet():
            text, values = check(args.check) if args.check else plan(args)
    except (DualLoopError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    if args.json:
        Path(args.json).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

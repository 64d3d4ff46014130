"""Account for every key of a real-size Sa2VA checkpoint without its weights.

    python scripts/check_keys.py KEYS.json [--config sa2va_4b_full]

KEYS.json: ``{"keys": {name: {"shape": [...]}}, "trainable": [names], "trimmed_state_dict": [names]}``. The model of the
config is built on the meta device; each key must be used once or dropped for a stated reason, each parameter filled,
and the map backwards must give the same names and shapes. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch

from dual_loop.checkpoint.importer import match_keys
from dual_loop.checkpoint.key_rules import ORIGINAL, iterate_export, place
from dual_loop.config import load_config, resolve_config_path
from dual_loop.model.build import build_model
from dual_loop.preflight.dry_run import PlaceholderTokenizer

warnings.filterwarnings("ignore", category=FutureWarning)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("keys", type=Path)
    parser.add_argument("--config", default="sa2va_4b_full")
    args = parser.parse_args()
    begin = time.perf_counter()
    listing = json.loads(args.keys.read_text(encoding="utf-8"))
    shapes = {name: tuple(entry["shape"]) for name, entry in listing["keys"].items()}
    config = load_config(resolve_config_path(args.config))
    tokenizer = PlaceholderTokenizer(int(config.model.text["vocab_size"]))
    model = build_model(config, tokenizer, device="meta")
    problems, dropped, num_filled = match_keys(model, shapes)
    print(f"layout: {ORIGINAL.name}; {len(shapes)} keys, {num_filled} tensors of the model filled")
    for reason, count in dropped.items():
        print(f"dropped: {count} ({reason})")
    problems += inverse_problems(model, shapes, set(listing.get("trainable", ())))
    unknown = sum("unknown key" in problem for problem in problems)
    missing = sum(problem.startswith("missing ") for problem in problems)
    for problem in problems[:20]:
        print(f"  {problem}")
    accounted = len(shapes) - unknown
    print(f"{accounted} of {len(shapes)} keys accounted for, {unknown} unknown, {missing} missing", end="")
    print(f", {len(problems)} problems in all; {time.perf_counter() - begin:.1f} s")
    return 1 if problems else 0


def inverse_problems(model: torch.nn.Module, shapes: dict[str, tuple[int, ...]], trainable: set[str]) -> list[str]:
    """Compare the map backwards with the listing: names, shapes, and which names train."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("new_token_rows.")}
    back = dict(iterate_export(state.items(), ORIGINAL))
    kept = {name for name in shapes if place(name, ORIGINAL) not in (None,) and not place(name, ORIGINAL)[1]}
    problems = [f"backwards: {name} is not written" for name in sorted(kept - back.keys())]
    problems += [f"backwards: {name} is no key of the original" for name in sorted(back.keys() - kept)]
    problems += [
        f"backwards: {name} has shape {tuple(back[name].shape)}, the original {shapes[name]}"
        for name in sorted(kept & back.keys())
        if tuple(back[name].shape) != shapes[name]
    ]
    same = len(kept & back.keys())
    print(f"backwards: {same} of {len(kept)} kept names, the same shapes; {len(trainable & back.keys())} of ", end="")
    print(f"{len(trainable)} trainable names among them")
    return problems + [f"backwards: trainable {name} is not written" for name in sorted(trainable - back.keys())]


if __name__ == "__main__":
    sys.exit(main())

"""One whole optimiser step of the real 4B configuration on a CPU, with what it took. Run by ``scripts/dry_run_4b.sh``.

Generated frame pairs, a tokenizer of the real size and random weights go through the normal training entry, in a
process of its own. Its printed lines give the seconds of each phase, the kernel its peak memory, and the checkpoint it
writes shows which parameters moved:

* the weight average starts as a copy of the parameters, so after one update with decay d it is
  ``d * before + (1 - d) * after``: the change of every value is ``(average - after) / d``, without a second copy;
* weight decay alone changes a value by ``rate * decay * |value|``. A tensor has *moved* when some value changed by more
  than twice that and what rounding to float32 can add: then a gradient reached it.

LoRA B is zero in a new adapter, and then LoRA A has no gradient in the first step. A run from Sa2VA's weights has
trained adapters, so B is drawn at random here (``--lora_b zero`` leaves it as it is).

Two kinds of tensors of the mask decoder are counted apart, because one step cannot move them. SAM 2 writes three
candidates of a mask and the loss sees the chosen one: with one region, the small networks that belong to the other two
have no gradient. And a bias of attention keys adds the same to every score of a query, which the softmax takes away
again: its gradient is zero but for rounding.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TINY_TOKENIZER = ROOT / "dual_loop" / "assets" / "tiny" / "tokenizer.json"
GIB = 2**30
ENTRY_FLAG = "--run-entry"
FLOAT32_EPSILON = 2.0**-23
LORA_B_STD = 0.02
CANDIDATE_NETWORKS = "mask_decoder.output_hypernetworks_mlps."

# Ids of the released InternVL2.5-4B vocabulary, seen from its end: text, <|endoftext|>, special tokens, the image's own
# three, and six more. The five tokens of Sa2VA follow; build_tokenizer appends them, as it does for the real files.
NUM_AFTER_END_OF_TEXT, NUM_AFTER_CONTEXT, NUM_NEW = 30, 6, 5

# A line of the run that starts so ends the phase named beside it.
PHASE_ENDS = (
    ("Building VideoLLaVASAMModel", "start: imports, run folder"),
    ("✓ Model built", "build: tokenizer, 3.7 B random weights"),
    ("✓ Dataloader created", "open the data"),
    ("Epoch 1/", "optimiser state, weight average"),
    ("loss=", "the optimiser step"),
    ("Done:", "panels, checkpoint, summary"),
)


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` of the base model's size, with its special tokens.

    The words of the package's tiny tokenizer are joined pair by pair, each pair with the merge that makes it, until the
    vocabulary is full. So every id has a text, and a caption of random ids is about as long when it is read again.

    Args:
        vocab_size: of the model's table, the five tokens of Sa2VA included (151,679): the files lack these five.
    """
    from dual_loop.model.prompts import IMAGE_CONTEXT, IMAGE_END, IMAGE_START

    tokenizer = json.loads(TINY_TOKENIZER.read_text(encoding="utf-8"))
    pattern = next(item for item in tokenizer["added_tokens"] if item["content"] == IMAGE_CONTEXT)
    num_base = vocab_size - NUM_NEW
    first_special = num_base - NUM_AFTER_END_OF_TEXT - 1
    add_pairs(tokenizer["model"]["vocab"], tokenizer["model"]["merges"], first_special)
    names = [f"<|extra_{index}|>" for index in range(NUM_AFTER_END_OF_TEXT + 1)]
    names[0] = "<|endoftext|>"
    context = len(names) - 1 - NUM_AFTER_CONTEXT
    names[context - 2 : context + 1] = [IMAGE_START, IMAGE_END, IMAGE_CONTEXT]
    tokenizer["added_tokens"] = [
        {**pattern, "id": first_special + index, "content": name} for index, name in enumerate(names)
    ]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[0], "pad_token": names[0]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def add_pairs(vocab: dict[str, int], merges: list[list[str]], size: int) -> None:
    """Add joined pairs of the tokens in ``vocab``, readable ones first, with their merges, until it holds ``size``."""
    # In this alphabet a leading blank is written as the one letter below that is not ASCII.
    words = sorted(vocab, key=lambda token: (not token.replace("\u0120", "").isascii(), vocab[token]))
    for first, second in itertools.product(words, words):
        if len(vocab) >= size:
            return
        if first + second not in vocab:
            vocab[first + second] = len(vocab)
            merges.append([first, second])
    raise ValueError(f"{len(words)} tokens give {len(vocab)} with their pairs, fewer than {size}")


# ---- the run ---------------------------------------------------------------------------------------------------------


def run_entry(arguments: Sequence[str], lora_b: str) -> int:
    """Run the training entry in this process; its model's weights are drawn anew in two places once it is built."""
    import importlib

    entry: Any = importlib.import_module("dual_loop.train_dual_loop")
    setup: Any = importlib.import_module("dual_loop.training.setup")
    build = setup.build_to_load

    def build_and_draw(*args: Any, **options: Any) -> Any:
        model, tokenizer = build(*args, **options)
        draw_weights(model, lora_b)
        return model, tokenizer

    setup.build_to_load = build_and_draw
    return int(entry.main(arguments))


def draw_weights(model: Any, lora_b: str) -> None:
    """Draw LoRA B (unless ``"zero"``), and the mask decoder's matrices with the variance 1 / fan-in.

    Trained ones have scales like these. With those of transformers (0.02 everywhere) the decoder's attention is so flat
    that gradients of its queries and keys are below the epsilon of Adam.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name and lora_b == "random":
                parameter.normal_(std=LORA_B_STD)
            elif ".mask_decoder." in name and parameter.dim() >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)


@dataclass
class Phases:
    """Seconds by phase, read off the lines that the run prints."""

    start: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = self.start

    def see(self, line: str, now: float) -> None:
        """End a phase where ``line`` says so; each phase ends once."""
        for prefix, name in PHASE_ENDS:
            if line.startswith(prefix) and name not in self.seconds:
                self.seconds[name] = now - self._last
                self._last = now


@dataclass(frozen=True)
class Ended:
    """How the run ended: exit status, phases, and the most resident memory in bytes, as the kernel counted it."""

    status: int
    phases: Phases
    peak_bytes: int


def run_step(arguments: Sequence[str], lora_b: str, environment: Mapping[str, str]) -> Ended:
    """Start the training entry as a process of its own, pass its lines on, and wait for it."""
    command = [sys.executable, str(Path(__file__).resolve()), ENTRY_FLAG, lora_b, *arguments]
    print("python -m dual_loop.train_dual_loop", *arguments, flush=True)
    phases = Phases()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdout is not None  # it was asked for
    for line in process.stdout:
        phases.see(line, time.monotonic())
        print(f"  | {line}", end="", flush=True)
    # wait4 gives the memory of this process alone, and counts to its very end.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(process.returncode, phases, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


# ---- what moved ------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """What became of the trained tensors of one group.

    Attributes:
        names: all of them.
        still: those that did not move, by name. not_finite: those that hold an infinity or no number.
        unreached: those that no gradient of this step could move (see the module's text); they are not in ``still``.
        num_values: values in all tensors.
        largest_change: of any value.
    """

    names: list[str] = field(default_factory=list)
    still: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    num_values: int = 0
    largest_change: float = 0.0

    def __str__(self) -> str:
        expected = len(self.names) - len(self.unreached)
        return f"{expected - len(self.still)}/{expected}"


def moved_groups(checkpoint: Path, average_decay: float, rate: float, decay: float, lora_b: str) -> dict[str, Group]:
    """Compare every trained tensor of a step-1 checkpoint with its average, one tensor at a time.

    Args:
        checkpoint: folder of the checkpoint.
        average_decay: decay of the average's first update.
        rate: learning rate of the step. decay: weight decay of the step.
        lora_b: ``"zero"`` where LoRA A cannot have had a gradient.
    """
    from safetensors import safe_open

    from dual_loop.model.adapters import group_of

    groups: dict[str, Group] = {}
    slack = 2 * rate * decay + FLOAT32_EPSILON / average_decay
    with (
        safe_open(checkpoint / "model.safetensors", framework="pt") as after,
        safe_open(checkpoint / "ema.safetensors", framework="pt") as average,
    ):
        for name in sorted(after.keys()):
            group = groups.setdefault(group_of(name) or "other", Group())
            value = after.get_tensor(name)
            change = (average.get_tensor(name) - value).abs() / average_decay
            group.names.append(name)
            group.num_values += value.numel()
            if not (change.isfinite().all() and value.isfinite().all()):
                group.not_finite.append(name)
                continue
            group.largest_change = max(group.largest_change, change.max().item())
            if not (change > value.abs() * slack).any():
                group.still.append(name)
    for group in groups.values():
        group.unreached = unreached_tensors(group, lora_b)
        group.still = [name for name in group.still if name not in group.unreached]
    return groups


def unreached_tensors(group: Group, lora_b: str) -> list[str]:
    """Return the tensors of ``group`` that no gradient of this step could move (see the module's text).

    LoRA A where B is zero; biases of keys; and the networks of mask candidates that were not chosen: such a network
    stood still as a whole, while at least one other moved as a whole.
    """
    unreached = [
        name for name in group.names if name.endswith(".k_proj.bias") or (lora_b == "zero" and ".lora_A." in name)
    ]
    candidates: dict[str, list[str]] = {}
    for name in group.names:
        if CANDIDATE_NETWORKS in name:
            candidates.setdefault(name.split(CANDIDATE_NETWORKS)[1].split(".")[0], []).append(name)
    num_still = {index: sum(name in group.still for name in names) for index, names in candidates.items()}
    if any(count == 0 for count in num_still.values()):
        for index, names in candidates.items():
            if num_still[index] == len(names):
                unreached += names
    return unreached


# ---- the report ------------------------------------------------------------------------------------------------------


def phase_lines(phases: Mapping[str, float], record: Mapping[str, Any], total: float) -> Iterator[str]:
    """Yield the table of seconds; the step itself is split as the trainer timed it."""
    names = {
        "data": "read one frame pair",
        "rollout": "step 1: vision tower, caption",
        "forward": "steps 2 and 3: segment, loss",
        "backward": "backward",
        "optimiser": "clip, AdamW, weight average",
    }
    yield f"{'phase':<44}{'seconds':>8}"
    for name, seconds in phases.items():
        yield f"{name:<44}{seconds:>8.1f}"
        if name == "the optimiser step":
            yield from (f"  {label:<42}{record['seconds'][key]:>8.1f}" for key, label in names.items())
    yield f"{'total':<44}{total:>8.1f}"


def step_problems(record: Mapping[str, Any], max_new_tokens: int) -> list[str]:
    """Return what is wrong with the record of the step: nothing was captioned, or a number is not finite."""
    problems = []
    tokens = record.get("caption_tokens")
    if tokens is None or not 1 <= tokens <= max_new_tokens:
        problems.append(f"step 1 generated {tokens} tokens, expected 1 to {max_new_tokens}")
    for name in ("loss", "mask_loss", "dice_loss", "llm_loss", "grad_norm"):
        value = record[name]
        if value is None or not math.isfinite(value) or value <= 0:
            problems.append(f"{name} is {value}, expected a positive number")
    return problems


def group_problems(groups: Mapping[str, Group], expected: Sequence[str]) -> list[str]:
    """Return which groups are missing, stood still, or are not finite."""
    problems = [f"{name}: no trained tensor" for name in expected if name not in groups]
    for name, group in groups.items():
        if group.not_finite:
            problems.append(f"{name}: {len(group.not_finite)} tensors not finite, such as {group.not_finite[0]}")
        if group.still:
            problems.append(f"{name}: {len(group.still)} tensors did not move, such as {group.still[0]}")
    return problems


def machine() -> str:
    """Return processor, cores, memory and torch of this machine."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line.split(":")[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    import torch

    from dual_loop.training.devices import available_cores

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return f"{model}, {available_cores()} cores, {memory:.1f} GiB; torch {torch.__version__}"


def commit() -> str:
    """Return the commit of this checkout, and whether its files differ from it."""

    if shutil.which("git") is None:
        return "unknown"

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return head + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One optimiser step of the real 4B configuration on a CPU.")
    parser.add_argument("--config", default="configs/sa2va_4b_cpu.py", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--limit_gib", type=float, default=20.0, metavar="GIB", help="most memory (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=16, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument(
        "--lora_b",
        choices=("random", "zero"),
        default="random",
        help="random (default): as after training, so that LoRA A has a gradient too; zero: as in a new adapter",
    )
    parser.add_argument("--folder", metavar="DIR", help="keep data, run folder and checkpoint here (else deleted)")
    return parser.parse_args(argv)


def training_arguments(args: argparse.Namespace, folder: Path) -> list[str]:
    """Return the flags of the training entry."""
    return [
        *("--config", args.config, "--max_steps", "1", "--batch_size", "1", "--gradient_accumulation_steps", "1"),
        *("--sav_dir", str(folder / "data" / "sav"), "--model_path", str(folder / "tokenizer")),
        *("--output_dir", str(folder / "run"), "--device", "cpu"),
        *("--cfg-options", f"loop.max_new_tokens={args.max_new_tokens}", f"data.index_dir={folder / 'index'}"),
        "train.allow_emulated_bf16=True",
    ]


def dry_run(args: argparse.Namespace, folder: Path) -> list[str]:
    """Make data and tokenizer in ``folder``, take the step, print the report; return what was wrong."""
    from dual_loop.config import load_config, resolve_config_path
    from dual_loop.testing.demo_data import write_demo_data

    start = time.monotonic()
    config = load_config(resolve_config_path(args.config), {"loop.max_new_tokens": args.max_new_tokens})
    # Frame pairs have no text of their own: every one of them needs a caption.
    write_demo_data(folder / "data", num_images=4, num_val=0, sources=("sav",))
    write_tokenizer(folder / "tokenizer", int(config.model.text["vocab_size"]))
    ended = run_step(training_arguments(args, folder), args.lora_b, {"HF_HUB_OFFLINE": "1"})
    if ended.status:
        return [f"the training entry ended with status {ended.status}"]
    run = folder / "run"
    record = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    # The weight average warms up from 1 / 10 (model.ema).
    average_decay = min(config.train.ema_decay, 0.1)
    groups = moved_groups(
        run / "checkpoints" / "step_00000001", average_decay, record["lr"], config.train.weight_decay, args.lora_b
    )
    peak = ended.peak_bytes / GIB
    print_report(ended.phases.seconds, record, time.monotonic() - start, groups)
    print(f"peak RSS {peak:.1f} GiB (limit {args.limit_gib:g})")
    print(f"trainable groups moved: {', '.join(f'{name} {group}' for name, group in groups.items())}", flush=True)
    problems = step_problems(record, args.max_new_tokens) + group_problems(groups, config.model.trainable)
    return problems + ([f"peak RSS {peak:.1f} GiB is over the limit"] if peak > args.limit_gib else [])


def print_report(
    phases: Mapping[str, float], record: Mapping[str, Any], total: float, groups: Mapping[str, Group]
) -> None:
    """Print where it ran, the seconds, the numbers of the step, and the largest change of each group."""
    print(f"\ncommit {commit()}\nmachine {machine()}\n")
    print("\n".join(phase_lines(phases, record, total)))
    numbers = ", ".join(f"{name} {record[name]:.3f}" for name in ("mask_loss", "dice_loss", "llm_loss", "grad_norm"))
    rejected = record["counters"]["caption/rejected"]
    print(f"\n{numbers}")
    print(f"step 1: {record['caption_tokens']:.0f} new tokens, {rejected} rejected; step 2: {record['tokens']:.0f}")
    for name, group in groups.items():
        print(f"{name}: {len(group.names)} tensors, {group.num_values:,} values, changed by {group.largest_change:.1e}")
        if group.unreached:
            print(f"  {len(group.unreached)} of them not counted below: no gradient of this step could move them")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when the step fits the limit and every group moved, 1 when not."""
    args = parse_arguments(argv)
    if args.folder:
        problems = dry_run(args, Path(args.folder).resolve())
    else:
        # Not in the system's folder for such things, which may be held in memory: the checkpoint has 4 GiB.
        (ROOT / "outputs").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="dry_run_4b_", dir=ROOT / "outputs") as name:
            problems = dry_run(args, Path(name))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_entry(sys.argv[3:], sys.argv[2]) if sys.argv[1:2] == [ENTRY_FLAG] else main())

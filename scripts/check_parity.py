"""Compare this package with recorded inputs and outputs of the original Sa2VA, number by number.

    python scripts/check_parity.py DIR [--mixed_precision auto|no|bf16] [--threads 2] [--all]

DIR holds ``config.json``, ``checkpoint_full.pth``, ``checkpoint_trainable.pth``, ``inputs.safetensors``,
``inputs.json``, ``outputs.safetensors``, ``outputs.json`` and the tokenizer and image files; ``keys.json`` is optional.
The architecture is rebuilt from ``config.json``, whatever its sizes. Everything in ``outputs.safetensors`` is compared
but the video clip (names that begin with ``clip_``); an output that no check knows is a failure. All checks run twice:
on the full checkpoint, and on the trained part over a base. Exit status 1 if any comparison fails.

A set whose ``dtype`` is bfloat16 runs in bfloat16 autocast, as in training; with ``--mixed_precision bf16`` every set
does. A tensor may then be 3 % off in its root mean square, a loss 0.5 %, a parameter's gradient 30 %, the norm of a
group's 10 %; two pixels of a hundred may change sides, and a text may part where two tokens are about as likely. What
arithmetic alone adds to a gradient is far less, and held by ``tests/golden/test_bf16_gradients.py``.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# The same rounding on every processor (MKL's conditional numerical reproducibility). In the recorded case a value lies
# so close to a kink that MKL's kernels for Intel, and float64, give three tensors of gradients 2.1e-4 away from the
# recorded ones. MKL reads this when torch is loaded.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import torch

from dual_loop.model.sa2va_api import VideoLLaVASAMModel

from parity.case import FULL, TRAINABLE, Case, load_case
from parity.data_checks import check_data
from parity.loss_checks import GROUP_NORMS, NONE_LIST, NORMS, VARIANTS, check_losses
from parity.model_checks import (
    check_caption,
    check_grounding,
    check_language,
    check_object_order,
    check_predict,
    encode_once,
    segment,
)
from parity.report import Report
from parity.weights import import_full, import_trainable

KNOWN_RESULTS = {
    *("losses", NONE_LIST, "iou_argmax_margin_min", "greedy_margin_min", "caption_generated_text"),
    *(prefix + variant for prefix in (NORMS, GROUP_NORMS) for variant in VARIANTS),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="reference inputs and outputs")
    precisions = ("auto", "no", "bf16")
    parser.add_argument("--mixed_precision", default="auto", choices=precisions, help="as for training (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="print every row, not only the worst of a group")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(args.threads)
    begin = time.perf_counter()
    print(machine(), flush=True)
    case = load_case(args.folder, args.mixed_precision)
    report = run(case, Report(verbose=args.all, is_half=case.is_half))
    print(f"\n{time.perf_counter() - begin:.0f} s\n{report.summary()}")
    return 1 if report.num_failed else 0


def run(case: Case, report: Report) -> Report:
    """Run all checks of one reference set."""
    with failing(report, "pre-processing"):
        check_data(case, report)
    report.section(f"weights: {FULL}")
    full = import_full(case, report)
    with failing(report, FULL):
        check_model(case, full, report)
    if not (case.folder / TRAINABLE).is_file():
        report.failed(TRAINABLE, "not there")
        return report
    report.section(f"weights: {TRAINABLE} over a base whose trained part is random")
    with failing(report, TRAINABLE):
        check_model(case, import_trainable(case, full, report), report)
    return report


@contextmanager
def failing(report: Report, name: str) -> Iterator[None]:
    """Count an error inside as a failure, with its traceback printed, so that the other checks still run."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        report.failed(name, f"{type(error).__name__}: {error}")


def check_model(case: Case, model: VideoLLaVASAMModel, report: Report) -> None:
    """Run every check of the model; outputs that none of them asked for are failures."""
    case.begin()
    model.train()
    encode_once(model)
    with case.autocast():
        check_language(case, model, report)
        order = check_object_order(case, model, report)
        segmentation = segment(case, model)
        check_grounding(case, model, report, segmentation, order)
        check_caption(case, model, report)
        check_predict(case, model, report, segmentation)
    check_losses(case, model, report, order)
    clips = sorted(name for name in case.unchecked if name.startswith("clip_"))
    print("\nnot compared:", ", ".join([*clips, *sorted(case.results.keys() - KNOWN_RESULTS)]) or "nothing")
    for name in sorted(case.unchecked - set(clips)):
        report.failed(name, "no check is known for this output")


def machine() -> str:
    """Return processor, threads, versions and commit."""
    import peft
    import transformers

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        cpu = next((line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), cpu)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    threads = f"{torch.get_num_threads()} threads"
    return f"{cpu}, {threads}; {versions}, peft {peft.__version__}; commit {commit()}"


def commit() -> str:
    """Return the commit of this checkout, and whether its files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return head + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


if __name__ == "__main__":
    sys.exit(main())

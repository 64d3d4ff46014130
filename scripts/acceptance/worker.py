"""Runs the sections that it is told to, one a line, and answers in JSON lines whatever they find as they find it."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import traceback
from importlib import import_module

import torch
from accelerate.state import AcceleratorState, GradientState

from acceptance.found import Asked, Found


def release() -> None:
    """Give back what a model held, and forget the device and precision of the last accelerator."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    # Lines that the package prints go to the log with the warnings.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.getLogger("dual_loop").setLevel(logging.ERROR)

    def answer(kind: str, found: Found) -> None:
        print(json.dumps({kind: found.to_dict()}), file=answers, flush=True)

    for line in sys.stdin:
        asked = Asked(**json.loads(line))
        found = Found(changed=lambda found: answer("found", found))
        try:
            import_module(f"acceptance.{asked.section}").run(asked, found)
        except Exception:
            found.error = traceback.format_exc()
        release()
        answer("done", found)


if __name__ == "__main__":
    main()

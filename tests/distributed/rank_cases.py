"""One rank that goes through several command lines in one process: ``python rank_cases.py CASES.json OUT.json``.

A case is ``{"arguments": [[of rank 0], [of rank 1]], "folders": [where each is started]}``; the answer for each is
``[status, seconds, standard error]``. A rank that would end the process ends the case.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.state import AcceleratorState

from dual_loop.commands.train import main as train
from dual_loop.training import ranks

RANK = int(os.environ["RANK"])


def end_case(self: ranks.Ranks, status: int) -> NoReturn:
    self._closing.set()
    raise SystemExit(status)


def run(case: dict[str, list[list[str]]]) -> tuple[int, float, str]:
    start, errors = time.monotonic(), io.StringIO()
    os.chdir(case["folders"][RANK])
    version = importlib.metadata.version
    if "version" in case and RANK:
        importlib.metadata.version = lambda name: "0.0.1" if name == case["version"] else version(name)
    with contextlib.redirect_stderr(errors):
        try:
            status = train(case["arguments"][RANK])
        except SystemExit as end:
            status = int(end.code or 0)
    seconds = time.monotonic() - start
    importlib.metadata.version = version
    # Neither rank goes on before the other is here. The process group is kept, all else begins anew.
    ranks._ranks = None
    torch.distributed.barrier()
    AcceleratorState._reset_state(reset_partial_state=True)
    return status, seconds, errors.getvalue()


if __name__ == "__main__":
    ranks.Ranks._exit = end_case  # type: ignore[method-assign]
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    out.write_text(json.dumps({name: run(case) for name, case in cases.items()}))

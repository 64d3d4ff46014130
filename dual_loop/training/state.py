"""What a checkpoint keeps of a run, and how it comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dual_loop.checkpoint.store import RunCheckpoint, find_latest, load_run_checkpoint
from dual_loop.errors import CheckpointError, explain
from dual_loop.model.shards import place_like
from dual_loop.training.metrics_log import CounterLedger


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimiser steps done.
        seconds: spent in optimiser steps, over all starts of the run.
        samples: samples consumed by source, over all ranks.
        counters: cumulative counters of the loop.
    """

    step: int = 0
    seconds: float = 0.0
    samples: dict[str, int] = field(default_factory=dict)
    counters: CounterLedger = field(default_factory=CounterLedger)

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        counters = dict(self.counters.counters)
        return {"step": self.step, "seconds": self.seconds, "samples": dict(self.samples), "counters": counters}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        return cls(state["step"], state["seconds"], dict(state["samples"]), CounterLedger(state["counters"]))


def find_checkpoint(resume: str | None, output_dir: str | Path) -> Path | None:
    """Return the checkpoint that ``--resume`` means, None for a fresh start.

    Args:
        resume: None, ``"auto"`` (the newest whole one in ``output_dir``, None if there is none), or a path of a
            checkpoint or of a run folder.

    Raises:
        CheckpointError: a path was given and no whole checkpoint is there.
    """
    if resume is None:
        return None
    if resume == "auto":
        return find_latest(output_dir)
    path = Path(resume)
    found = path if (path / "manifest.json").is_file() else find_latest(path)
    if found is None:
        raise CheckpointError(
            explain(
                "no whole checkpoint to resume from",
                where=resume,
                expected="a folder step_* with a manifest, or a run folder that has one",
                fix="check the path, or use --resume auto to start afresh where there is none",
            )
        )
    return found


def load_checkpoint(path: Path, rank: int, world_size: int) -> RunCheckpoint:
    """Read and verify one checkpoint for this rank."""
    return load_run_checkpoint(path, rank=rank, world_size=world_size)


@torch.no_grad()
def fill_parameters(parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy saved tensors into the trainable parameters; names and shapes must be the same.

    Raises:
        CheckpointError: they differ; nothing was copied.
    """
    missing, unexpected = sorted(parameters.keys() - tensors), sorted(tensors.keys() - parameters)
    wrong = [n for n, p in parameters.items() if n in tensors and tensors[n].shape != p.shape]
    if missing or unexpected or wrong:
        seen = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} of another shape"
        raise CheckpointError(
            explain(
                "the checkpoint does not fit the trainable parameters",
                where=", ".join([*missing, *unexpected, *wrong][:5]),
                seen=seen,
                expected=f"{len(parameters)} tensors",
                fix="resume with the model settings of the saved run (model.trainable, --lora_r, --train_embeddings)",
            )
        )
    for name, parameter in parameters.items():
        parameter.copy_(place_like(tensors[name], parameter))

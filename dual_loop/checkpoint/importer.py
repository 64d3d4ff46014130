"""Weights from a file into the model: strict about names and shapes, silent about nothing.

This module reads the package's own key layout (``model.state_dict()`` names in one safetensors file), which is what the
tiny checkpoint and ``scripts/pretrain_tiny.sh`` write.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dual_loop.errors import CheckpointError, explain

FRESH = (".lora_A.", ".lora_B.", "new_token_rows.")
"""Adapters start fresh where a file does not bring them; LoRA B is zero then, so they change nothing."""


@dataclass(frozen=True)
class WeightReport:
    """What was loaded: the file, how many tensors and values, and which adapters start fresh."""

    path: str
    num_tensors: int
    num_values: int
    num_fresh: int

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.num_tensors} tensors, {self.num_values:,} values; "
            f"{self.num_fresh} adapter tensors start fresh"
        )


def load_weights(model: nn.Module, path: str | Path) -> WeightReport:
    """Copy the tensors of a safetensors file into ``model``, keeping each parameter's dtype.

    Raises:
        CheckpointError: the file is missing or unreadable, a key is unknown or missing, or a shape differs.
    """
    tensors = _read(Path(path))
    own = dict(model.state_dict())
    problems = [_unknown(name, own) for name in tensors if name not in own]
    problems += [
        f"{name}: shape {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in tensors
        if name in own and tensors[name].shape != own[name].shape
    ]
    absent = [name for name in own if name not in tensors]
    problems += [f"missing {name}" for name in absent if not any(part in name for part in FRESH)]
    if problems:
        shown = "\n  ".join(problems[:10]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise CheckpointError(
            explain(
                f"weights do not fit the model, {len(problems)} problem(s):\n  {shown}\n",
                where=str(path),
                fix="use the config that the weights were made for",
            )
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    whole = cast(Any, model)
    rows = getattr(model, "new_token_rows", None)
    if rows is not None and "new_token_rows.input_rows" in absent:
        rows.read_tables(whole.mllm.get_input_embeddings(), whole.mllm.lm_head)
    values = sum(tensor.numel() for tensor in tensors.values())
    return WeightReport(str(path), len(tensors), values, len(absent))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(
            explain("weights not found", str(path), expected="a .safetensors file", fix="check the path")
        )
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            explain(
                "weights cannot be read", str(path), str(error), "a .safetensors file in this package's key layout"
            )
        ) from error


def _unknown(name: str, own: dict[str, Tensor]) -> str:
    close = difflib.get_close_matches(name, list(own), n=1)
    return f"unknown key {name}" + (f" (nearest: {close[0]})" if close else "")

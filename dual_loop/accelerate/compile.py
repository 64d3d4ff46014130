"""``speed.compile``: torch.compile for each decoder layer of step 2; rows of any length share a graph.

The layers run one code, so that they share graphs; lengths are symbolic, else every new row length would be compiled.
Decoding has a step of its own (``accelerate.qwen2``) and is not compiled. The log shows ``compile/graphs``, the graphs
made so far: a number that goes on growing means that something besides the length changes from step to step.
"""

from __future__ import annotations

from functools import partial

import torch

from dual_loop.config import Config
from dual_loop.model.sa2va import Sa2VA


def apply(model: Sa2VA, config: Config) -> None:
    """Compile the layers once they are on their device."""
    model.after_loading.append(partial(compile_layers, model))


def compile_layers(model: Sa2VA, device: torch.device) -> str:
    """Let every decoder layer be compiled at its first pass; return the line that says so."""
    layers = list(model.mllm.model.language_model.layers)
    for layer in layers:
        layer.compile(dynamic=True)
    return f"Compiling {len(layers)} decoder layers at their first pass"

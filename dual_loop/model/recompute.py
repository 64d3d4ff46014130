"""Which decoder layers recompute their activations: such a layer keeps its input alone until the backward pass.

Values and gradients are the same either way; how many layers the memory asks for is decided in ``training.memory``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from dual_loop.config import Config


def requested_layers(config: Config, num_layers: int) -> int | None:
    """Return how many layers the configuration wants recomputed; None where it leaves that to the memory there is.

    ``model.gradient_checkpointing = False`` means none, whatever ``speed.checkpoint_layers`` says.
    """
    choice = config.speed.checkpoint_layers
    if not config.model.gradient_checkpointing or choice == "none":
        return 0
    if choice == "auto":
        return None
    return num_layers if choice == "all" else min(int(choice), num_layers)


def checkpoint_first(model: Any, count: int) -> None:
    """Let the first ``count`` decoder layers recompute their activations, and no other.

    The first ones, because the backward pass reaches them last: by then the others have let their activations go, so
    the one that is recomputed adds nothing to the peak. A vision tower that trains recomputes where any layer does.

    Args:
        model: a ``VideoLLaVASAMModel``.
        count: 0 to the number of layers.
    """
    tower = model.mllm.model.vision_tower
    trains = any(parameter.requires_grad for parameter in tower.parameters())
    layers = [(layer, index < count) for index, layer in enumerate(model.mllm.model.language_model.layers)]
    layers += [(m, trains and count > 0) for m in tower.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer, is_on in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = is_on

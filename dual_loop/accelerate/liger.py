"""Liger's Triton kernels (``speed.liger``): norms, SwiGLU, rotary embedding, cross-entropy fused with the head.

They replace forward methods of transformers' native classes, so adapters stay inside: the patched SwiGLU calls
``gate_proj``, ``up_proj`` and ``down_proj`` as modules, and packed rows bring their own positions to the patched rotary
embedding. The fused cross-entropy wants the head's matrix itself, so it is used only where the head is a plain linear
layer: with trained rows of new tokens logits are not that product. The extra ``liger`` installs the package (version
0.8.5 was read and tried).

Triton runs on GPUs; with TRITON_INTERPRET=1 its interpreter runs the same kernels on a CPU, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dual_loop.config import Config
from dual_loop.errors import EnvironmentProblem, explain
from dual_loop.losses import IGNORE_INDEX
from dual_loop.model.hardware import why_no_liger
from dual_loop.model.sa2va import Sa2VA

KERNELS = ("norms", "swiglu", "rope")

FusedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Matrix (V, D), hidden states (P, D), labels (P,) -> the cross-entropy summed over labels that are not -100."""


def apply(model: Sa2VA, config: Config) -> None:
    """Let the kernels be put in place once the device is known."""
    model.after_loading.append(partial(apply_liger, model))


def apply_liger(model: Sa2VA, device: torch.device | str, kernels: Sequence[str] = KERNELS) -> str:
    """Let ``model`` use Liger's kernels, in place; return a line that says which.

    Args:
        model: built and loaded.
        device: where it will run.
        kernels: which of :data:`KERNELS` are replaced (Triton's interpreter runs ``rope`` alone).

    Raises:
        EnvironmentProblem: a package or a GPU is missing.
    """
    missing = why_no_liger(torch.device(device).type)
    if missing is not None:
        fix = 'pip install "dual-loop[liger]" on a machine with a GPU, or speed.liger=False'
        raise EnvironmentProblem(explain("Liger's kernels cannot be used", "speed.liger", missing, fix=fix))
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    from liger_kernel.transformers.monkey_patch import apply_liger_kernel_to_internvl

    # Its fused forward would replace the model's; this package computes the loss itself.
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    norms = dict.fromkeys(("rms_norm", "layer_norm"), "norms" in kernels)
    apply_liger_kernel_to_internvl(
        model=model.mllm, **losses, **norms, rope="rope" in kernels, swiglu="swiglu" in kernels
    )
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum")
    reason = use_fused_loss(model, loss)
    fused = "fused with the head" if reason is None else f"not fused: {reason}"
    return f"Liger: {', '.join(kernels)}; cross-entropy {fused}"


def use_fused_loss(model: Sa2VA, loss: FusedLoss) -> str | None:
    """Let the model's ``token_loss`` go through ``loss``; return why the head does not allow it, None where it does."""
    head = model.mllm.lm_head
    if model.new_token_rows is not None:
        return "the head has trained rows of new tokens (model.train_embeddings)"
    if type(head) is not nn.Linear or head.bias is not None:
        return f"the head is a {type(head).__name__}"
    setattr(model, "token_loss", partial(fused_token_cross_entropy, loss, head.weight))  # noqa: B010
    return None


def fused_token_cross_entropy(fused: FusedLoss, matrix: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, summed, of tokens (P,) by a function that makes the logits itself; of none a zero with graph."""
    return fused(matrix, hidden.to(matrix.dtype), labels) if len(hidden) else hidden.sum() * 0.0

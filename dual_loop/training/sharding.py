"""FSDP2 for the language model: each rank keeps a part of every decoder layer and gathers a layer while it runs.

Only the decoder layers are sharded (``fully_shard``, one unit a layer); they are what is too large. All else that
trains, the mask decoder, the projectors and new token rows, is small and stays in DDP, which is told to leave the
shards alone. A layer holds frozen bfloat16 matrices and trained float32 adapters; only the latter have gradients, so a
unit reduces one dtype. Both exchanges average over ranks, so the trainer's scale is the same as with DDP alone, and a
run may be saved with one and resumed with the other.

accelerate 1.15 starts FSDP on accelerators alone and quietly runs DDP on a CPU; ``fully_shard`` itself runs on gloo, so
it is called here, and the path that the tests take on two CPU ranks is the path of GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def shard_language_model(accelerator: Accelerator, model: Any) -> int:
    """Shard the decoder layers of ``model`` over all ranks, in place; return how many. Build nothing on them before.

    The rest of the model must be wrapped in DDP afterwards.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    layers = list(model.mllm.model.language_model.layers)
    for layer in layers:
        layer.to(accelerator.device)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # Every pass is a collective: all ranks must take as many as each other, however long their rows are.
    model.group_rows = False
    return len(layers)


class Pace:
    """Lets ranks with unequal work share sharded layers: whoever is done takes part in the others' forward passes.

    A forward pass of a sharded layer is a collective. Inside a ``with`` block each rank says before every pass of the
    language model that it is about to run; at the end of the block a rank answers the others with passes over a single
    token until all are done, and before any other exchange inside the block too (:meth:`settle`). Captions of different
    lengths, numbers of regions or of held-out images are so no matter.

    Args:
        accelerator: whose ranks share the layers.
        model: the unwrapped model.
    """

    def __init__(self, accelerator: Accelerator, model: Any) -> None:
        self.device, self.language = accelerator.device, model.mllm.model.language_model
        self._depth, self._is_answering = 0, False
        self.language.register_forward_pre_hook(self._before)

    def __enter__(self) -> Pace:
        self._depth += 1
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._depth -= 1
        if kind is None and self._depth == 0:
            self.settle()

    def _before(self, module: nn.Module, inputs: Any) -> None:
        if self._depth and not self._is_answering:
            self._num_running(1)

    @torch.no_grad()
    def settle(self) -> None:
        """Answer the other ranks until all of them are here: before a ``with`` block ends, and before any exchange."""
        width, kind = self.language.config.hidden_size, self.language.embed_tokens.weight.dtype
        token = torch.zeros(1, 1, width, device=self.device, dtype=kind)
        self._is_answering = True
        while self._num_running(0):
            self.language(inputs_embeds=token, use_cache=False)
        self._is_answering = False

    def _num_running(self, own: int) -> int:
        count: Tensor = torch.tensor([own], device=self.device)
        torch.distributed.all_reduce(count)
        return int(count)

"""FSDP2 for the language model: each rank keeps a part of every decoder layer and gathers a layer while it runs.

Only the decoder layers are sharded (``fully_shard``, one unit a layer); all else that trains is small and stays in DDP,
which is told to leave the shards alone. Of a layer only float32 adapters have gradients, so a unit reduces one dtype.
Both exchanges average over ranks, so a run may be saved with one and resumed with the other.

accelerate 1.15 runs FSDP on accelerators alone; ``fully_shard`` itself runs on gloo too, so it is called here.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
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
    # In training every pass is a collective: all ranks must take as many, however long their rows are.
    model.group_rows = False
    return len(layers)


class Gathered:
    """Every decoder layer whole on every rank for the length of a ``with`` block; no graph inside.

    A forward pass of a sharded layer is a collective: a caption would gather the language model once a token, and ranks
    with longer captions would wait for passes that the others do not take. Entering is a collective, too; ``model`` is
    the unwrapped one, after :func:`shard_language_model`.
    """

    def __init__(self, model: Any) -> None:
        self.layers: list[Any] = list(model.mllm.model.language_model.layers)
        self._shards: list[Any] = []

    def __enter__(self) -> None:
        for layer in self.layers:
            shards = dict(layer.named_parameters())
            layer.set_reshard_after_forward(False)
            layer.unshard()
            for name, whole in layer.named_parameters():
                shards[name].gathered = whole
            self._shards += shards.values()

    def __exit__(self, *_: object) -> None:
        for shard in self._shards:
            del shard.gathered
        self._shards.clear()
        for layer in self.layers:
            layer.reshard()
            layer.set_reshard_after_forward(True)

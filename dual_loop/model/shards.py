"""Whole tensors from sharded ones and back; for tensors that are not sharded both are the identity."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; every rank must call this for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor``, which every rank holds whole, on the device and in the shards of ``like``."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    placed = tensor.to(device=like.device, dtype=like.dtype)
    # Every rank has the same values already: each takes its part, nothing is sent.
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)

"""Whole tensors from sharded ones and back; for tensors that are not sharded both are the identity."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; every rank must call this for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor`` in the shards and on the device of ``like``, or whole where ``like`` is.

    Every rank holds ``tensor`` whole, or calls this for its shards.
    """
    if not isinstance(like, DTensor):
        return whole(tensor)
    if isinstance(tensor, DTensor):
        return tensor
    placed = tensor.to(device=like.device, dtype=like.dtype)
    # Every rank has the same values already: each takes its part, nothing is sent.
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def in_use(parameter: Tensor) -> Tensor:
    """Return what the model computes with: the whole tensor while its layer is gathered (``sharding.Gathered``)."""
    gathered: Tensor = getattr(parameter, "gathered", parameter)
    return gathered

"""Sharded tensors and whole ones: there and back on a mesh of one rank, and the identity for plain tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dual_loop.model.shards import place_like, whole


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[DTensor]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield distribute_tensor(torch.arange(6.0).view(3, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
    finally:
        distributed.destroy_process_group()


def test_a_whole_tensor_takes_the_shards_and_the_dtype_of_another_and_comes_back(sharded: DTensor) -> None:
    assert torch.equal(whole(sharded), torch.arange(6.0).view(3, 2))
    placed = place_like(torch.ones(3, 2, dtype=torch.float64), sharded)
    assert isinstance(placed, DTensor)
    assert (placed.placements, placed.dtype) == (sharded.placements, torch.float32)
    assert torch.equal(whole(placed), torch.ones(3, 2))
    assert place_like(sharded, sharded) is sharded


def test_plain_tensors_stay_as_they_are() -> None:
    tensor = torch.ones(2)
    assert whole(tensor) is tensor
    assert place_like(tensor, torch.zeros(2)) is tensor

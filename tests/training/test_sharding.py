"""A sharded language model: wrapped as on GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dual_loop.training.devices import wrap_model


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_shards_are_wrapped_where_accelerate_sees_gpus(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        monkeypatch.setitem(state, "distributed_type", DistributedType.MULTI_GPU)
        monkeypatch.setitem(state, "num_processes", 2)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
    wrapped = wrap_model(accelerator, model)
    assert isinstance(wrapped, DistributedDataParallel)
    wrapped(torch.ones(3, 4)).sum().backward()
    assert [isinstance(parameter.grad, DTensor) for parameter in model.parameters()] == [True, True, False, False]

"""A sharded language model: wrapped as on GPUs, and gathered once for many passes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.model.shards import whole
from dual_loop.model.stored_weights import StartingWeights, weights
from dual_loop.training.devices import wrap_model
from dual_loop.training.sharding import Gathered, shard_language_model


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


def test_a_gathered_model_stays_whole_for_many_passes_and_takes_other_weights(group: None) -> None:
    torch.manual_seed(0)
    language = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2)))
    inner = SimpleNamespace(language_model=SimpleNamespace(layers=language))
    model: Any = SimpleNamespace(mllm=SimpleNamespace(model=inner))
    inputs, first = torch.randn(3, 4), {name: p.detach().clone() for name, p in language.named_parameters()}
    expected = language(inputs).detach()
    assert shard_language_model(SimpleNamespace(device=torch.device("cpu"), num_processes=1), model) == 2
    parameters = dict(language.named_parameters())
    average, starting = ExponentialMovingAverage(parameters, 0.5), StartingWeights(parameters, on_disk=True)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(2.0)
    average.update()  # to 2 - d times the first weights
    factor = (2 - 0.1) ** 2
    with torch.no_grad():
        assert torch.equal(language(inputs), 4 * expected)
        for _ in range(2):
            with Gathered(model):
                whole_layers = list(language.parameters())
                for _ in range(3):
                    assert torch.equal(language(inputs), 4 * expected)
                    with weights(starting):
                        assert torch.equal(language(inputs), expected)
                # Nothing was put away after a pass, so nothing had to be gathered for the next.
                assert all(p is one for p, one in zip(language.parameters(), whole_layers, strict=True))
                assert not any(isinstance(p, DTensor) for p in whole_layers)
                with weights(average):
                    torch.testing.assert_close(language(inputs), factor * expected)
                assert torch.equal(language(inputs), 4 * expected)
            with weights(starting):
                assert torch.equal(language(inputs), expected)
    assert all(torch.equal(whole(p), 2 * first[name]) for name, p in language.named_parameters())
    assert all(isinstance(p, DTensor) for p in language.parameters())

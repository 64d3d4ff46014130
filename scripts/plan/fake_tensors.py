"""Run the package's own step on tensors that have a shape and no values, so that the 4B model takes no memory.

Float tensors are torch's fake tensors (``torch._subclasses.fake_tensor``): every operation gives the right shape, dtype
and device and computes nothing. Token ids, masks and positions stay real, since the code reads them: they decide how
long rows are and which positions carry a loss.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN, _DEVICE = torch.ops.aten, torch.ops.prim.device.default
_INDEXING = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default, _ATEN._index_put_impl_.default)
_CPU = torch.device("cpu")


class HollowMode(TorchDispatchMode):
    """Inside it, an operation on a hollow tensor gives a hollow tensor; one on real tensors alone is really done.

    Where the code asks for a number of a hollow tensor (an IoU, a loss), it gets a random one: captions then earn
    different rewards, as in a real run, and all that depends on an advantage takes place. A hollow mask that indexes
    counts as true everywhere.

    Attributes:
        live: bytes of the tensors made inside, of those that still exist; what :meth:`fill` and :meth:`reserve` make
            is not counted.
        owned: ``live`` by owner.
        peak: most live bytes since :meth:`reset_peak`. at_peak: ``owned`` at that moment.

    Args:
        owner: names the owner of bytes that are made now.
    """

    def __init__(self, owner: Callable[[], str] = lambda: "other") -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.random = torch.Generator().manual_seed(0)
        self.owner = owner
        self.live, self.peak = 0, 0
        self.owned: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self._known: set[int] = set()
        self._kept: list[Any] = []  # a storage that is gone would give its id to another

    def fill(self, model: nn.Module) -> None:
        """Make every parameter and buffer of a model on the meta device a hollow one, seemingly on the CPU."""
        made: dict[int, Any] = {}
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, value in table.items():
                    if value is not None:
                        if id(value) not in made:
                            made[id(value)] = self._hollow(value)
                        table[name] = made[id(value)]

    def reserve(self, value: Tensor) -> Tensor:
        """Return a hollow tensor like ``value`` whose bytes are not counted; call it outside the mode."""
        return self._uncounted(torch.empty(value.shape, dtype=value.dtype, device="meta"))

    def reset_peak(self) -> None:
        self.peak, self.at_peak = self.live, dict(self.owned)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # asked for before almost everything else
            return _CPU
        kwargs = kwargs or {}
        if any(isinstance(value, FakeTensor) for value in (*_tensors(args), *_tensors(kwargs.values()))):
            if func is _ATEN._local_scalar_dense.default:
                return self._number(args[0].dtype)
            if func is _ATEN.copy_.default and not isinstance(args[0], FakeTensor):
                return args[0].uniform_(generator=self.random) if args[0].is_floating_point() else args[0]
            if func in _INDEXING:
                args = (args[0], _places(args[1]), *args[2:])
            out = self.fake.__torch_dispatch__(func, types, args, kwargs)
        else:
            out = func(*args, **kwargs)
        for value in _tensors((out,)):
            self._track(value)
        return out

    def _hollow(self, value: Tensor) -> Tensor:
        made = self._uncounted(value.detach())
        return nn.Parameter(made, value.requires_grad) if isinstance(value, nn.Parameter) else made

    def _uncounted(self, meta: Tensor) -> Tensor:
        made: Tensor = FakeTensor(self.fake, meta, _CPU)
        self._kept.append(made.untyped_storage())
        self._known.add(id(self._kept[-1]))
        return made

    def _number(self, dtype: torch.dtype) -> float | int | bool:
        if dtype == torch.bool:
            return True
        return float(torch.rand((), generator=self.random)) if dtype.is_floating_point else 1

    def _track(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key, size, owner = id(storage), storage.nbytes(), self.owner()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._let_go, key, size, owner)
        self.live += size
        self.owned[owner] = self.owned.get(owner, 0) + size
        if self.live > self.peak:
            self.reset_peak()

    def _let_go(self, key: int, size: int, owner: str) -> None:
        self._known.discard(key)
        self.live -= size
        self.owned[owner] -= size


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _places(indices: Any) -> list[Any]:
    """Turn masks among indices into the positions of their true entries; of a hollow one, all are true."""
    places: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            seen = torch.ones(index.shape, dtype=torch.bool) if isinstance(index, FakeTensor) else index
            places += seen.nonzero().unbind(1)
        else:
            places.append(index)
    return places

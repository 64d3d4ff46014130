"""Weights that stand in for the trainable parameters for a while: their average, those of the start, or others."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dual_loop.errors import EnvironmentProblem, explain
from dual_loop.model.shards import in_use, place_like, whole


class StoredWeights:
    """Values for the parameters of a model, which :func:`weights` puts into it for a while.

    Attributes:
        parameters: those that train, by name.
        values: a tensor for each.
        is_lent: whether the model holds them now.
    """

    parameters: Mapping[str, torch.nn.Parameter]
    values: Mapping[str, torch.Tensor]
    is_lent = False

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
        self.parameters, self.values = parameters, values


@contextmanager
def weights(stored: StoredWeights) -> Iterator[None]:
    """Put stored values into the model for the length of a ``with`` block, then restore the live weights bitwise.

    The live weights come back also when the block raises. Whatever the block writes to the parameters is lost. Costs
    one copy of the trainable parameters in their own dtype.

    Raises:
        RuntimeError: the block is entered a second time inside itself.
    """
    if stored.is_lent:
        raise RuntimeError("the model already holds these weights; weights() cannot be nested")
    with torch.no_grad():
        live = {name: in_use(parameter).detach().clone() for name, parameter in stored.parameters.items()}
    stored.is_lent = True
    try:
        _fill(stored.parameters, stored.values)
        yield
    finally:
        _fill(stored.parameters, live)
        stored.is_lent = False


@torch.no_grad()
def _fill(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        target = in_use(parameter)
        target.copy_(place_like(values[name], target))
    torch.clear_autocast_cache()  # it holds casts of what the parameters were


class StartingWeights(StoredWeights):
    """A copy of the trainable parameters as they were when training began.

    The starting model is the listener that training cannot talk to in a private code. A resumed run starts from the
    same weights again before its checkpoint is read, so nothing of this needs to be saved.

    Args:
        named_parameters: names to parameters; those without ``requires_grad`` are left out, since they never change.
        on_disk: keep the copy in a file in the folder for temporary files (``TMPDIR``) that loses its name at once and
            vanishes with the process; else in memory. Sharded parameters are kept whole, so every rank must make one.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """

    def __init__(self, named_parameters: Mapping[str, torch.nn.Parameter], on_disk: bool = False) -> None:
        parameters = {name: p for name, p in named_parameters.items() if p.requires_grad}
        in_memory = {} if on_disk else {n: whole(p.detach()).to("cpu", copy=True) for n, p in parameters.items()}
        super().__init__(parameters, _TensorFile(parameters) if on_disk else in_memory)


class _TensorFile(Mapping[str, torch.Tensor]):
    """Tensors in a temporary file that has lost its name; each is read when it is asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._names = dict.fromkeys(tensors)
        try:
            with tempfile.TemporaryDirectory(prefix="dual_loop_start_") as folder:
                path = Path(folder) / "start.safetensors"
                save_file({name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}, path)
                self._file: Any = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            what, fix = "the starting weights cannot be stored", "set TMPDIR to a folder with space, or the setting off"
            where = f"speed.start_on_disk, {tempfile.gettempdir()}"
            raise EnvironmentProblem(explain(what, where, str(error), fix=fix)) from error

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        value: torch.Tensor = self._file.get_tensor(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

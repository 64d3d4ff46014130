"""Weights that stand in for the trainable parameters for a while: their moving average, or those of the start."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO

import torch

from dual_loop.errors import EnvironmentProblem, explain
from dual_loop.model.shards import in_use, place_like, whole


class StoredWeights:
    """Values for the parameters of a model, which :func:`weights` puts into it for a while.

    Attributes:
        parameters: those that train, by name.
        values: a tensor for each, where they lie in memory.
        is_lent: whether the model holds them now.
    """

    parameters: Mapping[str, torch.nn.Parameter]
    values: Mapping[str, torch.Tensor]
    is_lent = False

    def read(self) -> Mapping[str, torch.Tensor]:
        """Return a tensor for each parameter."""
        return self.values


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
        _fill(stored.parameters, stored.read())
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
        on_disk: keep the copy in a file without a name in the folder for temporary files (``TMPDIR``), which vanishes
            with the process; else in memory. Sharded parameters are kept whole, so every rank must make one.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """

    def __init__(self, named_parameters: Mapping[str, torch.nn.Parameter], on_disk: bool = False) -> None:
        self.parameters = {name: p for name, p in named_parameters.items() if p.requires_grad}
        self.values = {name: whole(p.detach()).to("cpu", copy=not on_disk) for name, p in self.parameters.items()}
        self._file: IO[bytes] | None = None
        if on_disk:
            try:
                self._file = tempfile.TemporaryFile(prefix="dual_loop_start_")  # noqa: SIM115 - open as long as this lives
                torch.save(self.values, self._file)
                self._file.flush()
            except (OSError, RuntimeError) as error:  # the latter is torch's word for a full disk
                where = f"speed.start_on_disk, {tempfile.gettempdir()}"
                fix = "set TMPDIR to a folder with space, or the setting off"
                what = "the starting weights cannot be stored"
                raise EnvironmentProblem(explain(what, where, str(error), fix=fix)) from error
            self.values = {}

    def read(self) -> Mapping[str, torch.Tensor]:
        if self._file is None:
            return self.values
        self._file.seek(0)
        return dict(torch.load(self._file, weights_only=True))

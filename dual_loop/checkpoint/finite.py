"""The search for NaN and infinity in what is saved and in what was loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def find_not_finite(value: object, where: str) -> Iterator[str]:
    """Yield the name of each tensor and number in a nested ``value``, called ``where``, that is not finite."""
    if isinstance(value, Tensor):
        # The least and the largest value are NaN where any is; no mask of the tensor's size is made.
        if value.is_floating_point() and value.numel():
            least, largest = torch.aminmax(value.detach())
            if not (math.isfinite(least) and math.isfinite(largest)):
                yield where
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where} = {value}"
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from find_not_finite(item, f"{where}[{key!r}]")

"""Rows of like length together: a micro-batch of uneven rows runs group by group, each padded to its own longest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SLACK = 0.1
"""Largest share of padding in a row of a group. Smaller groups would pad less and fill the device less."""


def row_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Return the numbers of the rows, longest first, in groups; none is shorter than 1 - ``SLACK`` of its longest."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if groups and lengths[row] >= (1 - SLACK) * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def run_in_groups(
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    groups: Sequence[Sequence[int]],
    lengths: Sequence[int],
    embeds: Tensor,
    mask: Tensor,
    positions: Tensor | None,
) -> Tensor:
    """Apply ``run(embeds, mask, positions)`` to each group without its common padding; return (B, L, D).

    Args:
        groups: of :func:`row_groups`. lengths: real columns of each row, padding is on the right.
        embeds: (B, L, D). mask: (B, 1, L, L). positions: (B, L) or None.
    """
    outputs, columns = [], embeds.shape[1]
    for group in groups:
        rows = torch.tensor(group, device=embeds.device)
        end = lengths[group[0]]
        own = None if positions is None else positions[rows, :end]
        output = run(embeds[rows, :end], mask[rows, :, :end, :end], own)
        outputs.append(F.pad(output, (0, 0, 0, columns - end)))
    order = [row for group in groups for row in group]
    places = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(outputs)[torch.tensor(places, device=embeds.device)]

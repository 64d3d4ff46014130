"""Several questions about one image in one row: the image prefix is encoded once and every branch sees it.

A row is ``prefix, branch 1, branch 2, ...``. A token attends to the prefix and to the earlier tokens of its own
branch, and positions start again after the prefix in every branch. So each branch computes exactly what it would
compute in a row of its own (up to rounding), while the image tokens, most of the row, are paid for once. The same idea
is described as Prefix Grouper (arXiv 2506.05433).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dual_loop.model.prompts import Branch


def pack_rows(prefixes: Sequence[Sequence[int]], branches: Sequence[Sequence[Branch]], pad_id: int) -> dict[str, Any]:
    """Pack one prefix and its branches into each row; pad on the right.

    Args:
        prefixes: B lists of token ids.
        branches: B lists of branches.
        pad_id: id written at padded positions; its embedding is never attended to.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` (B, L) int64 and ``attention_mask`` (B, 1, L, L) bool,
        true where the second position may be seen from the first; ``read_from`` int, the first column of which a hidden
        state is read: the last one of the shortest prefix; ``row_lengths``, the columns of each row without padding.
    """
    rows = [_pack_row(prefix, row) for prefix, row in zip(prefixes, branches, strict=True)]
    length = max(len(row[0]) for row in rows)
    columns = [_pad([row[k] for row in rows], length, fill) for k, fill in enumerate((pad_id, -100, 0, -1))]
    input_ids, labels, position_ids, branch_index = columns
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "attention_mask": branch_attention_mask(branch_index),
        "row_lengths": [len(row[0]) for row in rows],
        "read_from": max(0, min(len(prefix) for prefix in prefixes) - 1),
    }


def _pack_row(prefix: Sequence[int], branches: Sequence[Branch]) -> tuple[list[int], list[int], list[int], list[int]]:
    ids, labels = list(prefix), [-100] * len(prefix)
    positions, index = list(range(len(prefix))), [0] * len(prefix)
    for number, branch in enumerate(branches, start=1):
        ids += branch.input_ids
        labels += branch.labels
        positions += range(len(prefix), len(prefix) + len(branch.input_ids))
        index += [number] * len(branch.input_ids)
    return ids, labels, positions, index


def _pad(rows: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=torch.long)


def branch_attention_mask(branch_index: Tensor) -> Tensor:
    """Return who sees whom: (B, L) branch numbers (0 prefix, -1 padding) -> (B, 1, L, L) bool.

    Padded positions see themselves alone: a row of the softmax without any true entry would give NaN.
    """
    length = branch_index.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch_index.device).tril()
    seen, seer = branch_index[:, None, :], branch_index[:, :, None]
    allowed = causal & (seen >= 0) & ((seen == 0) | (seen == seer))
    itself = torch.eye(length, dtype=torch.bool, device=branch_index.device)
    return (allowed | itself)[:, None]


def additive_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a (B, 1, L, L) bool mask into the additive form that every attention backend takes."""
    zero = torch.zeros((), dtype=dtype, device=attention_mask.device)
    return torch.where(attention_mask, zero, torch.finfo(dtype).min)


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left for batched generation: (R, L) int64 ids and (R, L) int64 mask (1 on real tokens)."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[*[pad_id] * (length - len(row)), *row] for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids, mask

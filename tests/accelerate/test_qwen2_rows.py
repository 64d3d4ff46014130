"""Rows in groups of like length: every row once, little padding, and the values of one padded pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from dual_loop.accelerate.qwen2 import SLACK, row_groups, run_language


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12))
def test_every_row_is_in_one_group_of_like_length(lengths: list[int]) -> None:
    groups = row_groups(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[row] for row in group]
        assert own[0] == max(own)
        assert min(own) >= (1 - SLACK) * own[0]


def test_rows_of_one_length_stay_together() -> None:
    assert row_groups([5, 5, 5]) == [[0, 1, 2]]
    assert row_groups([10, 300, 290]) == [[1, 2], [0]]


def test_groups_see_their_own_columns_and_come_back_in_order() -> None:
    lengths, seen = [2, 6, 3], []
    embeds = torch.arange(18, dtype=torch.float32).view(3, 6, 1).requires_grad_(True)
    mask = torch.ones(3, 1, 6, 6, dtype=torch.bool)
    positions = torch.arange(6).expand(3, -1)

    class Language:
        layers = (None,)

        def __call__(self, inputs_embeds: Any, attention_mask: Any, position_ids: Any, use_cache: bool) -> Any:
            seen.append((tuple(inputs_embeds.shape), tuple(attention_mask.shape), position_ids.shape[1]))
            return SimpleNamespace(last_hidden_state=inputs_embeds * 2)

    inner = SimpleNamespace(model=SimpleNamespace(language_model=Language()))
    model: Any = SimpleNamespace(mllm=inner, group_rows=True)
    output = run_language(model, embeds, mask, positions, row_lengths=lengths)
    assert seen == [((1, 6, 1), (1, 1, 6, 6), 6), ((1, 3, 1), (1, 1, 3, 3), 3), ((1, 2, 1), (1, 1, 2, 2), 2)]
    output.sum().backward()
    for row, length in enumerate(lengths):
        assert torch.equal(output[row, :length], embeds.detach()[row, :length] * 2)
        assert not output[row, length:].any()
        assert embeds.grad[row].flatten().tolist() == [2.0] * length + [0.0] * (6 - length)
    assert torch.equal(run_language(model, embeds, mask, positions, row_lengths=[6, 6, 6]), embeds * 2)
    assert seen[-1] == ((3, 6, 1), (3, 1, 6, 6), 6)

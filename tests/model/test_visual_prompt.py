"""Region prompts: image and region tokens in reading order, and as many as there are placeholders."""

from __future__ import annotations

import pytest
import torch

from dual_loop.errors import PromptError
from dual_loop.model.visual_prompt import insert_image_tokens


def test_region_tokens_are_copies_of_image_tokens_in_row_major_order():
    features = torch.arange(2 * 4 * 3, dtype=torch.float32).reshape(2, 4, 3)
    mask = torch.tensor([[[0, 1], [1, 1]]], dtype=torch.bool)
    embedded = torch.full((2, 8, 3), -1.0)
    placeholder = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    out = insert_image_tokens(embedded, placeholder, features, torch.tensor([1]), mask)
    assert torch.equal(out[0, 1:5], features[0])
    assert torch.equal(out[1, :4], features[1])
    assert torch.equal(out[1, 5:], features[1, 1:])
    assert torch.equal(out[0, 0], torch.full((3,), -1.0))


def test_a_wrong_number_of_placeholders_is_refused():
    features, mask = torch.zeros(1, 4, 3), torch.ones(1, 2, 2, dtype=torch.bool)
    with pytest.raises(PromptError, match="differ in number"):
        insert_image_tokens(torch.zeros(1, 5, 3), torch.ones(1, 5, dtype=torch.bool), features, torch.tensor([0]), mask)

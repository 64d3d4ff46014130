"""Region prompts, where the original's code has them."""

from __future__ import annotations

from dual_loop.data import masks
from dual_loop.model import visual_prompt


def test_the_name_of_the_original_is_the_function_of_the_data():
    assert visual_prompt.pool_mask_to_grid is masks.pool_mask_to_grid

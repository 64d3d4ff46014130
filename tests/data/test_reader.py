"""What all readers share: caps on samples."""

from __future__ import annotations

import numpy as np
import pytest

from dual_loop.data.reader import choose_capped
from dual_loop.errors import ConfigError


def test_caps_are_nested_repeatable_and_not_the_first_ones() -> None:
    small, large = choose_capped(1000, 50, "cap"), choose_capped(1000, 200, "cap")
    assert set(small) < set(large)
    assert np.array_equal(small, choose_capped(1000, 50, "cap"))
    assert np.array_equal(small, np.sort(small))
    assert small.max() > 900
    assert small.min() < 100
    assert choose_capped(5, None, "cap").tolist() == choose_capped(5, 99, "cap").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="sav_max_samples"):
        choose_capped(5, 0, "sav_max_samples")

"""What all readers share: regions are drawn until enough pass, and only those are decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dual_loop.data.reader import Reader
from dual_loop.errors import SampleError


def test_regions_are_drawn_until_enough_pass_the_limits(tmp_path: Path) -> None:
    reader = Reader(tmp_path, regions_per_image=2, min_area=0.1, max_area=0.5)
    masks = np.zeros((6, 10, 10), bool)
    for number, rows in enumerate((0, 1, 2, 5, 6, 10)):
        masks[number, :rows] = True
    decoded: list[int] = []

    def decode(number: int) -> np.ndarray:
        decoded.append(number)
        return masks[number]

    for seed in range(20):
        decoded.clear()
        numbers, drawn = reader._draw(np.random.default_rng(seed), 6, decode, "image")
        assert set(numbers) < {1, 2, 3}
        assert len(numbers) == 2
        assert np.array_equal(drawn, masks[numbers])
        assert decoded[-1] == numbers[-1], "nothing is decoded once there are enough"
        assert [number for number in decoded if number in numbers] == numbers
    with pytest.raises(SampleError, match=r"image.*2 masks.*0\.1 to 0\.5") as caught:
        reader._draw(np.random.default_rng(0), 2, lambda number: masks[5 * number], "image")
    assert caught.value.reason == "no_region_left"


def test_a_reader_without_any_way_to_load_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError):
        Reader(tmp_path).load(0, np.random.default_rng(0))

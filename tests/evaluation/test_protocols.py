"""Protocols: presets and their switches, and the polygons that two of them sum."""

from __future__ import annotations

import numpy as np
import pytest

from dual_loop.data.masks import decode_segmentation
from dual_loop.errors import ConfigError
from dual_loop.evaluation.protocols import PRESETS, choose_protocol

SIDE = 10


def test_protocols() -> None:
    assert choose_protocol("sa2va", {"join": None}).name == "sa2va"
    changed = choose_protocol("sa2va", {"join": "first"})
    assert (changed.name, changed.join, changed.seg) == ("sa2va*", "first", "generated")
    assert PRESETS["lisa"].clean("  The Red Star. ") == "the red star"
    assert PRESETS["dual_loop"].clean("The Red Star.") == "The Red Star."
    with pytest.raises(ConfigError, match="unknown protocol"):
        choose_protocol("best", {})
    with pytest.raises(ConfigError, match="--seg"):
        choose_protocol("lisa", {"seg": "perhaps"})


def test_overlapping_polygons_are_united_and_the_published_way_is_not() -> None:
    polygons = [[0, 0, 6, 0, 6, 10, 0, 10], [4, 0, 10, 0, 10, 10, 4, 10]]
    united = decode_segmentation(polygons, SIDE, SIDE, "here")
    assert united.all()
    summed = decode_segmentation(polygons, SIDE, SIDE, "here", summed=True)
    # Columns 0..3 are 1, 4 and 5 are 2, the rest 1: the code flips at every change of value.
    assert summed[:, :4].all()
    assert not summed[:, 4:6].any()
    assert summed[:, 6:].all()
    apart = [[0, 0, 3, 0, 3, 3, 0, 3], [5, 5, 9, 5, 9, 9, 5, 9]]
    one, two = (decode_segmentation(apart, SIDE, SIDE, "here", summed) for summed in (False, True))
    assert np.array_equal(one, two)

"""Tables of strings."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dual_loop.data.string_table import StringTable


@given(st.lists(st.text(max_size=20)))
def test_string_table_round_trips(strings: list[str]) -> None:
    strings = [s for s in strings if not any(0xD800 <= ord(c) <= 0xDFFF for c in s)]
    table = StringTable.from_strings(iter(strings))
    again = StringTable.from_arrays(table.to_arrays("x"), "x")
    assert [again[i] for i in range(len(again))] == strings
    for outside in (len(strings), -1):
        with pytest.raises(IndexError):
            again[outside]


def test_names_that_are_not_utf8_survive() -> None:
    name = os.fsdecode(b"a\xff.npz")
    assert StringTable.from_strings([name])[0] == name

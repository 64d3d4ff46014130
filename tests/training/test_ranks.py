"""One rank alone meets nobody; tests/distributed/test_rank_faults.py has two."""

from __future__ import annotations

import pytest

from dual_loop.training import ranks


def test_alone_nothing_is_watched() -> None:
    ranks.watch(10.0)
    ranks.compare({"a": 1})
    with ranks.exchange():
        ranks.note("alone")
    with pytest.raises(ValueError, match="as it was"), ranks.failing_together():
        raise ValueError("as it was")
    ranks.leave()

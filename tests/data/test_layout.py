"""Errors for a bad root."""

from __future__ import annotations

from pathlib import Path

import pytest

from dual_loop.data.layout import check_root
from dual_loop.errors import ConfigError


def test_bad_roots_are_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, seen in ((tmp_path / "absent", "nothing there"), (tmp_path / "file", "a file")):
        with pytest.raises(ConfigError, match=seen) as caught:
            check_root(path, "SA-V", "root/\n  x.npz")
        assert str(path) in str(caught.value)
        assert "root/\n  x.npz" in str(caught.value)
    assert check_root(tmp_path, "SA-V", "").is_absolute()

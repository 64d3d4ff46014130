"""What all readers share: the cap on samples, and the errors for a bad root."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dual_loop.errors import ConfigError, explain

CAP_SEED = 20_240_816
"""Seed of the shuffle before a cap. Fixed, so that a capped data set is the same in every run."""


def choose_capped(num_entries: int, max_samples: int | None, setting: str) -> np.ndarray:
    """Return the kept entries, ascending, (n,) int64: all of them, or ``max_samples`` drawn with a fixed seed.

    The first n in sorted order would be one video, one shard or one kind of object; a shuffle with :data:`CAP_SEED`
    comes first. A smaller cap keeps a subset of what a larger one keeps.

    Raises:
        ConfigError: ``max_samples`` is below 1; the message names ``setting``.
    """
    if max_samples is None:
        return np.arange(num_entries)
    if max_samples < 1:
        fix = "leave the directory out to skip a data set, or the cap to use all of it"
        raise ConfigError(explain("a cap on samples is too small", setting, max_samples, "1 or more, or none", fix))
    return np.sort(np.random.default_rng(CAP_SEED).permutation(num_entries)[:max_samples])


def check_root(root: str | Path, name: str, layout: str) -> Path:
    """Return ``root`` as an absolute path (links kept).

    Raises:
        ConfigError: it is not a folder that can be listed.
    """
    path = Path(os.path.abspath(Path(root).expanduser()))
    if not path.exists():
        raise layout_error(f"the {name} folder does not exist", path, "nothing there", layout)
    if not path.is_dir():
        raise layout_error(f"the {name} folder is not a folder", path, "a file", layout)
    if not os.access(path, os.R_OK | os.X_OK):
        raise layout_error(f"the {name} folder cannot be read", path, "no permission to list it", layout)
    return path


def layout_error(what: str, path: Path, seen: str, layout: str) -> ConfigError:
    """Return the error for a root that does not hold what its reader needs; ``layout`` is a small tree."""
    fix = "give the folder that holds this tree, or leave its flag out to train without this data set"
    return ConfigError(explain(what, str(path), seen, f"this layout\n{layout.rstrip()}\n", fix))

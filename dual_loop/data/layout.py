"""The folder of a data set: found, or refused with the tree that was expected."""

from __future__ import annotations

import os
from pathlib import Path

from dual_loop.errors import ConfigError, explain


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


def find_part(root: Path, given: str | Path | None, default: str, what: str, layout: str) -> Path:
    """Return the absolute path of a part of a data set: ``given``, also below ``root``, else ``default`` there.

    Raises:
        ConfigError: it is not there; the message begins with ``what``.
    """
    candidates = [root / default] if given is None else [Path(given).expanduser(), root / given]
    for candidate in candidates:
        if candidate.exists():
            return candidate.absolute()
    raise layout_error(what, candidates[-1], "nothing there", layout)


def layout_error(what: str, path: Path, seen: str, layout: str) -> ConfigError:
    """Return the error for a root that does not hold what its reader needs; ``layout`` is a small tree."""
    fix = "give the folder that holds this tree, or leave its flag out to train without this data set"
    return ConfigError(explain(what, str(path), seen, f"this layout\n{layout.rstrip()}\n", fix))

"""Weights by the name that a hub gives them (``owner/name``, ``owner/name@revision``): found in the cache of
huggingface_hub, and never downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@((?!.*\.\.)\w[\w./-]*))?")
SNAPSHOT = re.compile(r"(?:.*/)?models--([\w.-]+)--([\w.-]+)/snapshots/([0-9a-f]{40})(?:/.*)?")
"""A path in a cache; no name of a hub holds two hyphens."""


def hub_name(path: str | Path) -> str | None:
    """Return ``owner/name@commit`` of a path in a cache; None of any other."""
    found = SNAPSHOT.fullmatch(Path(path).as_posix())
    return found and f"{found[1]}/{found[2]}@{found[3]}"


def in_cache(path: str) -> str:
    """Return the folder in the cache that a hub's name means; ``path`` itself where that exists, or nothing is cached.

    A path in the cache of another machine is looked for by the name and the commit in it.
    """
    found = HUB_NAME.fullmatch(hub_name(path) or path)
    if found is None or os.path.lexists(path):
        return path
    from huggingface_hub import constants, snapshot_download

    try:
        folder = snapshot_download(found[1], revision=found[2], local_files_only=True)
    except (OSError, ValueError):  # not there, not whole, or no name that a hub gives
        return path
    # Nothing that a revision, a reference or a link says leads elsewhere.
    home = Path(constants.HF_HUB_CACHE, f"models--{found[1].replace('/', '--')}", "snapshots").resolve()
    target = Path(folder).resolve()
    return folder if target.parent == home and hub_name(target) else path


def how_to_get(path: str | Path) -> str:
    """Return what to do about weights that are not there, or not whole."""
    found = HUB_NAME.fullmatch(hub_name(path) or str(path))
    if found is None:
        return "check the path"
    revision = f" --revision {found[2]}" if found[2] else ""
    return f"check the path, or fetch what a hub has under this name: hf download {found[1]}{revision}"

"""The manifest of a run checkpoint: which files belong to it, their sizes and hashes.

The manifest is written last, so a folder that has one was written completely. See :mod:`dual_loop.checkpoint.store`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from dual_loop.errors import CheckpointError, explain

MANIFEST_NAME = "manifest.json"
FORMAT_NAME = "dual_loop.run_checkpoint"
FORMAT_VERSION = 1

MODEL_NAME = "model.safetensors"
EMA_NAME = "ema.safetensors"
OPTIMIZER_NAME = "optimizer.pt"
STATE_NAME = "state.json"

_CHUNK_BYTES = 8 * 1024 * 1024


def rng_name(rank: int) -> str:
    """Return the name of the file with the random states of ``rank``."""
    return f"rng_{rank}.pt"


def write_manifest(folder: Path, step: int, world_size: int) -> None:
    """List every file of ``folder``; all ranks must have written theirs.

    Raises:
        CheckpointError: the random states of a rank are missing.
    """
    missing = [name for name in map(rng_name, range(world_size)) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            explain(
                "ranks did not write their random states",
                str(folder),
                f"missing {', '.join(missing)}",
                fix="check that barrier waits for all ranks and that they share the file system",
            )
        )
    files = {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in sorted(folder.iterdir())}
    manifest = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "step": step,
        "world_size": world_size,
        "files": files,
    }
    write_text(folder / MANIFEST_NAME, json.dumps(manifest, indent=1))
    sync_to_disk(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of ``folder`` after checking its form; file names are plain names without a path.

    Raises:
        CheckpointError: there is no manifest, or it is not one of this format.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "the manifest cannot be read" if path.exists() else "not a whole checkpoint: it has no manifest"
        fix = "the save was interrupted or this is not a checkpoint folder; resume from another step"
        raise CheckpointError(explain(what, str(path), f"{type(error).__name__}: {error}", fix=fix)) from error
    problem = _find_manifest_problem(manifest)
    if problem:
        raise CheckpointError(
            explain("the manifest is malformed", str(path), problem, f"{FORMAT_NAME} version {FORMAT_VERSION}")
        )
    return cast(dict[str, Any], manifest)


def _find_manifest_problem(manifest: Any) -> str:
    """Return what is wrong with a parsed manifest, an empty string when it is sound."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_NAME:
        return "another format"
    if manifest.get("version") != FORMAT_VERSION:
        return f"version {manifest.get('version')!r}"
    if type(manifest.get("step")) is not int or type(manifest.get("world_size")) is not int:
        return f"step {manifest.get('step')!r}, world_size {manifest.get('world_size')!r}"
    files = manifest.get("files")
    if not isinstance(files, dict):
        return "no list of files"
    absent = {MODEL_NAME, OPTIMIZER_NAME, STATE_NAME} - files.keys()
    if absent:
        return f"it does not list {', '.join(sorted(absent))}"
    for name, entry in files.items():
        # A name with a path could make a forged manifest read files outside of the checkpoint.
        if not re.fullmatch(r"\w[\w.-]*", name) or not isinstance(entry, dict):
            return f"file entry {name!r}"
        if type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
            return f"file entry {name!r}"
    return ""


def verify_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Compare a file with its manifest entry ``{"bytes", "sha256"}``.

    Raises:
        CheckpointError: the file is missing, or its size or hash differs; the message names it.
    """
    fix = "the file was damaged after it was written; copy it again or resume from another step"
    if not path.is_file():
        raise CheckpointError(explain("a checkpoint file is missing", str(path), fix=fix))
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(
            explain("a checkpoint file has the wrong size", str(path), f"{size} bytes", f"{entry['bytes']} bytes", fix)
        )
    digest = hash_file(path)
    if digest != entry["sha256"]:
        raise CheckpointError(
            explain("a checkpoint file differs from its SHA-256", str(path), digest, entry["sha256"], fix)
        )


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text and force it to the disk."""
    path.write_text(text, encoding="utf-8")
    sync_to_disk(path)


def sync_to_disk(path: Path) -> None:
    """Force a file or the entries of a folder to the disk; without it a rename may survive a power cut before data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The manifest of a run checkpoint: which files belong to it, their sizes and hashes.

The manifest is written last, so a folder that has one was written completely. See :mod:`dual_loop.checkpoint.store`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from dual_loop.errors import REFUSALS, CheckpointError, explain, writing

MANIFEST_NAME = "manifest.json"
FORMAT_NAME = "dual_loop.run_checkpoint"
FORMAT_VERSION = 1

MODEL_NAME = "model.safetensors"
EMA_NAME = "ema.safetensors"
OPTIMIZER_NAME = "optimizer.pt"
STATE_NAME = "state.json"

T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str

    def verify(self, path: Path) -> None:
        """Compare the file at ``path`` with this entry.

        Raises:
            CheckpointError: the file is missing, or its size or hash differs; the message names it.
        """
        fix = "the file was damaged after it was written; copy it again or resume from another step"
        if not path.is_file():
            raise CheckpointError(explain("a checkpoint file is missing", str(path), fix=fix))
        size = path.stat().st_size
        if size != self.bytes:
            what = "a checkpoint file has the wrong size"
            raise CheckpointError(explain(what, str(path), f"{size} bytes", f"{self.bytes} bytes", fix))
        digest = hash_file(path)
        if digest != self.sha256:
            what = "a checkpoint file differs from its SHA-256"
            raise CheckpointError(explain(what, str(path), digest, self.sha256, fix))


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says: steps done, ranks that saved, and an entry for each file by its plain name."""

    step: int
    world_size: int
    files: Mapping[str, FileEntry]

    def verify(self, folder: Path) -> None:
        """Compare every file in ``folder`` with its entry; raises as :meth:`FileEntry.verify`."""
        for name, entry in self.files.items():
            entry.verify(folder / name)


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
        fix = "check that barrier waits for all ranks and that they share the file system"
        what, seen = "ranks did not write their random states", f"missing {', '.join(missing)}"
        raise CheckpointError(explain(what, str(folder), seen, fix=fix))
    files = {path.name: FileEntry(path.stat().st_size, hash_file(path)) for path in sorted(folder.iterdir())}
    head = {"format": FORMAT_NAME, "version": FORMAT_VERSION}
    write_text(folder / MANIFEST_NAME, json.dumps({**head, **asdict(Manifest(step, world_size, files))}, indent=1))
    sync_to_disk(folder)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of ``folder`` after checking its form; file names are plain names without a path.

    Raises:
        CheckpointError: there is no manifest, or it is not one of this format.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "the manifest cannot be read" if path.exists() else "not a whole checkpoint: it has no manifest"
        fix = "the save was interrupted or this is not a checkpoint folder; resume from another step"
        raise CheckpointError(explain(what, str(path), error, fix=fix)) from error
    try:
        if (content["format"], content["version"]) != (FORMAT_NAME, FORMAT_VERSION):
            raise ValueError(f"{content['format']!r} version {content['version']!r}")
        files = {
            name: FileEntry(_typed(e["bytes"], int), _typed(e["sha256"], str)) for name, e in content["files"].items()
        }
        absent = {MODEL_NAME, OPTIMIZER_NAME, STATE_NAME} - files.keys()
        # A name with a path could make a forged manifest read files outside of the checkpoint.
        unsafe = [name for name in files if not re.fullmatch(r"\w[\w.-]*", name)]
        if absent or unsafe:
            raise ValueError(f"files that it does not list: {sorted(absent)}, names that are no file's: {unsafe}")
        return Manifest(_typed(content["step"], int), _typed(content["world_size"], int), files)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        expected = f"{FORMAT_NAME} version {FORMAT_VERSION}"
        raise CheckpointError(explain("the manifest is malformed", str(path), error, expected)) from error


def _typed(value: object, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(8 * 1024 * 1024):
            digest.update(chunk)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text and force it to the disk."""
    path.write_text(text, encoding="utf-8")
    sync_to_disk(path)


@contextmanager
def writing_tensors(what: str, path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Do what :func:`errors.writing` does for the errors of safetensors and of torch's archives as well."""
    with writing(what, path, num_bytes):
        try:
            yield
        except SafetensorError as error:  # says the system's error in words alone
            number = next((number for number in REFUSALS if f"os error {number}" in str(error)), errno.EIO)
            raise OSError(number, str(error)) from error
        except RuntimeError as error:  # an archive that could not be written cannot be ended either
            raise (error.__context__ if isinstance(error.__context__, OSError) else error)  # noqa: B904


def sync_to_disk(path: Path) -> None:
    """Force a file or the entries of a folder to the disk; without it a rename may survive a power cut before data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

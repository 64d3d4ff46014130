"""The errors that a user can meet, each with one message shape.

Every message says, in this order: what failed, where, the value seen, the value expected, what to do.
Use :func:`explain` to build it, so that no part is forgotten.
"""

from __future__ import annotations

import difflib
import errno
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxother, _REPR.maxdict = 60, 60, 6
"""Writes the beginning of a value alone: of what a data file holds, the whole may be endless or very deep."""


class DualLoopError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(DualLoopError):
    """A config file, a flag or a combination of settings is wrong."""


class SampleError(DualLoopError):
    """One sample of a data set cannot be used. It is skipped and counted under ``reason``.

    Args:
        reason: a short stable key for the counter, such as ``"truncated_file"`` (see ``data/`` for the list).
        message: the full message for the log (see :func:`explain`).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # Default exception pickling would drop ``reason``; loader workers send these errors between processes.
        return type(self), (self.reason, str(self))


class PromptError(DualLoopError):
    """A prompt cannot be built, or token counts and image features do not fit together."""


class CheckpointError(DualLoopError):
    """A checkpoint is missing, unsafe, incomplete, or does not fit the model."""


class EnvironmentProblem(DualLoopError):
    """The machine cannot do what was asked: no space, no device, a library that is missing."""


def shorten(value: object) -> str:
    """Return what Python writes of ``value``, at most 60 characters of it."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."


def listed(values: Sequence[object], most: int = 8) -> str:
    """Return the first ``most`` values with commas between them, and how many more there are."""
    more = len(values) - most
    return ", ".join(map(str, values[:most])) + (f" and {more} more" if more > 0 else "")


OTHER_WORDS = {
    "accumulation": ("gradient_accumulation_steps",),
    "alpha": ("lora_alpha",),
    "amp": ("mixed_precision",),
    "bf16": ("mixed_precision",),
    "bs": ("batch_size",),
    "checkpoint": ("pretrained_pth",),
    "data": ("masks_dir", "sa1b_dir", "sav_dir", "openimage_dir", "refcoco_dir"),
    "fp16": ("mixed_precision",),
    "gpu": ("cuda",),
    "grad_accum": ("gradient_accumulation_steps",),
    "grad_clip": ("max_grad_norm",),
    "images": ("masks_dir", "sa1b_dir"),
    "lr": ("learning_rate",),
    "model": ("model_path", "pretrained_pth"),
    "out": ("output_dir",),
    "precision": ("mixed_precision",),
    "rank": ("lora_r",),
    "steps": ("max_steps",),
    "weights": ("pretrained_pth",),
    "workers": ("num_workers",),
    **dict.fromkeys(map(str, range(8)), ("cuda",)),
}
"""What people say for a name of ours that looks otherwise."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return what an unknown word may have been meant to be, as the end of a message; nothing where none is near."""
    bare = _bare(word)
    names: dict[str, str] = {}
    for name in known:
        names.setdefault(_bare(name), name)
    found = [bare] if bare in names else [name for name in OTHER_WORDS.get(bare, ()) if name in names]
    found += [name for name in names if not found and bare and f"_{bare}_" in f"_{name}_"]
    found = found or difflib.get_close_matches(bare, names, n=1)
    return f"; did you mean {' or '.join(names[name] for name in found[:5])}?" if found else ""


def _bare(name: str) -> str:
    """Return a flag without dashes, a setting without its group."""
    return name.rpartition(".")[2].lstrip("-").replace("-", "_").lower()


def explain(what: str, where: str = "", seen: object = None, expected: object = None, fix: str = "") -> str:
    """Return the one-paragraph message of an error: what failed, where, seen, expected, what to do.

    An exception that was ``seen`` is written with its type. Characters that cannot be printed (lone surrogates, which
    JSON can hold) are escaped.
    """
    parts = [what.rstrip(".")]
    if where:
        parts.append(f"where: {where}")
    if seen is not None:
        kind = f"{type(seen).__name__}: " if isinstance(seen, Exception) else ""
        parts.append(f"seen: {kind}{seen}")
    if expected is not None:
        parts.append(f"expected: {expected}")
    if fix:
        parts.append(f"to do: {fix}")
    return printable("; ".join(parts))


def bad_sample(
    reason: str, what: str, where: str = "", seen: object = None, expected: object = None, fix: str = ""
) -> SampleError:
    """Return the error of a sample that cannot be used, with a message of :func:`explain`."""
    return SampleError(reason, explain(what, where, seen, expected, fix))


def printable(text: str) -> str:
    """Return ``text`` with lone surrogates escaped, which no encoding has: ``\\ud800``."""
    return text.encode("utf-8", "backslashreplace").decode()


ROOM = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on sizes",
}
REFUSALS = {
    **ROOM,
    errno.EROFS: "choose a folder on a file system that can be written",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check the permissions of the folder"),
    errno.EIO: "look at the disk or its server",
    errno.ENAMETOOLONG: "choose a shorter name",
}
"""What to do where the system refuses to write, by its error number."""


@contextmanager
def writing(what: str, path: object, num_bytes: int | None = None, net: bool = False) -> Iterator[None]:
    """Turn an OSError of the block, which writes ``num_bytes`` to ``path``, into an EnvironmentProblem.

    With ``net`` only those of a disk (:data:`REFUSALS`) are turned; others are faults of the program.
    """
    try:
        yield
    except OSError as error:
        if net and error.errno not in REFUSALS:
            raise
        needed = f"{num_bytes:,} bytes of space" if num_bytes is not None and error.errno in ROOM else None
        fix = REFUSALS.get(error.errno or 0, "look at the folder and its disk")
        where = str(error.filename or path)
        raise EnvironmentProblem(explain(f"{what} cannot be written", where, error, needed, fix)) from error

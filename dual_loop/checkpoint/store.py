"""The checkpoints of a run: written whole or not at all, verified when read, enough to resume exactly.

Layout, below the run folder::

    checkpoints/step_00000012/
        model.safetensors    the trainable tensors
        ema.safetensors      their averages (absent where the run keeps none)
        optimizer.pt         optimiser state
        state.json           counters, sampler position, whatever else the trainer keeps
        rng_0.pt, rng_1.pt   random states, one file a rank
        manifest.json        size and SHA-256 of every file above; written last

Everything is written to ``checkpoints/.tmp-step_00000012`` and synced to disk, and the folder gets its name only when
the manifest is there: a folder ``step_*`` with a manifest is whole, whenever the process was killed. The ``.pt`` files
hold plain values and are read with ``weights_only=True``. All ranks must share the file system.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dual_loop.checkpoint.finite import find_not_finite
from dual_loop.checkpoint.manifest import (
    EMA_NAME,
    MODEL_NAME,
    OPTIMIZER_NAME,
    STATE_NAME,
    read_manifest,
    rng_name,
    sync_to_disk,
    write_manifest,
    write_text,
    writing_tensors,
)
from dual_loop.checkpoint.sources import unreadable
from dual_loop.errors import CheckpointError, EnvironmentProblem, explain, listed

Plain: TypeAlias = dict[str, Any]
"""Tensors (not in JSON), numbers, strings, None, and lists, tuples (not in JSON) and dicts of these: what comes back
from a file unchanged. Saving anything else is refused."""

CHECKPOINT_DIR = "checkpoints"

_TEMPORARY_PREFIX = ".tmp-"
_REPLACED_PREFIX = ".replaced-"
_STEP_PATTERN = re.compile(r"(?:\.replaced-)?step_(\d{8,})")
# Headers, manifest, zip directories and file-system blocks, which the tensor sizes do not cover.
_OVERHEAD_BYTES = 1024 * 1024
_TAKE_ANOTHER = "take an earlier checkpoint, by its path"


@dataclass(frozen=True)
class RunCheckpoint:
    """What was given to :func:`save_run_checkpoint`; every tensor is on the CPU.

    ``rng_states`` are those of this rank, None where the run had another number of ranks.
    """

    step: int
    model_tensors: dict[str, Tensor]
    ema_tensors: dict[str, Tensor] | None
    optimizer_state: Plain
    state: Plain
    rng_states: Plain | None


def save_run_checkpoint(
    root: str | Path,
    step: int,
    *,
    model_tensors: Mapping[str, Tensor],
    ema_tensors: Mapping[str, Tensor] | None,
    optimizer_state: Plain,
    state: Plain,
    rng_states: Plain,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of ``step`` below ``root`` and remove all but the newest ``keep``. Called by every rank.

    Rank 0 writes the shared files, each rank its own random states. A rank that fails leaves only a temporary folder,
    which the next save removes; ``barrier`` has to end the others then. Returns the folder, whole on every rank.

    Args:
        step: optimiser steps done. A checkpoint of the same step is replaced.
        model_tensors, ema_tensors: names to tensors on any device; read on rank 0 only (others may give empty ones).
        state: anything that JSON keeps unchanged.
        rng_states: the random states of this rank, see :func:`capture_rng`.
        barrier: returns when every rank has called it.
        keep: whole checkpoints to keep, at least 1. Those of later steps (an abandoned course) are neither counted nor
            removed, but warned about. Symbolic links in the folder, and what they point to there, stay.

    Raises:
        CheckpointError: a value could not be read back or is not finite, or a rank's file is missing.
        EnvironmentProblem: the disk has too little free space or refuses to write.
        ValueError: ``keep``, ``step`` or ``rank`` is out of range.
    """
    if keep < 1 or step < 0 or not 0 <= rank < world_size:
        seen = f"keep {keep}, step {step}, rank {rank} of {world_size}"
        raise ValueError(explain("cannot save a checkpoint", seen=seen, expected="keep >= 1, step >= 0, rank < size"))
    folder = Path(root) / CHECKPOINT_DIR
    final = folder / f"step_{step:08d}"
    temporary = folder / f"{_TEMPORARY_PREFIX}{final.name}"
    _check_plain(rng_states, "rng_states")
    num_bytes = world_size * _count_bytes(rng_states)
    if rank == 0:
        _check_plain(optimizer_state, "optimizer_state")
        _check_plain(state, "state", for_json=True)
        parts = {"model_tensors": model_tensors, "ema_tensors": ema_tensors, "state": state}
        parts["optimizer_state"] = optimizer_state
        fix = "resume from the newest whole checkpoint with a lower --learning_rate"
        _refuse_not_finite(parts, f"step {step}", f"{fix}, or with --mixed_precision no")
        num_bytes += _count_bytes([model_tensors, ema_tensors, optimizer_state]) + len(json.dumps(state))
        with writing_tensors("the checkpoint", temporary, num_bytes):
            _prepare_folder(folder, temporary, num_bytes)
    barrier()
    if not temporary.is_dir():
        fix = "put train.output_dir on a file system that all nodes share"
        what = "a rank does not see the folder that rank 0 made"
        raise CheckpointError(explain(what, str(temporary), f"rank {rank}", fix=fix))
    with writing_tensors("the checkpoint", temporary, num_bytes):
        _save_plain(rng_states, temporary / rng_name(rank))
        if rank == 0:
            _save_tensors(model_tensors, temporary / MODEL_NAME)
            if ema_tensors is not None:
                _save_tensors(ema_tensors, temporary / EMA_NAME)
            _save_plain(optimizer_state, temporary / OPTIMIZER_NAME)
            write_text(temporary / STATE_NAME, json.dumps(state, indent=1))
    barrier()
    if rank == 0:
        with writing_tensors("the checkpoint", temporary, num_bytes):
            write_manifest(temporary, step, world_size)
            _publish(temporary, final)
            _rotate(folder, step, keep)
    barrier()
    return final


def newest_whole(root: str | Path) -> tuple[Path | None, list[str]]:
    """Return the checkpoint of the highest step below ``root`` whose files all have their hashes, None without any.

    With it come the reasons why each newer one, the newest first, was passed over.
    """
    passed_over = []
    for _, path in reversed(_list_steps(Path(root) / CHECKPOINT_DIR)):
        try:
            read_manifest(path).verify(path)
        except (CheckpointError, OSError) as error:
            passed_over.append(f"{path.name}: {error}")
        else:
            return path, passed_over
    return None, passed_over


def load_run_checkpoint(path: str | Path, rank: int = 0, world_size: int = 1, *, verify: bool = True) -> RunCheckpoint:
    """Read the checkpoint folder ``path`` for one rank.

    Args:
        world_size: ranks now; random states of another number of them do not fit and are left out, with a warning.
        verify: compare every file with its SHA-256 first; False where :func:`newest_whole` just did.

    Raises:
        CheckpointError: the folder is missing, half-written or of another format, a file is missing or differs from
            its SHA-256 (the message names the file), or holds anything but tensors and plain values, all finite.
    """
    path = Path(path)
    manifest = read_manifest(path)
    fits = world_size == manifest.world_size and rng_name(rank) in manifest.files
    if not fits:
        text = f"{path.name} was saved by {manifest.world_size} rank(s) and is read by rank {rank} of {world_size}: "
        warnings.warn(f"{text}random states are not restored, so the run is not bit-identical", stacklevel=2)
    if verify:
        manifest.verify(path)
    optimizer_state = _load_plain(path / OPTIMIZER_NAME)
    _refuse_not_finite({OPTIMIZER_NAME: optimizer_state}, str(path), _TAKE_ANOTHER)
    return RunCheckpoint(
        step=manifest.step,
        model_tensors=load_tensors(path / MODEL_NAME),
        ema_tensors=load_tensors(path / EMA_NAME) if EMA_NAME in manifest.files else None,
        optimizer_state=optimizer_state,
        state=json.loads((path / STATE_NAME).read_text(encoding="utf-8")),
        rng_states=_load_plain(path / rng_name(rank)) if fits else None,
    )


def capture_rng() -> Plain:
    """Return the states of Python's, numpy's and torch's global generators, as tensors and plain values.

    Of CUDA only the current device is read, so that no rank opens a context on the devices of others.

    Raises:
        CheckpointError: numpy's global generator is not the standard Mersenne twister.
    """
    version, internal, gauss_next = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached_gaussian = numpy_state
    if name != "MT19937":
        what, expected = "numpy's global generator cannot be saved", "the default MT19937"
        raise CheckpointError(explain(what, "capture_rng", name, expected))
    return {
        "python": (version, torch.tensor(internal, dtype=torch.int64), gauss_next),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached_gaussian)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_rng(states: Mapping[str, Any]) -> None:
    """Set the global generators to what :func:`capture_rng` returned.

    A CUDA state on a machine without CUDA, or the reverse, leaves that generator alone with a warning.

    Raises:
        CheckpointError: ``states`` did not come from :func:`capture_rng`.
    """
    if set(states) != {"python", "numpy", "torch", "cuda"}:
        expected = "python, numpy, torch, cuda"
        raise CheckpointError(explain("random states are malformed", "restore_rng", sorted(states), expected))
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss_next))
    keys, position, has_gauss, cached_gaussian = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
    torch.set_rng_state(states["torch"])
    if (states["cuda"] is not None) != torch.cuda.is_available():
        was, now = ("not there", "is") if states["cuda"] is None else ("there", "is not")
        text = f"CUDA was {was} when the random states were saved and {now} now: its generator is left as it is"
        warnings.warn(text, stacklevel=2)
    elif states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])


# --- folders --------------------------------------------------------------------------------------------------------


def _prepare_folder(folder: Path, temporary: Path, num_bytes: int) -> None:
    """Remove what earlier saves left behind, check the free space and make the temporary folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.name.startswith(_TEMPORARY_PREFIX) and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
    needed, free = num_bytes + _OVERHEAD_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        fix = "free some space, move train.output_dir, or keep fewer checkpoints (train.keep_checkpoints)"
        seen, expected = f"{free:,} bytes free", f"at least {needed:,} bytes"
        raise EnvironmentProblem(explain("not enough disk space for a checkpoint", str(folder), seen, expected, fix))
    temporary.mkdir()


def _publish(temporary: Path, final: Path) -> None:
    """Give the written folder its name. An old one of the same step stays findable until that has happened."""
    replaced = final.with_name(f"{_REPLACED_PREFIX}{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_to_disk(final.parent)
    if replaced.is_symlink():
        replaced.unlink()
    elif replaced.exists():
        _remove_folder(replaced)


def _rotate(folder: Path, step: int, keep: int) -> None:
    """Remove whole checkpoints up to ``step`` but the newest ``keep``; the one just written is always among these."""
    whole = _list_whole(folder)
    later = [path.name for number, path in whole if number > step]
    if later:
        warnings.warn(
            f"{folder.name} holds checkpoints of later steps than the one just saved ({step}): {', '.join(later)}; "
            "the latest of them is what automatic resuming takes, so move them away if they are not wanted",
            stacklevel=3,
        )
    links = [path for path in folder.iterdir() if path.is_symlink()]
    linked = {path.resolve() for path in links}
    own = [path for number, path in whole if number <= step and path not in links]
    for path in own[:-keep]:
        if path.resolve() not in linked:
            _remove_folder(path)


def _remove_folder(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that one deleted halfway is never taken for a whole one."""
    doomed = path.with_name(f"{_TEMPORARY_PREFIX}delete-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _list_steps(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of the checkpoints in ``folder``, by step; a replaced one before its successor."""
    # ".replaced-" sorts before "step_".
    paths = sorted(folder.iterdir()) if folder.is_dir() else ()
    found = [(int(match[1]), path) for path in paths if (match := _STEP_PATTERN.fullmatch(path.name))]
    return sorted(found, key=lambda item: item[0])


def _list_whole(folder: Path) -> list[tuple[int, Path]]:
    """Return those of :func:`_list_steps` whose files are all there, with their sizes."""
    found = []
    for step, path in _list_steps(folder):
        try:
            entries = read_manifest(path).files.items()
        except CheckpointError:
            continue
        if all((path / name).is_file() and (path / name).stat().st_size == entry.bytes for name, entry in entries):
            found.append((step, path))
    return found


# --- files ----------------------------------------------------------------------------------------------------------


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except RuntimeError as error:
        if "share memory" not in str(error):  # torch raises wherever it is when a loader's process dies
            raise
        fix = "give each shared tensor under one name only"
        raise CheckpointError(explain("tensors cannot be saved", str(path), str(error), fix=fix)) from error
    sync_to_disk(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return what :data:`MODEL_NAME` or :data:`EMA_NAME` of a verified checkpoint holds, on the CPU.

    Raises:
        CheckpointError: it cannot be read, or holds values that are not finite.
    """
    try:
        tensors = load_file(path, device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(explain("tensors cannot be read", str(path), str(error))) from error
    _refuse_not_finite({path.name: tensors}, str(path.parent), _TAKE_ANOTHER)
    return tensors


def _save_plain(value: Plain, path: Path) -> None:
    with path.open("wb") as stream:  # given a path, torch reports a full disk as a RuntimeError without its cause
        torch.save(value, stream)
    sync_to_disk(path)


def _load_plain(path: Path) -> Plain:
    try:
        content: Plain = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except Exception as error:  # torch raises pickle, zip and runtime errors alike
        raise unreadable(
            path, error, "a state file that this package wrote", "a state file cannot be read safely"
        ) from error


def _check_plain(value: Any, where: str, for_json: bool = False) -> None:
    """Raise CheckpointError where ``value`` holds what ``weights_only=True`` (or JSON) would not give back."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) is not str and (for_json or type(key) is not int):
                expected = "a string" if for_json else "a string or int"
                raise CheckpointError(explain("a key cannot be saved", where, repr(key), expected))
            _check_plain(item, f"{where}[{key!r}]", for_json)
    elif kind is list or (kind is tuple and not for_json):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]", for_json)
    elif kind not in (bool, int, float, str, type(None)) and (for_json or not isinstance(value, Tensor)):
        allowed = "JSON values (lists, not tuples)" if for_json else "tensors, numbers, strings, lists, tuples, dicts"
        seen = f"{kind.__module__}.{kind.__qualname__}"
        raise CheckpointError(explain("a value cannot be saved", where, seen, allowed, "convert it first"))


def _refuse_not_finite(parts: Mapping[str, Any], where: str, fix: str) -> None:
    found = [name for part, value in parts.items() for name in find_not_finite(value, part)]
    if found:
        what, expected = f"{len(found)} tensors or numbers of a checkpoint are not finite", "finite numbers"
        raise CheckpointError(explain(what, where, listed(found), expected, fix))


def _count_bytes(value: object) -> int:
    """Return the bytes of all tensors in a nested value, plus a few for each plain one."""
    if isinstance(value, (Mapping, list, tuple)):
        return sum(map(_count_bytes, value.values() if isinstance(value, Mapping) else value))
    return value.nbytes if isinstance(value, Tensor) else 16

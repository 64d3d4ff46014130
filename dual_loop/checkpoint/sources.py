"""Files of weights on disk: what they are, which tensors they hold, and reading them one file at a time.

Nothing here runs code from a file: safetensors, or ``torch.load(weights_only=True)``, memory-mapped where the file
allows it. DeepSpeed's folders are the one exception, and are refused unless the user says that they are trusted. Names
are those of the file; :mod:`dual_loop.checkpoint.key_rules` knows what they mean.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dual_loop.checkpoint.manifest import hash_file
from dual_loop.config import TRUST_VARIABLE, how_to_get, in_cache
from dual_loop.errors import CheckpointError, explain, listed

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which programs put the tensors: mmengine and xtuner, SAM 2, DeepSpeed."""
WRAPPING = re.compile(
    r"^(?:module\.|_orig_mod\.|model\.(?=(?:module\.|_orig_mod\.)*(?:mllm|grounding_encoder|text_hidden_fcs)\.))+"
    r"|(?<=\.)_orig_mod\."
)
"""What DDP and DeepSpeed (``module.``), ``torch.compile`` and Lightning (``model.``) put into names."""
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
ADAPTER_EXTRA = "trained.safetensors"
"""Beside ``adapter_model.safetensors``: what else was trained, under the original's names."""
PARTS = ("mllm", "sam2")
"""Sub-folders of a ``hf-native`` export, each a transformers folder of its own."""


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor; nothing of it is in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Checkpoint:
    """One set of weights under the names of its files, without what :data:`WRAPPING` matches."""

    path: Path
    files: list[Path] = field(default_factory=list)  # in the order they are read
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    loaded: dict[str, Tensor] = field(default_factory=dict)  # of a DeepSpeed folder, which has no files to read singly

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the (name, tensor) pairs, file by file; each is closed, and its memory free, before the next."""
        yield from self.loaded.items()
        for file in self.files:
            yield from _read_file(file)

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of every file, by its name inside ``path``."""
        root = self.path if self.path.is_dir() else self.path.parent
        return {str(file.relative_to(root)): hash_file(file) for file in self.files}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Find out which files ``path`` means and which tensors they hold.

    Accepts a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file; a folder with one such file or with a sharded index
    (also a folder that is named like a file); an adapter folder of this package; a DeepSpeed ZeRO folder that the user
    trusts (``--trust_deepspeed_pickles``), where DeepSpeed is installed.

    Raises:
        CheckpointError: there is nothing to load, a file is damaged or holds code, or a tensor is there twice.
    """
    path = Path(path)
    if not path.exists():
        what = "weights not found"
        raise CheckpointError(explain(what, str(path), expected="a file or a folder", fix=how_to_get(path)))
    if is_zero_folder(path):
        if not os.environ.get(TRUST_VARIABLE):
            what = "a DeepSpeed folder is made of pickles, which can run code, and is refused"
            raise CheckpointError(explain(what, str(path), expected="one file of weights", fix=_conversion(path)))
        loaded = consolidate_zero(path)
        return Checkpoint(path, [], {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in loaded.items()}, loaded)
    checkpoint = Checkpoint(path, [path] if path.is_file() else _files_of_folder(path))
    if not checkpoint.files:
        expected = f"{', '.join((*INDEX_NAMES, *SINGLE_NAMES))} or one .pth, .pt, .bin or .safetensors file"
        names = sorted(item.name for item in path.iterdir())
        several = [name for name in names if name.endswith(SUFFIXES)]
        what = "several files of weights in this folder" if several else "no weights in this folder"
        fix = f"give the file itself, such as {path / several[-1]}" if several else how_to_get(path)
        raise CheckpointError(explain(what, str(path), listed(names) or "an empty folder", expected, fix))
    origin: dict[str, str] = {}
    for file in checkpoint.files:
        for name, tensor in _read_file(file):
            if name in origin:
                where = f"{origin[name]} and {file.name}"
                raise CheckpointError(explain("a key is there twice", where, name, "every key once"))
            checkpoint.tensors[name], origin[name] = TensorInfo(tuple(tensor.shape), tensor.dtype), file.name
    return checkpoint


def open_parts(path: str | Path) -> list[tuple[str, Checkpoint]]:
    """Return (prefix, weights) of everything behind ``path``: itself, or the parts of a ``hf-native`` export.

    Raises:
        CheckpointError: as :func:`open_checkpoint`.
    """
    path = Path(in_cache(str(path)))
    parts = [("", path)]
    if all((path / part).is_dir() for part in PARTS):
        parts = [*((f"{part}.", path / part) for part in PARTS), *(("", f) for f in sorted(path.glob("*.safetensors")))]
    return [(prefix, open_checkpoint(part)) for prefix, part in parts]


def has_weights(path: str | Path) -> bool:
    """Tell whether a folder holds weights at all (a folder with only a tokenizer does not)."""
    path = Path(path)
    return path.is_dir() and (is_zero_folder(path) or bool(_files_of_folder(path)))


def guess_load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Load every tensor of ``path`` under the names of its files, memory-mapped where possible.

    The counterpart of xtuner's function of the same name, without running code from the file. A folder of a
    ``hf-native`` export gives the names of its parts behind ``mllm.`` and ``sam2.``. To load into a model use
    :func:`dual_loop.checkpoint.importer.load_weights`, which maps names and checks everything.

    Raises:
        CheckpointError: as :func:`open_checkpoint`.
    """
    return {prefix + name: tensor for prefix, part in open_parts(path) for name, tensor in part.read()}


def is_zero_folder(path: Path) -> bool:
    """Tell whether ``path`` is a DeepSpeed ZeRO checkpoint: optimiser shards, directly or under the latest tag."""
    patterns = ("*_optim_states.pt", "*/*_optim_states.pt")
    return path.is_dir() and any(next(path.glob(pattern), None) is not None for pattern in patterns)


def consolidate_zero(path: Path) -> dict[str, Tensor]:
    """Return the fp32 weights of a DeepSpeed ZeRO folder through DeepSpeed's own consolidation, which runs its pickles.

    Raises:
        CheckpointError: DeepSpeed is not installed; the message gives the command that converts the folder.
    """
    if importlib.util.find_spec("deepspeed") is None:
        what = "a DeepSpeed ZeRO folder has its weights spread over the optimiser's files"
        seen = "deepspeed is not installed here"
        raise CheckpointError(explain(what, str(path), seen, "one consolidated file", _conversion(path)))
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    root, tag = _root_and_tag(path)
    whole = get_fp32_state_dict_from_zero_checkpoint(str(root), tag)
    return {WRAPPING.sub("", name): tensor for name, tensor in whole.items()}


def _root_and_tag(path: Path) -> tuple[Path, str | None]:
    """Return what DeepSpeed calls the checkpoint's folder and tag: xtuner's ``iter_N.pth`` is a tag in its parent."""
    if next(path.glob("*_optim_states.pt"), None) is not None:
        return path.absolute().parent, path.absolute().name
    if (path / "latest").is_file():
        return path, None
    tags = sorted({file.parent.name for file in path.glob("*/*_optim_states.pt")})
    if len(tags) > 1:
        fix = f"give one of them, such as {path / tags[-1]}"
        raise CheckpointError(explain("several DeepSpeed checkpoints in this folder", str(path), listed(tags), fix=fix))
    return path, tags[0] if tags else None


def _conversion(path: Path) -> str:
    """Return what to do with a DeepSpeed folder."""
    root, tag = _root_and_tag(path)
    script = root / "zero_to_fp32.py"  # DeepSpeed's own copy of the module, of the version that wrote the files
    program = shlex.quote(str(script)) if script.is_file() else "-m deepspeed.utils.zero_to_fp32"
    out = root / f"{Path(tag or path.absolute().name).stem}_fp32"
    command = f"python {program} {shlex.quote(str(root))} {shlex.quote(str(out))}"
    command += f" --tag {shlex.quote(tag)}" if tag else ""
    where = "where its code can do no harm (a container without network and secrets; deepspeed installed)"
    trusted = "or, if you trust whoever wrote it, give --trust_deepspeed_pickles"
    return f"convert it {where}: {command}; then give {out}; {trusted}"


def _files_of_folder(path: Path) -> list[Path]:
    for name in INDEX_NAMES:
        if (path / name).is_file():
            return _files_of_index(path / name)
    for name in SINGLE_NAMES:
        if (path / name).is_file():
            extra = path / ADAPTER_EXTRA
            return [path / name, *([extra] if name.startswith("adapter") and extra.is_file() else [])]
    found = sorted(item for item in path.iterdir() if item.is_file() and item.suffix in SUFFIXES)
    return found if len(found) == 1 else []


def _files_of_index(index: Path) -> list[Path]:
    """Return the shards that an index names, refusing names outside of its folder and keys that it lists twice."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(explain("a key is listed twice", str(index), twice, "every key once"))
        return values

    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique)
        names = list(dict.fromkeys(content["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        expected = '{"weight_map": {key: file}}'
        what = "the index of the shards cannot be read"
        raise CheckpointError(explain(what, str(index), repr(error), expected)) from error
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise CheckpointError(explain("a shard lies outside of its folder", str(index), name, "a plain file name"))
    missing = ", ".join(name for name in names if not (index.parent / name).is_file())
    if missing:
        expected, fix = "every file of the index", "download them"
        raise CheckpointError(explain("shards are missing", str(index), missing, expected, fix))
    return [index.parent / name for name in names]


def _read_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the (name, tensor) pairs of one file; nothing of a tensor is in memory until it is used."""
    if file.suffix != ".safetensors":
        for name, tensor in _load_torch_file(file).items():
            yield WRAPPING.sub("", name), tensor
        return
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                yield WRAPPING.sub("", name), handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error, "a whole .safetensors file") from error


def _load_torch_file(file: Path) -> dict[str, Tensor]:
    """Load a file of ``torch.save`` without running anything from it, and unwrap it to names and tensors."""
    try:
        # Files of before torch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of torch, pickle, zip: whatever a file can make of them
        raise unreadable(file, error, "a whole file of torch.save") from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        seen = type(content).__name__
        if isinstance(content, Mapping):
            seen = ", ".join(f"{k}: {type(v).__name__}" for k, v in content.items() if not isinstance(v, Tensor))[:200]
        expected = "names to tensors, bare or under state_dict or model"
        raise CheckpointError(explain("no state dict in this file", str(file), seen, expected))
    return dict(content)


BEGINNINGS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file that it stands for", "fetch it with git lfs pull"),
    b"<!doctype html": ("an HTML page", "download the file itself, not the page about it"),
    b"<html": ("an HTML page", "download the file itself, not the page about it"),
    b"<?xml": ("an XML document, as a refused download leaves it", "download it again"),
    b"{": ("a JSON document, as a refused download leaves it", "download it again"),
    b"gguf": ("a GGUF file", "get the weights as safetensors"),
    b"\x1f\x8b": ("a gzip archive", "unpack it"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it"),
    b"rar!": ("a RAR archive", "unpack it"),
    b"\x89hdf": ("an HDF5 file", "get the weights as safetensors"),
    b"\x93numpy": ("a numpy array", "get the weights as safetensors"),
}
"""What a file that is no weights begins with, in lower case -> what it is, and what to do."""


def unreadable(file: Path, error: Exception, expected: str, what: str = "") -> CheckpointError:
    """Say what a file is that cannot be read. Nothing of torch's own message is shown: it advises to run the code."""
    title, fix = what or "weights cannot be read", "copy it again"
    try:
        with file.open("rb") as stream:
            head = stream.read(256)
    except OSError as unopened:
        return CheckpointError(explain(title, str(file), unopened, expected, fix))
    begins = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    seen, fix = next((about for mark, about in BEGINNINGS.items() if begins.startswith(mark)), ("", fix))
    text = str(error)
    if not head:
        seen = "an empty file"
    elif not seen and head[8:9] == b"{" and file.suffix != ".safetensors":
        seen, fix = "a safetensors file under another ending", "rename it to .safetensors"
    elif not seen and file.suffix == ".safetensors":
        is_zip = zipfile.is_zipfile(file)
        seen, fix = ("a file of torch.save", "rename it to .pth") if is_zip else (text.splitlines()[0], fix)
    elif not seen and "TorchScript" in text:
        seen, fix = "a TorchScript archive", "save its state dict in the program that made it"
    elif not seen and (found := re.search(r"(?:GLOBAL|global|class) ([\w.]+)", text)):
        title = what or "the file holds more than tensors and is refused, because loading it could run code"
        seen = found[1]
        expected, fix = "tensors, numbers and text", "get the weights as safetensors"
    elif not seen and "weights_only" in text:
        seen = "no file that torch.save wrote, or a damaged one"
    return CheckpointError(explain(title, str(file), seen or text.partition("\n")[0], expected, fix))

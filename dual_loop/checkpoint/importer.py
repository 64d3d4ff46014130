"""Weights from files into the model: one call finds out what a path is, maps every name, and fills every parameter.

Strict in both directions: every key of a file is used exactly once or dropped for a stated reason, every parameter is
filled or the error names it. A mismatch is an error, never a repair. Nothing is changed before everything fits.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dual_loop.checkpoint.key_rules import (
    Layout,
    Placement,
    detect_layout,
    file_name,
    find_refused,
    place,
    rows,
    sources_of,
)
from dual_loop.checkpoint.sources import (
    Checkpoint,
    consolidate_zero,
    guess_load_checkpoint,
    is_zero_folder,
    open_checkpoint,
    split_parts,
)
from dual_loop.errors import CheckpointError, explain
from dual_loop.model.prompts import NEW_TOKENS

__all__ = [
    "ImportReport",
    "SourceReport",
    "brings_new_tokens",
    "describe_checkpoint",
    "guess_load_checkpoint",
    "load_weights",
    "match_keys",
]

LORA = (".lora_A.", ".lora_B.")
NEW_ROWS = "new_token_rows."
OWN_MODULE = "text_hidden_fcs."
TABLES = ("mllm.model.language_model.embed_tokens.weight", "mllm.lm_head.weight")
SHOWN = 10


@dataclass(frozen=True)
class SourceReport:
    """What one file or folder was, and what became of its tensors.

    Attributes:
        path, layout: the layout's name in :mod:`dual_loop.checkpoint.key_rules`.
        extent: ``full`` (all parts of Sa2VA), ``trimmed`` (what trains) or ``base`` (a model that it was made from).
        num_tensors, num_values: in the files.
        dropped: reason -> number of tensors.
        dtypes: dtype in the files -> number of tensors.
        sha256: file -> hash; empty where it was not asked for.
    """

    path: str
    layout: str
    extent: str
    num_tensors: int
    num_values: int
    dropped: Mapping[str, int]
    dtypes: Mapping[str, int]
    sha256: Mapping[str, str]

    def __str__(self) -> str:
        dropped = "".join(f"; {count} dropped ({why})" for why, count in self.dropped.items())
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        hashes = "".join(f"\n    sha256 {digest}  {name}" for name, digest in self.sha256.items())
        head = f"{self.path}: {self.layout}, {self.extent}, {self.num_tensors:,} tensors, {self.num_values:,} values"
        return f"{head} ({dtypes}){dropped}{hashes}"


@dataclass(frozen=True)
class ImportReport:
    """What was loaded from where; printed, and stored in the run folder.

    Attributes:
        sources: in the order they were loaded; a later one wins.
        num_matched: tensors of the model that were filled.
        fresh: group -> number of tensors that no source brings and that keep their initial values by rule.
        missing: names left at their initial values because a pattern of ``allow_missing`` allowed it.
        num_new_rows: vocabulary rows appended to a base model's tables.
    """

    sources: Sequence[SourceReport]
    num_matched: int
    fresh: Mapping[str, int] = field(default_factory=dict)
    missing: Sequence[str] = ()
    num_new_rows: int = 0

    def __str__(self) -> str:
        lines = [f"  {source}" for source in self.sources]
        fresh = "".join(f", {count} fresh ({group})" for group, count in self.fresh.items())
        grown = f", {self.num_new_rows} new vocabulary rows drawn" if self.num_new_rows else ""
        missing = f", {len(self.missing)} missing by permission: {', '.join(self.missing)}" if self.missing else ""
        return "\n".join([*lines, f"  {self.num_matched:,} tensors of the model filled{fresh}{grown}{missing}"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them."""
        return asdict(self)


@dataclass
class _Source:
    """One opened set of weights with the place of every key."""

    path: str
    layout: Layout
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    places: dict[str, list[Placement]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    checkpoint: Checkpoint | None = None
    loaded: Mapping[str, Tensor] | None = None

    def read(self) -> Iterator[tuple[str, Tensor]]:
        if self.loaded is not None:
            yield from self.loaded.items()
            return
        checkpoint = cast(Checkpoint, self.checkpoint)
        for file in checkpoint.files:
            yield from checkpoint.read(file)

    @property
    def targets(self) -> set[str]:
        return {placement.target for placements in self.places.values() for placement in placements}

    @property
    def extent(self) -> str:
        if self.layout.is_base:
            return "base"
        has_vision = any(target.startswith("mllm.model.vision_tower.") for target in self.targets)
        return "full" if has_vision else "trimmed"

    def report(self, hash_files: bool) -> SourceReport:
        values = sum(torch.Size(shape).numel() for shape, _ in self.tensors.values())
        dtypes = Counter(str(dtype).removeprefix("torch.") for _, dtype in self.tensors.values())
        hashes = self.checkpoint.hashes() if hash_files and self.checkpoint is not None else {}
        counts = (len(self.tensors), values, dict(self.dropped), dict(dtypes), hashes)
        return SourceReport(self.path, self.layout.name, self.extent, *counts)


def describe_checkpoint(path: str | Path) -> list[tuple[str, set[str]]]:
    """Return (layout name, native tensors it fills) of every set of weights behind ``path``, without loading any.

    Raises:
        CheckpointError: as :func:`load_weights`, as far as the files alone tell.
    """
    sources = _open_all([path])
    for source in sources:
        _place_all(source)
    return [(source.layout.name, source.targets) for source in sources]


def brings_new_tokens(paths: Sequence[str | Path], vocab_size: int) -> bool:
    """Tell whether the vocabulary tables of ``paths`` reach ``vocab_size``, the five new tokens included."""
    for source in _open_all(paths):
        _place_all(source)
        for name, placements in source.places.items():
            if any(p.target == TABLES[0] for p in placements) and source.tensors[name][0][0] >= vocab_size:
                return True
    return False


def match_keys(
    model: nn.Module, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> tuple[list[str], dict[str, int], int]:
    """Match names and shapes alone with ``model`` (also on ``meta``): no weights are needed or read.

    Args:
        tensors: key -> (shape, dtype) of one source.

    Returns:
        The problems, reason -> number of dropped keys, and how many of the model's tensors are filled.
    """
    own = dict(model.state_dict())
    source = _Source("keys", _layout(tensors, Path("keys")), tensors)
    problems = _place_all(source, own)
    _, _, absent = _missing(model, [source], own, ())
    return problems + absent, dict(source.dropped), len(source.targets & own.keys())


def load_weights(
    model: nn.Module,
    paths: str | Path | Sequence[str | Path],
    *,
    tokenizer: Any = None,
    allow_missing: Sequence[str] = (),
    hash_files: bool = False,
) -> ImportReport:
    """Fill ``model`` from one or several sources, keeping each parameter's dtype and device.

    Reads tensor by tensor and file by file: beside the model, at most one file is mapped at a time.

    Args:
        model: ``VideoLLaVASAMModel``.
        paths: sources, base models first; a later one wins. See :func:`sources.open_checkpoint` for what a path may be.
        tokenizer: checked against the vocabulary rows and, where a folder holds a tokenizer, against its ids.
        allow_missing: shell patterns of names of ``model.state_dict()`` that may stay at their initial values.
        hash_files: compute the SHA-256 of every file for the report.

    Raises:
        CheckpointError: a path cannot be read; an unknown, doubled or missing key; a shape that differs; a vocabulary
            that does not fit the tokenizer; an architecture that is not supported. All problems are listed.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    own = dict(model.state_dict())
    sources = _open_all(paths)
    problems = [problem for source in sources for problem in _place_all(source, own)]
    if tokenizer is not None:
        problems += [problem for path in paths for problem in check_tokenizer_folder(Path(path), tokenizer)]
    new_rows = _growth(sources, own, tokenizer)
    fresh, missing, absent = _missing(model, sources, own, allow_missing)
    _refuse(problems + absent, paths)
    with torch.no_grad():
        for source in sources:
            _fill(source, own, new_rows)
        if new_rows:
            _draw_rows(own, new_rows)
        _take_over_rows(model, sources)
    filled = {target for source in sources for target in source.targets}
    reports = [source.report(hash_files) for source in sources]
    return ImportReport(reports, len(filled), fresh, missing, new_rows)


def _open_all(paths: Sequence[str | Path]) -> list[_Source]:
    sources = []
    for path in paths:
        for _, part in split_parts(path):
            if is_zero_folder(part):
                loaded = consolidate_zero(part)
                infos = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in loaded.items()}
                sources.append(_Source(str(part), _layout(infos, part), infos, loaded=loaded))
            else:
                checkpoint = open_checkpoint(part)
                infos = {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()}
                sources.append(_Source(str(part), _layout(infos, part), infos, checkpoint=checkpoint))
    return sources


def _layout(names: Mapping[str, Any], path: Path) -> Layout:
    refused = find_refused(names)
    if refused is not None:
        raise CheckpointError(
            explain(
                f"the weights are of {refused[0]}, which is not supported",
                str(path),
                seen=f"key {refused[1]}",
                expected="InternVL2.5 with a Qwen2 language model (Sa2VA-1B, -4B) and SAM 2",
                fix="choose a checkpoint of Sa2VA-4B or Sa2VA-1B",
            )
        )
    layout = detect_layout(names)
    if layout is None:
        raise CheckpointError(
            explain(
                "the keys belong to no known layout",
                str(path),
                seen=", ".join(list(names)[:3]) or "no tensors",
                expected="Sa2VA (training or released), InternVL2.5, SAM 2, or an export of this package",
                fix="check that the path is the right file",
            )
        )
    return layout


def _place_all(source: _Source, own: Mapping[str, Tensor] | None = None) -> list[str]:
    """Find the place of every key; with ``own``, the model's tensors, return what does not fit."""
    problems: list[str] = []
    taken: dict[tuple[str, Any], str] = {}
    for name, (shape, _) in source.tensors.items():
        found = place(name, source.layout)
        if found is None or (own is not None and any(p.target not in own for p in found[0])):
            problems.append(_unknown(name, source, own or {}) if len(problems) < SHOWN else f"unknown key {name}")
            continue
        placements, dropped = found
        if dropped:
            source.dropped[dropped] += 1
        for placement in placements:
            slot = (placement.target, placement.target_part)
            if slot in taken:
                problems.append(f"doubled key: {name} and {taken[slot]} both mean {placement.target}")
            taken[slot] = name
            if own is not None:
                problems += _shape_problem(name, shape, placement, own[placement.target], source.layout)
        source.places[name] = placements
    return problems


def _shape_problem(name: str, shape: tuple[int, ...], placement: Placement, own: Tensor, layout: Layout) -> list[str]:
    expected = list(own.shape)
    for part, times in ((placement.target_part, False), (placement.source_part, True)):
        if part is not None:
            expected[0] = expected[0] * part[1] if times else expected[0] // part[1]
    if list(shape) == expected:
        return []
    if placement.target in TABLES and layout.is_base and shape[0] == expected[0] - len(NEW_TOKENS):
        return []
    hint = ""
    if placement.target in TABLES and shape[1:] == tuple(expected[1:]):
        hint = f" (rows of the vocabulary: {shape[0]} in the file, {expected[0]} tokens in the tokenizer)"
    elif any(part in placement.target for part in LORA):
        hint = " (another rank? see --lora_r)"
    return [f"{name}: shape {shape} in the file, {tuple(expected)} in the model{hint}"]


def _unknown(name: str, source: _Source, own: Mapping[str, Tensor]) -> str:
    known = {file_name(key, source.layout) for target in own for key, _, _ in sources_of(target, source.layout)}
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"unknown key {name}" + (f" (nearest: {close[0]})" if close else "")


def _missing(
    model: nn.Module, sources: Sequence[_Source], own: Mapping[str, Tensor], allow_missing: Sequence[str]
) -> tuple[dict[str, int], list[str], list[str]]:
    """Return what starts fresh by rule (counts), what the user allows to be missing, and the other absences."""
    filled = {(p.target, p.target_part) for source in sources for places in source.places.values() for p in places}
    has_lora = any(part in target for target, _ in filled for part in LORA)
    only_base = all(source.layout.is_base for source in sources)
    tied = bool(cast(Any, model).mllm.config.tie_word_embeddings)
    fresh: Counter[str] = Counter()
    allowed, absent = [], []
    for name in own:
        parts = {part for _, _, part in sources_of(name, sources[-1].layout)} or {None}
        if (name, None) in filled or all((name, part) in filled for part in parts):
            continue
        if any(part in name for part in LORA) and not has_lora:
            fresh["LoRA"] += 1
        elif name.startswith(NEW_ROWS):
            fresh["rows of new tokens, taken from the tables"] += 1
        elif name.startswith(OWN_MODULE) and only_base:
            fresh["text_hidden_fcs"] += 1
        elif name == TABLES[1] and tied:
            continue
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_missing):
            allowed.append(name)
        else:
            absent.append(_absence(name, sources))
    return dict(fresh), allowed, absent


def _absence(name: str, sources: Sequence[_Source]) -> str:
    keys = [file_name(key, sources[-1].layout) for key, _, _ in sources_of(name, sources[-1].layout)]
    hint = f" (expected as {keys[0]})" if keys and keys[0] != name else ""
    if name == TABLES[1]:
        hint += " (no head of its own: set model.text.tie_word_embeddings=True if the file's head is tied)"
    return f"missing {name}{hint}"


def _refuse(problems: Sequence[str], paths: Sequence[str | Path]) -> None:
    if not problems:
        return
    shown = "\n  ".join(problems[:SHOWN]) + (f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
    missing = sum(problem.startswith("missing ") for problem in problems)
    fix = "use the config that the weights were made for"
    if missing == len(problems) and missing > SHOWN:
        fix = (
            "a trimmed checkpoint or adapter needs its base: give the base model's folder as --model_path and SAM 2 as "
            "--sam2_path, or a full checkpoint as --pretrained_pth"
        )
    elif missing:
        fix += "; --allow_missing PATTERN leaves named tensors at their initial values"
    where = ", ".join(str(path) for path in paths)
    raise CheckpointError(
        explain(f"weights do not fit the model, {len(problems)} problem(s):\n  {shown}\n", where=where, fix=fix)
    )


def _fill(source: _Source, own: Mapping[str, Tensor], new_rows: int) -> None:
    for name, tensor in source.read():
        for placement in source.places[name]:
            target = rows(own[placement.target], placement.target_part)
            values = rows(tensor, placement.source_part)
            if new_rows and placement.target in TABLES and len(values) < len(target):
                target = target[: len(values)]
            target.copy_(values)


def _growth(sources: Sequence[_Source], own: Mapping[str, Tensor], tokenizer: Any) -> int:
    """Return how many vocabulary rows no source fills: those of the new tokens, over a base model."""
    best = 0
    for source in sources:
        for name, placements in source.places.items():
            if any(placement.target == TABLES[0] for placement in placements):
                best = max(best, source.tensors[name][0][0])
    return own[TABLES[0]].shape[0] - best if 0 < best < own[TABLES[0]].shape[0] else 0


def _draw_rows(own: Mapping[str, Tensor], count: int) -> None:
    """Draw rows of new tokens from a normal distribution with mean and covariance of the old ones.

    The rule of Hewitt (2021, "Initializing new word embeddings for pretrained language models"), which transformers
    applies when it resizes a table. The seed is fixed, so that all ranks draw the same.
    """
    generator = torch.Generator().manual_seed(0)
    for name in TABLES:
        table = own[name]
        old = table[:-count].float()
        centred = old - old.mean(0)
        # x = mean + z C / sqrt(n) with z standard normal over old rows has that covariance, without a factorisation.
        noise = torch.randn(count, len(old), generator=generator).to(old.device)
        table[-count:].copy_(old.mean(0) + 1e-3 * noise @ centred / len(old) ** 0.5)


def _take_over_rows(model: nn.Module, sources: Sequence[_Source]) -> None:
    whole = cast(Any, model)
    extra = getattr(model, "new_token_rows", None)
    brought = any(target.startswith(NEW_ROWS) for source in sources for target in source.targets)
    if extra is not None and not brought:
        extra.read_tables(whole.mllm.get_input_embeddings(), whole.mllm.lm_head)


def check_tokenizer_folder(path: Path, tokenizer: Any) -> list[str]:
    """Compare the ids of the five new tokens with those in a checkpoint folder's own tokenizer files, if it has any."""
    problems = []
    for file in (path / "added_tokens.json", path / "tokenizer.json"):
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            listed = content.get("added_tokens", content)
            ids = {item["content"]: item["id"] for item in listed} if isinstance(listed, list) else dict(listed)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{file}: not a tokenizer file ({type(error).__name__}: {error})")
            continue
        for token in NEW_TOKENS:
            own = tokenizer.convert_tokens_to_ids(token)
            if token in ids and ids[token] != own:
                problems.append(f"{file}: {token} has id {ids[token]}, the tokenizer in use says {own}")
    return problems

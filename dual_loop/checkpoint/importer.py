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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dual_loop.checkpoint.finite import find_not_finite
from dual_loop.checkpoint.key_rules import (
    Layout,
    Part,
    Placement,
    detect_layout,
    file_name,
    find_refused,
    place,
    rows,
    sources_of,
)
from dual_loop.checkpoint.sources import Checkpoint, TensorInfo, has_weights, open_parts
from dual_loop.checkpoint.sources import guess_load_checkpoint as guess_load_checkpoint  # the mission's place for it
from dual_loop.config import Config, hub_name
from dual_loop.errors import CheckpointError, explain, listed
from dual_loop.iteration import progress_bar
from dual_loop.model.adapters import GROUPS, reset_magnitudes, trainable_parameters
from dual_loop.model.build import TINY_WEIGHTS, build_model, build_tokenizer
from dual_loop.model.prompts import NEW_TOKENS
from dual_loop.model.sa2va import Sa2VA
from dual_loop.model.sa2va_api import VideoLLaVASAMModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LORA = GROUPS["lora"]
MAGNITUDE = ".lora_magnitude_vector"
NEW_ROWS = "new_token_rows."
OWN_MODULE = "text_hidden_fcs."
TABLES = ("mllm.model.language_model.embed_tokens.weight", "mllm.lm_head.weight")
VISION, GROUNDING = "mllm.model.vision_tower.", "grounding_encoder.vision_encoder."
MOST_PADDING = 1023
"""Rows that a table may have behind the tokenizer's tokens: Qwen2.5's have up to 400, so that their number is round."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
SHOWN = 10


@dataclass(frozen=True)
class SourceReport:
    """What one file or folder was, and what became of its tensors.

    ``extent`` is ``full`` (all parts of Sa2VA), ``trimmed`` (what trains) or ``base`` (a model that it was made from).
    ``dropped`` and ``dtypes`` count tensors by reason and by dtype in the files; ``sha256`` is by file, if asked for;
    ``hub`` is ``owner/name@commit`` of what lies in the cache of a hub.
    """

    path: str
    layout: str
    extent: str
    num_tensors: int
    num_values: int
    dropped: Mapping[str, int]
    dtypes: Mapping[str, int]
    sha256: Mapping[str, str]
    hub: str | None = None

    def __str__(self) -> str:
        dropped = "".join(f"; {count} dropped ({why})" for why, count in self.dropped.items())
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        hashes = "".join(f"\n    sha256 {digest}  {name}" for name, digest in self.sha256.items())
        head = f"{self.hub or self.path}: {self.layout}, {self.extent}, {self.num_tensors:,} tensors"
        return f"{head}, {self.num_values:,} values ({dtypes}){dropped}{hashes}"


@dataclass(frozen=True)
class ImportReport:
    """What was loaded from where; printed, and stored in the run folder.

    ``sources`` are in the order they were loaded. ``num_matched`` tensors of the model were filled; by rule ``fresh``
    ones (counted by group) keep their initial values, and by ``allow_missing`` those named in ``missing``;
    ``num_new_rows`` of the vocabulary were appended to a base model's tables.
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


class _Source:
    """One opened set of weights with the places of every key, and all ``targets`` of these.

    ``dropped`` counts keys without a place, ``vocabulary`` rows of the table of token embeddings (0 without one), and
    ``problems`` are what does not fit ``own``, the model's tensors; None asks nothing of a model. ``may_pad``: a
    tokenizer vouches that rows beyond the model's tables are no tokens.

    Raises:
        CheckpointError: the keys are of no known layout, or of an architecture that is not supported.
    """

    def __init__(self, checkpoint: Checkpoint, own: Mapping[str, Tensor] | None = None, may_pad: bool = False) -> None:
        self.checkpoint, self.layout, self.may_pad = checkpoint, _layout_of(checkpoint), may_pad
        beside = [file for name in TOKENIZER_FILES if (file := checkpoint.path / name).is_file()]
        known = f'"{NEW_TOKENS[0]}"'.encode()
        self.knows_new_tokens = not self.layout.is_base or any(known in file.read_bytes() for file in beside)
        self.places: dict[str, list[Placement]] = {}
        self.targets: set[str] = set()
        self.dropped: Counter[str] = Counter()
        self.vocabulary = 0
        self.problems: list[str] = []
        taken: dict[tuple[str, Part | None], str] = {}
        for name, info in checkpoint.tensors.items():
            found = place(name, self.layout)
            if found is None or (own is not None and any(p.target not in own for p in found[0])):
                near = self._nearest(name, own or {}) if len(self.problems) < SHOWN else ""
                near = " (DoRA adapters: set --use_dora on)" if MAGNITUDE in name else near
                self.problems.append(f"unknown key {name}{near}")
                continue
            self.places[name], dropped = found
            self.dropped.update([dropped] if dropped else [])
            for placement in self.places[name]:
                slot = (placement.target, placement.target_part)
                if slot in taken:
                    self.problems.append(f"doubled key: {name} and {taken[slot]} both mean {placement.target}")
                taken[slot] = name
                self.targets.add(placement.target)
                if placement.target == TABLES[0]:
                    # Rows that a base has where the new tokens go are padding, unless its own tokenizer knows these.
                    most = len(own[TABLES[0]]) if own is not None else info.shape[0]
                    self.vocabulary = min(info.shape[0], most if self.knows_new_tokens else most - len(NEW_TOKENS))
                if own is not None:
                    self._compare_shapes(name, info.shape, placement, own[placement.target])

    def _nearest(self, name: str, own: Mapping[str, Tensor]) -> str:
        known = {file_name(key, self.layout) for target in own for key, _, _ in sources_of(target, self.layout)}
        close = difflib.get_close_matches(name, sorted(known), n=1)
        return f" (nearest: {close[0]})" if close else ""

    def _compare_shapes(self, name: str, shape: tuple[int, ...], placement: Placement, own: Tensor) -> None:
        expected = list(own.shape)
        if placement.target_part is not None:
            expected[0] //= placement.target_part[1]
        if placement.source_part is not None:
            expected[0] *= placement.source_part[1]
        is_table = placement.target in TABLES
        more = shape[0] - expected[0] if shape else 0
        if self.may_pad and is_table and 0 < more <= MOST_PADDING and list(shape[1:]) == expected[1:]:
            self.dropped["rows of padding behind the vocabulary"] += more
            return
        if list(shape) == expected or (is_table and self.layout.is_base and shape[0] == expected[0] - len(NEW_TOKENS)):
            return
        hint = ""
        if is_table and list(shape[1:]) == expected[1:]:
            hint = f" (rows of the vocabulary: {shape[0]} in the file, {expected[0]} tokens in the tokenizer)"
        elif any(part in placement.target for part in LORA):
            hint = " (another rank? see --lora_r)"
        self.problems.append(f"{name}: shape {shape} in the file, {tuple(expected)} in the model{hint}")

    def read(self, broken: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield what has a place, by name; names of tensors that are not finite are put into ``broken``."""
        for name, tensor in self.checkpoint.read():
            if self.places[name]:
                broken.extend(find_not_finite(tensor, name))
                yield name, tensor

    def report(self, hash_files: bool) -> SourceReport:
        infos = self.checkpoint.tensors.values()
        dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
        has_vision = any(target.startswith(VISION) for target in self.targets)
        return SourceReport(
            path=str(self.checkpoint.path),
            layout=self.layout.name,
            extent="base" if self.layout.is_base else "full" if has_vision else "trimmed",
            num_tensors=len(infos),
            num_values=sum(torch.Size(info.shape).numel() for info in infos),
            dropped=dict(self.dropped),
            dtypes=dict(dtypes),
            sha256=self.checkpoint.hashes() if hash_files else {},
            hub=hub_name(self.checkpoint.path),
        )


# --- what a run starts from -----------------------------------------------------------------------------------------


def weights_sources(config: Config) -> list[Path]:
    """Return the sources of weights, base models first; empty for a random start.

    ``--pretrained_pth`` (else what the config names) comes last and wins. ``--sam2_path`` and the weights in
    ``--model_path`` are put before it, unless it brings all parts by itself, as a full Sa2VA checkpoint does.

    Raises:
        CheckpointError: a path cannot be read.
    """
    train, initial = config.train, config.model.initial_weights
    given = train.pretrained_pth or (TINY_WEIGHTS if initial == "tiny" else initial)
    last = [Path(given)] if given else []
    targets = {target for path in last for _, part in open_parts(path) for target in _Source(part).targets}
    if all(any(target.startswith(part) for target in targets) for part in (VISION, GROUNDING)):
        return last
    base = [Path(train.model_path)] if train.model_path and has_weights(train.model_path) else []
    if train.sam2_path:
        base.append(Path(train.sam2_path))
    return [*base, *last]


def tokenizer_folder(config: Config) -> str | None:
    """Return the folder to read the tokenizer from: ``--model_path``, else a pretrained folder that has one."""
    path = config.train.pretrained_pth
    if config.train.model_path is None and path and any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        return path
    return config.train.model_path


def brings_new_tokens(paths: Sequence[str | Path], vocab_size: int) -> bool:
    """Tell whether the sources hold trained rows of the five new tokens; else these rows have to train."""
    sources = [_Source(part) for path in paths for _, part in open_parts(path)]
    return any(source.vocabulary >= vocab_size for source in sources if source.knows_new_tokens)


def build_to_load(
    config: Config, sources: Sequence[Path], device: torch.device | str
) -> tuple[VideoLLaVASAMModel, PreTrainedTokenizerBase]:
    """Seed torch, and build the model that ``sources`` are to be loaded into; return its tokenizer too.

    The model is empty, on ``device``. Where it may keep something that no file brings, it is drawn on the CPU: that may
    be frozen, and in no checkpoint, and whoever builds a run's model again has to draw the same.
    """
    tokenizer = build_tokenizer(config.model, tokenizer_folder(config))
    drawn = not sources or bool(config.train.allow_missing)
    imported = brings_new_tokens(sources, len(tokenizer))
    torch.manual_seed(config.train.seed)
    place = "cpu" if drawn else str(device)
    return build_model(config, tokenizer, device=place, weights_imported=imported, drawn=drawn), tokenizer


# --- loading --------------------------------------------------------------------------------------------------------


def load_weights(
    model: Sa2VA,
    paths: str | Path | Sequence[str | Path],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_missing: Sequence[str] = (),
    hash_files: bool = False,
) -> ImportReport:
    """Fill ``model`` from one or several sources, keeping each parameter's dtype and device.

    Beside the model, at most one file is mapped at a time.

    Args:
        paths: sources, base models first; a later one wins. See :func:`sources.open_checkpoint` for what a path may be.
        tokenizer: checked against the vocabulary rows and, where a folder holds a tokenizer, against its ids.
        allow_missing: shell patterns of names of ``model.state_dict()`` that may stay at their initial values.
        hash_files: compute the SHA-256 of every file for the report.

    Raises:
        CheckpointError: a path cannot be read; an unknown, doubled or missing key; a shape that differs; a vocabulary
            that does not fit the tokenizer; an architecture that is not supported. All problems are listed. Or values
            that are not finite, by the names of their tensors; the model cannot be used then.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    own: Mapping[str, Tensor] = model.state_dict()
    sources, problems = _open_all(paths, own, tokenizer)
    fresh, missing, absent = _missing(model, sources, own, allow_missing)
    if problems or absent:
        raise CheckpointError(_refusal([*problems, *absent], paths))
    filled = {target for source in sources for target in source.targets}
    # Rows that no source fills are those of the new tokens, over a base model.
    num_rows, given = len(own[TABLES[0]]), max(source.vocabulary for source in sources)
    num_new = num_rows - given if given else 0
    broken: list[str] = []
    with torch.no_grad():
        for source in sources:
            for name, tensor in progress_bar("importing", "tensor", len(source.places), source.read(broken)):
                for placement in source.places[name]:
                    target = rows(own[placement.target], placement.target_part)
                    values = rows(tensor, placement.source_part)
                    if placement.target in TABLES:  # a file may have fewer rows, and more
                        count = min(len(values), num_rows - num_new)
                        target, values = target[:count], values[:count]
                    target.copy_(values)
        _refuse_not_finite(broken, paths)
        if num_new:
            _draw_rows(own, num_new)
        if model.new_token_rows is not None and not any(target.startswith(NEW_ROWS) for target in filled):
            model.new_token_rows.read_tables(model.mllm.get_input_embeddings(), model.mllm.lm_head)
        if not any(MAGNITUDE in target for target in filled):
            reset_magnitudes(model)
    return ImportReport([source.report(hash_files) for source in sources], len(filled), fresh, missing, num_new)


@torch.no_grad()
def read_trained(
    model: Sa2VA, paths: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Tensor]:
    """Return what the trainable parameters of ``model`` are in ``paths``, on its device; the model stays as it is.

    All that is frozen in the model must be the same in the files, or not be there. So the model is these other weights
    whenever the tensors stand in for its own (``model.stored_weights.weights``), and no second model is needed.

    Args:
        paths, tokenizer: as of :func:`load_weights`; adapters that no file brings are 0.

    Raises:
        CheckpointError: as :func:`load_weights`, or a frozen tensor differs. All problems are listed.
    """
    own: Mapping[str, Tensor] = model.state_dict()
    sources, problems = _open_all(paths, own, tokenizer)
    values = {name: torch.zeros_like(parameter) for name, parameter in trainable_parameters(model).items()}
    for name, value in values.items():
        if MAGNITUDE in name:  # 0 would be no matrix at all
            value.copy_(own[name.replace(f"{MAGNITUDE}.default", ".base_layer")].float().norm(dim=1))
    brought = {target for source in sources for target in source.targets}
    has_lora = any(part in target for target in brought for part in LORA)
    needed = [name for name in values if has_lora or not any(part in name for part in LORA)]
    problems += [f"missing {name}" for name in needed if name not in brought]
    different: dict[tuple[str, Part | None], None] = {}
    broken: list[str] = []
    for source in () if problems else sources:
        for name, tensor in source.read(broken):
            for placement in source.places[name]:
                target = rows(values.get(placement.target, own[placement.target]), placement.target_part)
                read = rows(tensor, placement.source_part)
                if placement.target in TABLES:
                    target, read = target[: len(read)], read[: len(target)]
                slot = (placement.target, placement.target_part)
                if placement.target in values:
                    target.copy_(read)
                elif torch.equal(target, read.to(target)):
                    different.pop(slot, None)  # a later source wins
                else:
                    different[slot] = None
    _refuse_not_finite(broken, paths)
    problems += [f"{name} is frozen here and differs" for name, _ in different]
    if problems:
        fix = "choose what was trained, LoRA apart and settings alike, from the weights that this model starts from"
        raise CheckpointError(_refusal(problems, paths, fix))
    return values


def match_keys(model: Sa2VA, shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], dict[str, int], int]:
    """Match names and shapes of a file's keys alone with ``model`` (also on ``meta``): no weights are needed or read.

    Returns:
        All problems (unknown, doubled and missing keys, shapes that differ), the dropped keys by reason, and how many
        of the model's tensors are filled.
    """
    own: Mapping[str, Tensor] = model.state_dict()
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
    source = _Source(Checkpoint(Path("keys"), tensors=infos), own, may_pad=True)
    _, _, absent = _missing(model, [source], own, ())
    return source.problems + absent, dict(source.dropped), len(source.targets & own.keys())


def _open_all(
    paths: Sequence[str | Path], own: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[list[_Source], list[str]]:
    sources = [_Source(part, own, tokenizer is not None) for path in paths for _, part in open_parts(path)]
    problems = [problem for source in sources for problem in source.problems]
    if tokenizer is not None:
        problems += [problem for path in paths for problem in _tokenizer_problems(Path(path), tokenizer)]
    return sources, problems


def _layout_of(checkpoint: Checkpoint) -> Layout:
    names, where = list(checkpoint.tensors), str(checkpoint.path)
    if refused := find_refused(names):
        what, seen = f"the weights are of {refused[0]}, which is not supported", f"key {refused[1]}"
        expected = "InternVL2.5 or 3 with a Qwen2 language model (Sa2VA-1B, -4B, -InternVL3-2B, -8B, -14B), SAM 2"
        raise CheckpointError(explain(what, where, seen, expected, "choose one of these checkpoints"))
    layout = detect_layout(names)
    if layout is None:
        seen = ", ".join(names[:3]) or "no tensors"
        expected = "Sa2VA (training or released), InternVL2.5, SAM 2, or an export of this package"
        fix = "check that the path is the right file"
        raise CheckpointError(explain("the keys belong to no known layout", where, seen, expected, fix))
    return layout


def _missing(
    model: Sa2VA, sources: Sequence[_Source], own: Mapping[str, Tensor], allow_missing: Sequence[str]
) -> tuple[dict[str, int], list[str], list[str]]:
    """Return what starts fresh by rule (counts), what the user allows to be missing, and the other absences."""
    filled = {(p.target, p.target_part) for source in sources for places in source.places.values() for p in places}
    has_lora = any(part in target for target, _ in filled for part in LORA)
    only_base, layout = all(source.layout.is_base for source in sources), sources[-1].layout
    fresh: Counter[str] = Counter()
    allowed, absent = [], []
    for name in own:
        keys = sources_of(name, layout)
        if (name, None) in filled or all((name, part) in filled for part in {part for _, _, part in keys} or {None}):
            continue
        if any(part in name for part in LORA) and not has_lora:
            fresh["LoRA"] += 1
        elif name.startswith(NEW_ROWS):
            fresh["rows of new tokens, taken from the tables"] += 1
        elif name.startswith(OWN_MODULE) and only_base:
            fresh["text_hidden_fcs"] += 1
        elif name == TABLES[1] and model.mllm.config.tie_word_embeddings:
            continue
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_missing):
            allowed.append(name)
        else:
            key = file_name(keys[0][0], layout) if keys else name
            hint = f" (expected as {key})" if key != name else ""
            if name == TABLES[1]:
                hint += " (no head of its own: set model.text.tie_word_embeddings=True if the file's head is tied)"
            absent.append(f"missing {name}{hint}")
    return dict(fresh), allowed, absent


def _refusal(problems: Sequence[str], paths: Sequence[str | Path], other_fix: str = "") -> str:
    shown = "\n  ".join(problems[:SHOWN]) + (f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
    missing = sum(problem.startswith("missing ") for problem in problems)
    fix = "use the config that the weights were made for"
    if missing == len(problems) and missing > SHOWN:
        fix = "a trimmed checkpoint or adapter needs its base: give the base model's folder as --model_path and SAM 2 "
        fix += "as --sam2_path, or a full checkpoint as --pretrained_pth"
    elif missing:
        fix += "; --allow_missing PATTERN leaves named tensors at their initial values"
    what = f"weights do not fit the model, {len(problems)} problem(s):\n  {shown}\n"
    return explain(what, ", ".join(str(path) for path in paths), fix=other_fix or fix)


def _refuse_not_finite(names: Sequence[str], paths: Sequence[str | Path]) -> None:
    if names:
        what, where = f"{len(names)} tensors of the weights are not finite", ", ".join(map(str, paths))
        fix = "take weights from before training diverged, or copy the file again"
        raise CheckpointError(explain(what, where, listed(names), "finite numbers", fix))


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


def _tokenizer_problems(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
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

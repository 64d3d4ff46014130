"""Measures data sets piece by piece: any number of ranks, killed and resumed at will, the same figures every time.

Entries are cut into chunks of eight, whatever the number of ranks; rank r of W measures the chunks r, r + W, ... and
appends one line a chunk to a file of its own. So every batch holds the same samples on 1 and on N ranks, nothing is
padded or counted twice, and a second start measures what is missing.

::

    OUTPUT_DIR/evaluation.json      what was measured, with which weights and protocol, and the figures
               regions.jsonl        one line a region (evaluation.measure), in the order of the data
               parts/               lines of chunks while it runs; removed at the end
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from dual_loop.config import DataConfig
from dual_loop.config.derived import has_held_out_masks
from dual_loop.data.dataset_builder import open_source
from dual_loop.data.index_file import replacing
from dual_loop.data.limits import open_file, parse_json, read_lines, use_limits
from dual_loop.data.prepare import sample_rng
from dual_loop.data.reader import Reader
from dual_loop.data.ref_video import RefVideos
from dual_loop.data.refcoco import RefCoco
from dual_loop.errors import ConfigError, SampleError, explain, shorten
from dual_loop.evaluation.measure import CHUNK, MeasuredRegion
from dual_loop.iteration import progress_bar
from dual_loop.types import SkippedRegion

PARTS, HEADER, REGIONS = "parts", "header.json", "regions.jsonl"


class SkippedEntry(TypedDict):
    """An entry, or a region of it, that could not be read, as results name it."""

    data: str
    entry: str
    reason: str
    message: str


OWN_REGIONS = 16
"""Most objects of an image of own masks that are measured while a run trains."""


@dataclass(frozen=True)
class MeasuredData:
    """One data set of an evaluation: its name in results, where it is read from, and how many entries count.

    ``trained_on`` says that the run that is measured has learnt from these entries.
    """

    name: str
    source: Reader
    limit: int | None = None
    trained_on: bool = False

    def __len__(self) -> int:
        return len(self.source) if self.limit is None else min(self.limit, len(self.source))

    @property
    def chunk(self) -> int:
        """Entries that are measured together: a video alone."""
        return 1 if isinstance(self.source, RefVideos) else CHUNK

    def load(self, index: int, seed: int) -> Any:
        """Read an entry: all its regions where the reader offers that, else those that the entry's own name draws.

        It is a ``RegionSample``, or a ``Clip`` of :class:`RefVideos`.
        """
        load_all: Callable[[int], Any] | None = getattr(self.source, "load_all", None)
        if load_all is not None:
            return load_all(index)
        return self.source.load(index, sample_rng(seed, f"{self.name}/{self.source.entry_id(index)}"))

    def skipped(self, index: int, fault: SampleError | SkippedRegion) -> SkippedEntry:
        entry, message = self.source.entry_id(index), str(fault)
        if isinstance(fault, SkippedRegion):
            entry, message = f"{entry}#{fault.region_id}", fault.message
        return SkippedEntry(data=self.name, entry=entry, reason=fault.reason, message=message)

    def description(self) -> dict[str, object]:
        """Return what identifies the data: name, size, first and last entry; and whether the run trained on it.

        ``protocol`` and ``judge`` are those of an evaluation set of the field (``data.eval_sets``).
        """
        ends = [self.source.entry_id(index) for index in {0, len(self) - 1}] if len(self) else []
        found = {"name": self.name, "entries": len(self), "ends": sorted(ends), "trained_on": self.trained_on}
        fixed = {key: getattr(self.source, key, "") for key in ("protocol", "judge")}
        return found | {key: text for key, text in fixed.items() if text}


def held_out(data: DataConfig) -> list[MeasuredData]:
    """Open the held-out sets: ``eval_dir``, and what :func:`held_out_masks` opens.

    Raises:
        ConfigError: a folder cannot be used.
    """
    use_limits(data)
    limit, found = data.eval_max_samples, []
    if data.eval_dir is not None:
        own = RefCoco(
            data.eval_dir,
            datasets=data.eval_datasets,
            split=data.eval_split,
            max_samples=limit,
            index_dir=data.index_dir,
        )
        found.append(MeasuredData(data.eval_split, own))
    if has_held_out_masks(data):
        masks = replace(data, masks_max_samples=limit, regions_per_image=OWN_REGIONS, region_choice="random")
        found.append(MeasuredData("masks", held_out_masks(masks)))
    return found


def held_out_masks(data: DataConfig) -> Reader:
    """Open ``eval_masks_dir``, or else the share ``val_fraction`` of the own masks."""
    if data.eval_masks_dir is None:
        return open_source("masks", data, is_val=True)
    return open_source("masks", replace(data, masks_dir=data.eval_masks_dir, masks_images=None, val_fraction=0.0))


def start(folder: Path, header: Mapping[str, object], writes: bool, overwrite: bool = False) -> None:
    """Prepare the folder, on the rank that writes, or find in it what an earlier start with the same header left.

    With ``overwrite`` an earlier measurement with another header, and a finished one, are removed.

    Raises:
        ConfigError: the folder holds something else.
    """
    path = folder / PARTS / HEADER
    fix = "choose another --output_dir, or replace what is there by --overwrite"
    seen = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    different = [key for key in header if seen and seen.get(key) != json.loads(json.dumps(header[key]))]
    if overwrite and (different or not seen):
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        (folder / REGIONS).unlink(missing_ok=True)
        seen = {}
    elif different:
        had, got = (", ".join(f"{key}: {str(one.get(key))[:60]}" for key in different) for one in (seen, header))
        raise ConfigError(explain("the folder holds another evaluation, half done", str(folder), had, got, fix))
    elif not seen and (folder / REGIONS).exists():
        raise ConfigError(explain("the folder holds a finished evaluation", str(folder), REGIONS, fix=fix))
    if writes and not seen:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def measure_chunks(
    folder: Path,
    data: Sequence[MeasuredData],
    measure: Callable[[Sequence[Any], str], list[MeasuredRegion]],
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    progress: str = "evaluation",
) -> None:
    """Measure this rank's chunks that are not there yet, in a folder that :func:`start` prepared.

    Args:
        measure: samples and the name of their data set to regions; of a video, whose frames it reads, it may raise
            SampleError.
        progress: name of the bar.
    """
    done = _read_parts(folder)
    mine = [piece for number, piece in enumerate(_pieces(data)) if number % world_size == rank]
    own = folder / PARTS / f"rank_{rank}_of_{world_size}.jsonl"
    with own.open("a", encoding="utf-8") as stream, progress_bar(progress, "chunk", len(mine)) as bar:
        if own.stat().st_size:
            stream.write("\n")  # a kill may have left half a line
        for one, chunk in mine:
            bar.update(1)
            if (one.name, chunk) in done:
                continue
            samples: list[Any] = []
            entries: dict[str, int] = {}
            skipped: list[SkippedEntry] = []
            for index in range(chunk * one.chunk, min((chunk + 1) * one.chunk, len(one))):
                try:
                    sample = one.load(index, seed)
                except SampleError as error:
                    skipped.append(one.skipped(index, error))
                else:
                    samples.append(sample)
                    skipped += [one.skipped(index, region) for region in sample.passed_over]
                    entries[f"{sample.source}/{sample.sample_id}"] = index
            regions: list[MeasuredRegion] = []
            try:
                regions = measure(samples, one.name) if samples else []
            except SampleError as error:
                if one.chunk > 1:
                    raise
                skipped.append(one.skipped(chunk, error))
            records = [{**region.to_json(), "entry": entries[region.image]} for region in regions]
            line = {"data": one.name, "chunk": chunk, "records": records, "skipped": skipped}
            stream.write(json.dumps(line) + "\n")
            stream.flush()


def join(folder: Path, data: Sequence[MeasuredData]) -> tuple[dict[str, list[MeasuredRegion]], list[SkippedEntry]]:
    """Return the regions of every data set in order, and what was skipped; write ``regions.jsonl``.

    Raises:
        ConfigError: a chunk is missing, so a rank did not finish.
    """
    found, pieces = _read_parts(folder), [(one.name, chunk) for one, chunk in _pieces(data)]
    missing = [piece for piece in pieces if piece not in found]
    if missing:
        seen = f"{len(missing)} of {len(pieces)} chunks are missing, the first: {missing[0]}"
        raise ConfigError(explain("the evaluation is not complete", str(folder), seen, fix="run the command again"))
    regions: dict[str, list[MeasuredRegion]] = {one.name: [] for one in data}
    for name, chunk in pieces:
        regions[name] += found[name, chunk][0]
    with replacing(folder / REGIONS) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(region.to_json()) + "\n" for own in regions.values() for region in own)
    return regions, [entry for piece in pieces for entry in found[piece][1]]


def read_predictions(path: Path) -> dict[str, list[object]]:
    """Return the masks of every region's sentences from a ``regions.jsonl``, or from any file of such lines.

    A mask is what the line holds, also where that is no run-length code; None where there is none.

    Raises:
        ConfigError: a line is not of a region, or says something else of a region than an earlier one; or no line.
    """
    masks: dict[str, list[object]] = {}
    with open_file(path) as stream:
        for number, line in enumerate(read_lines(stream), start=1):
            where, expected = f"{path}, line {number}", '{"name": "...", "sentences": [{"mask": ...}, ...]}'
            try:
                region = parse_json(line)
                answers = [*(region.get("sentences") or []), *(region.get("without_target") or [])]
                name, found = str(region["name"]), [one.get("mask") for one in answers]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ConfigError(explain("not a record of a region", where, shorten(line), expected)) from error
            if masks.setdefault(name, found) != found:
                fix = "keep one of the lines"
                raise ConfigError(explain("a region is predicted twice, in different ways", where, name, fix=fix))
    if not masks:
        raise ConfigError(explain("a file of predictions is empty", str(path), "no line", "a line for each region"))
    return masks


def _pieces(data: Sequence[MeasuredData]) -> list[tuple[MeasuredData, int]]:
    return [(one, chunk) for one in data for chunk in range(-(-len(one) // one.chunk))]


def _read_parts(folder: Path) -> dict[tuple[str, int], tuple[list[MeasuredRegion], list[SkippedEntry]]]:
    """Read the chunks of all ranks, of this start and earlier ones; a line cut off by a kill is left out."""
    chunks = {}
    for path in sorted((folder / PARTS).glob("rank_*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                line = json.loads(text)
                regions = [MeasuredRegion.from_json(record) for record in line["records"]]
                chunks[line["data"], line["chunk"]] = regions, line["skipped"]
    return chunks

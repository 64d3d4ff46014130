"""Measures data sets piece by piece: any number of ranks, killed and resumed at will, the same figures every time.

Entries are cut into chunks of eight, whatever the number of ranks; rank r of W measures the chunks r, r + W, ... and
appends one line a chunk to a file of its own. So every batch holds the same samples on 1 and on N ranks, nothing is
padded or counted twice, and a second start measures what is missing.

::

    OUTPUT_DIR/evaluation.json      what was measured, with which weights and protocol, and the figures
               regions.jsonl        one line a region (evaluation.regions), in the order of the data
               parts/               lines of chunks while it runs; removed at the end
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dual_loop.data.prepare import sample_rng
from dual_loop.data.reader import Reader
from dual_loop.errors import ConfigError, SampleError, explain
from dual_loop.evaluation.regions import Record
from dual_loop.types import RegionSample

CHUNK = 8
PARTS, HEADER, REGIONS = "parts", "header.json", "regions.jsonl"


@dataclass(frozen=True)
class MeasuredData:
    """One data set of an evaluation: its name in results, where it is read from, and how many entries count."""

    name: str
    source: Reader
    limit: int | None = None

    def __len__(self) -> int:
        return len(self.source) if self.limit is None else min(self.limit, len(self.source))

    def load(self, index: int, seed: int) -> RegionSample:
        """Read an entry: all its regions where the reader offers that, else those that the entry's own name draws."""
        load_all = getattr(self.source, "load_all", None)
        if load_all is not None:
            sample: RegionSample = load_all(index)
            return sample
        return self.source.load(index, sample_rng(seed, f"{self.name}/{self.source.entry_id(index)}"))

    def skipped(self, index: int, error: SampleError) -> dict[str, str]:
        """Return how a result names an entry that could not be read."""
        entry = {"data": self.name, "entry": self.source.entry_id(index), "reason": error.reason}
        return {**entry, "message": str(error)}


Measure = Callable[[Sequence[RegionSample], str], list[Record]]


def start(folder: Path, header: Mapping[str, Any], writes: bool) -> None:
    """Prepare the folder, or find in it what an earlier start of the same evaluation left.

    Args:
        folder: where results go.
        header: JSON values that say what is measured; an evaluation goes on only where they are the same.
        writes: whether this is the rank that writes.

    Raises:
        ConfigError: the folder holds something else.
    """
    path = folder / PARTS / HEADER
    if path.is_file():
        seen = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in header if seen.get(key) != json.loads(json.dumps(header[key]))]
        if different:
            raise ConfigError(
                explain(
                    "the folder holds another evaluation, half done",
                    str(folder),
                    ", ".join(f"{key}: {str(seen.get(key))[:60]}" for key in different),
                    ", ".join(f"{key}: {str(header[key])[:60]}" for key in different),
                    "choose another --output_dir, or remove this one",
                )
            )
    elif (folder / REGIONS).exists():
        raise ConfigError(
            explain("the folder holds a finished evaluation", str(folder), REGIONS, fix="choose another --output_dir")
        )
    elif writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def measure_chunks(
    folder: Path,
    data: Sequence[MeasuredData],
    measure: Measure,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure this rank's chunks that are not there yet.

    Args:
        folder: where results go, prepared by :func:`start`.
        data: the data sets.
        measure: samples and the name of their data set to records.
        seed: of the regions that readers draw.
        rank, world_size: this process.
        progress: told how many of this rank's chunks are done.
    """
    done = {(line["data"], line["chunk"]) for line in _lines(folder)}
    mine = [piece for number, piece in enumerate(_pieces(data)) if number % world_size == rank]
    own = folder / PARTS / f"rank_{rank}_of_{world_size}.jsonl"
    own.parent.mkdir(parents=True, exist_ok=True)
    with own.open("a", encoding="utf-8") as stream:
        if own.stat().st_size:
            stream.write("\n")  # a kill may have left half a line
        for number, (one, chunk) in enumerate(mine):
            if (one.name, chunk) not in done:
                stream.write(json.dumps(_measure_chunk(one, chunk, measure, seed)) + "\n")
                stream.flush()
            progress(number + 1, len(mine))


def _measure_chunk(data: MeasuredData, chunk: int, measure: Measure, seed: int) -> dict[str, Any]:
    samples, skipped, entries = [], [], {}
    for index in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(data))):
        try:
            sample = data.load(index, seed)
            samples.append(sample)
            entries[f"{sample.source}/{sample.sample_id}"] = index
        except SampleError as error:
            skipped.append(data.skipped(index, error))
    records = measure(samples, data.name) if samples else []
    for record in records:
        record["entry"] = entries[record["image"]]
    return {"data": data.name, "chunk": chunk, "records": records, "skipped": skipped}


def join(folder: Path, data: Sequence[MeasuredData]) -> tuple[dict[str, list[Record]], list[dict[str, str]]]:
    """Return the records of every data set in order, and what was skipped; write ``regions.jsonl``.

    Raises:
        ConfigError: a chunk is missing, so a rank did not finish.
    """
    found = {(line["data"], line["chunk"]): line for line in _lines(folder)}
    pieces = list(_pieces(data))
    missing = [(one.name, chunk) for one, chunk in pieces if (one.name, chunk) not in found]
    if missing:
        seen = f"{len(missing)} of {len(pieces)} chunks are missing, the first: {missing[0]}"
        raise ConfigError(explain("the evaluation is not complete", str(folder), seen, fix="run the command again"))
    records: dict[str, list[Record]] = {one.name: [] for one in data}
    skipped: list[dict[str, str]] = []
    temporary = folder / f".{REGIONS}"
    with temporary.open("w", encoding="utf-8") as stream:
        for one, chunk in pieces:
            line = found[one.name, chunk]
            skipped += line["skipped"]
            for record in line["records"]:
                records[one.name].append(record)
                stream.write(json.dumps(record) + "\n")
    temporary.replace(folder / REGIONS)
    return records, skipped


def finish(folder: Path) -> None:
    """Remove the parts of an evaluation that was joined."""
    shutil.rmtree(folder / PARTS)


def read_regions(path: Path) -> Iterator[Record]:
    """Yield the records of a ``regions.jsonl``, or of any file of the same lines.

    Raises:
        ConfigError: a line is no record.
    """
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                record = json.loads(line)
                record["name"]  # what every record has
            except (ValueError, TypeError, KeyError) as error:
                where = f"{path}, line {number}"
                raise ConfigError(explain("not a record of a region", where, line[:60], '{"name": ...}')) from error
            yield record


def _pieces(data: Sequence[MeasuredData]) -> Iterator[tuple[MeasuredData, int]]:
    for one in data:
        for chunk in range(-(-len(one) // CHUNK)):
            yield one, chunk


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of all ranks, of this start and earlier ones; a line cut off by a kill is left out."""
    for path in sorted((folder / PARTS).glob("rank_*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield dict(json.loads(line))
            except ValueError:
                continue

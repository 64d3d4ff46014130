"""The union of the data sets: readers from a config, shares, the data set that workers read, and the skip ledger.

    sources = build_sources(config.data)
    dataset = build_dataset(config, geometry, sources)
    sampler = WindowedBatchSampler(dataset.stream, batch_size, world_size, rank, accumulation)
    for batch in build_loader(dataset, sampler, num_workers=2): ...

A bad sample is never silent: the next entry of the same source takes its place by a fixed rule, the batch carries a
:class:`SkippedSample` with the reason, and a :class:`SkipLedger` counts, logs and, past a set fraction, stops.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dual_loop.config import Config, DataConfig
from dual_loop.data.images import load_sample
from dual_loop.data.leakage import guard
from dual_loop.data.mixture import DrawKey, DrawStream, SourceShare, WindowedBatchSampler
from dual_loop.data.prepare import Geometry, Prepared, collate, prepare_sample, region_seed, sample_rng
from dual_loop.errors import ConfigError, DualLoopError, SampleError, explain
from dual_loop.iteration import evenly_spread
from dual_loop.types import Batch, RegionSample, RegionSource, SkippedSample

logger = logging.getLogger(__name__)

# Source name -> prefix of its settings in DataConfig.
SETTING_PREFIX = {"sav": "sav", "sa1b": "sa1b", "openimages": "openimage", "refcoco": "refcoco", "masks": "masks"}
MAX_TRIES = 32
_NUM_PROBES = 16


class TooManyBadSamples(SampleError):
    """So many samples are bad that training would not be on the data that was asked for.

    Args:
        message: the full message. (One argument, so that a loader worker can pass the error on with its type.)
    """

    def __init__(self, message: str) -> None:
        super().__init__("too_many_bad_samples", message)

    def __reduce__(self) -> tuple[type, Any]:
        return type(self), (str(self),)


# --- from a config to sources ----------------------------------------------------------------------------------------


def build_sources(data: DataConfig) -> list[RegionSource]:
    """Open every data set whose directory is given, in the order of :data:`SETTING_PREFIX`.

    Raises:
        ConfigError: no directory is given, or some of them cannot be used; the message lists all of these.
    """
    given = {name: getattr(data, f"{prefix}_dir") for name, prefix in SETTING_PREFIX.items()}
    given = {name: path for name, path in given.items() if path is not None}
    if not given:
        flags = ", ".join(f"--{prefix}_dir" for prefix in SETTING_PREFIX.values())
        raise ConfigError(explain("no data set is given", "data", fix=f"set at least one of {flags}"))
    # All folders are looked at before any is read: listing a large one can take minutes.
    problems = [
        explain("no such folder", f"data.{SETTING_PREFIX[name]}_dir", path)
        for name, path in given.items()
        if not has_root(name, path)
    ]
    sources: list[RegionSource] = []
    for name in given if not problems else ():
        try:
            sources.append(_READERS[name](data))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problem(s) with the data sets:\n{listing}")
    return sources


def has_root(name: str, path: str) -> bool:
    """Tell whether the root of a data set is there: a folder; of a user's own masks also a file."""
    root = Path(path).expanduser()
    return root.is_dir() or (name == "masks" and root.is_file())


def open_source(name: str, data: DataConfig) -> RegionSource:
    """Open the one data set called ``name``, whose directory is given.

    Raises:
        ConfigError: it cannot be used.
    """
    field = f"{SETTING_PREFIX[name]}_dir"
    path = getattr(data, field)
    if not has_root(name, path):
        raise ConfigError(explain("no such folder", f"data.{field}", path))
    return _READERS[name](data)


def build_training_sources(data: DataConfig) -> list[RegionSource]:
    """Open the data sets and apply the leakage guard.

    Raises:
        ConfigError: see :func:`build_sources` and :func:`dual_loop.data.leakage.guard`.
    """
    return guard(build_sources(data), data)


def _open_sav(data: DataConfig) -> RegionSource:
    """``auto`` takes frame pairs where there are any; without pairs and videos the error is that of pairs."""
    from dual_loop.data.sav import SavPairs

    root = _given(data.sav_dir)
    no_pairs: ConfigError | None = None
    if data.sav_format != "videos":
        try:
            return SavPairs(root, data.sav_max_samples, index_dir=data.index_dir)
        except ConfigError as error:
            if data.sav_format == "pairs" or not Path(root).is_dir():
                raise
            no_pairs = error
    try:
        return _open_videos(root, data)
    except ConfigError:
        if no_pairs is not None:
            raise no_pairs from None
        raise


def _open_videos(root: str | Path, data: DataConfig) -> RegionSource:
    from dual_loop.data.sav_video import SavVideos

    limits = (data.sav_min_seconds, data.sav_max_seconds, data.sav_min_area)
    return SavVideos(root, data.sav_max_samples, data.regions_per_image, data.sav_masklets, *limits, data.index_dir)


def _open_sa1b(data: DataConfig) -> RegionSource:
    from dual_loop.data.sa1b import Sa1b

    return Sa1b(
        _given(data.sa1b_dir),
        data.sa1b_max_samples,
        regions_per_image=data.regions_per_image,
        min_area=data.sa1b_min_area,
        max_area=data.sa1b_max_area,
        min_predicted_iou=data.sa1b_min_predicted_iou,
        min_stability_score=data.sa1b_min_stability_score,
        index_dir=data.index_dir,
    )


def _open_open_images(data: DataConfig) -> RegionSource:
    from dual_loop.data.open_images import OpenImages

    return OpenImages(
        _given(data.openimage_dir),
        data.openimage_max_samples,
        regions_per_image=data.regions_per_image,
        csv=data.openimage_csv,
        classes=data.openimage_classes,
        images=data.openimage_images,
        masks=data.openimage_masks,
        index_dir=data.index_dir,
    )


def _open_refcoco(data: DataConfig) -> RegionSource:
    from dual_loop.data.refcoco import RefCoco

    return RefCoco(
        _given(data.refcoco_dir),
        datasets=data.refcoco_datasets,
        split=data.refcoco_split,
        max_samples=data.refcoco_max_samples,
        regions_per_image=data.regions_per_image,
        images=data.refcoco_images,
        index_dir=data.index_dir,
    )


def _open_masks(data: DataConfig) -> RegionSource:
    from dual_loop.data.masks_dir import MasksDir

    return MasksDir(
        _given(data.masks_dir),
        data.masks_max_samples,
        regions_per_image=data.regions_per_image,
        min_area=data.masks_min_area,
        max_area=data.masks_max_area,
        images=data.masks_images,
        index_dir=data.index_dir,
    )


def _given(path: str | None) -> Path:
    assert path is not None, "readers are opened only where a directory is given"
    return Path(path).expanduser()


_READERS: Mapping[str, Callable[[DataConfig], RegionSource]] = {
    "sav": _open_sav,
    "sa1b": _open_sa1b,
    "openimages": _open_open_images,
    "refcoco": _open_refcoco,
    "masks": _open_masks,
}


def build_draw_stream(sources: Sequence[RegionSource], data: DataConfig, seed: int) -> DrawStream:
    """Return the stream over ``sources`` with the repeats and weights of ``data`` (1 pass, no weight for others).

    Raises:
        ConfigError: the shares are impossible, see :func:`dual_loop.data.mixture.compute_quotas`.
    """
    shares = []
    for source in sources:
        prefix = SETTING_PREFIX.get(source.name)
        repeats = 1.0 if prefix is None else getattr(data, f"{prefix}_repeats")
        weight = None if prefix is None else getattr(data, f"{prefix}_weight")
        length = len(source)
        # First, last and some between; all names of 11 million images would make every start slow.
        probes = tuple(source.entry_id(place) for place in evenly_spread(length, _NUM_PROBES))
        shares.append(SourceShare(source.name, length, repeats, weight, probes))
    return DrawStream(shares, seed)


def describe(sources: Sequence[RegionSource], stream: DrawStream) -> str:
    """Return a table: one row a source (entries, repeats or weight, draws per epoch) and a last row with the totals."""
    rows = [("source", "entries", "share", "draws per epoch")]
    for source, share, quota in zip(sources, stream.shares, stream.quotas, strict=True):
        kind = f"repeats {share.repeats:g}" if share.weight is None else f"weight {share.weight:g}"
        rows.append((source.name, f"{share.length:,}", kind, f"{quota:,}"))
    total = sum(share.length for share in stream.shares)
    rows.append(("total", f"{total:,}", "", f"{stream.epoch_length:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows
    ]
    return "\n".join(lines)


# --- the data set ----------------------------------------------------------------------------------------------------


class DualLoopDataset(Dataset[Prepared]):
    """All sources as one map-style data set over :class:`DrawKey`; what a key gives depends on nothing else.

    Args:
        sources: the readers.
        stream: the draws over these sources; it also says what replaces a bad sample.
        geometry: sizes of the model.
        seed: of the random choices inside samples.
        keep_samples: put the :class:`RegionSample` into every batch. Full images then travel between processes.
        decode_scale: ``full``, or ``needed``: JPEGs are decoded at a smaller scale where the model needs no more. A
            sample that is kept or asked for by :meth:`sample` is always in full.
    """

    def __init__(
        self,
        sources: Sequence[RegionSource],
        stream: DrawStream,
        geometry: Geometry,
        seed: int,
        keep_samples: bool = False,
        decode_scale: str = "full",
    ) -> None:
        self.sources = tuple(sources)
        self.stream = stream
        self.geometry = geometry
        self.seed = seed
        self.keep_samples = keep_samples
        self.decode_scale = decode_scale

    def __len__(self) -> int:
        """Return the number of entries of all sources (keys are endless)."""
        return sum(share.length for share in self.stream.shares)

    def __getitem__(self, key: DrawKey) -> Prepared:
        """Return the sample of ``key``, or the first good one of those that replace it, with what was skipped.

        Raises:
            TooManyBadSamples: no good one among the first 32 (or all, in a smaller source).
            DualLoopError: a reader failed by anything but a ``SampleError``; the message names the sample.
        """
        return self._first_good(key, self.keep_samples)

    def sample(self, key: DrawKey) -> RegionSample:
        """Return the region sample that ``dataset[key]`` was made from (reads it again; for example panels)."""
        sample = self._first_good(key, keep_sample=True).sample
        assert sample is not None, "the sample was asked for"
        return sample

    def _first_good(self, key: DrawKey, keep_sample: bool) -> Prepared:
        skipped: list[SkippedSample] = []
        num_tries = min(MAX_TRIES, self.stream.shares[key.source_index].length)
        for attempt in range(num_tries):
            candidate = self.stream.substitute(key, attempt) if attempt else key
            source = self.sources[key.source_index]
            name = source.entry_id(candidate.entry)
            try:
                prepared = self._prepare(source, candidate, keep_sample)
            except SampleError as error:
                skipped.append(SkippedSample(source.name, name, error.reason, str(error)))
            except Exception as error:
                what = "reading a sample failed in a way that is not a bad sample"
                seen = f"{type(error).__name__}: {error}"
                raise DualLoopError(explain(what, f"{source.name}/{name}", seen, fix="see the cause above")) from error
            else:
                return dataclasses.replace(prepared, skipped=skipped)
        reasons = Counter(skip.reason for skip in skipped)
        raise TooManyBadSamples(
            explain(
                f"{num_tries} samples in a row cannot be used",
                f"{skipped[0].source}/{skipped[0].sample_id} and what would replace it",
                ", ".join(f"{reason} x {count}" for reason, count in reasons.most_common()),
                "a good sample",
                f"mend the data set or leave it out; the last one: {skipped[-1].message}",
            )
        )

    def _prepare(self, source: RegionSource, key: DrawKey, keep_sample: bool) -> Prepared:
        rng = sample_rng(self.seed, key.slot)
        is_reduced = self.decode_scale == "needed" and not keep_sample
        sample = load_sample(source, key.entry, rng, self.geometry.needed_size if is_reduced else None)
        seeds = [region_seed(self.seed, key.slot, position) for position in range(sample.num_regions)]
        return prepare_sample(sample, self.geometry, rng, seeds, keep_sample=keep_sample)


def build_dataset(
    config: Config,
    geometry: Geometry,
    sources: Sequence[RegionSource] | None = None,
    *,
    keep_samples: bool = False,
) -> DualLoopDataset:
    """Return the training data of ``config``; ``.stream`` is what a :class:`WindowedBatchSampler` takes.

    Args:
        config: directories, caps, repeats, weights (``data``) and the seed (``train``).
        geometry: sizes of the model, from ``model.build.geometry``.
        sources: readers to use instead of those of the config, for example a source of your own.
        keep_samples: put the region samples into the batches.

    Raises:
        ConfigError: see :func:`build_sources` and :func:`build_draw_stream`.
    """
    readers = build_training_sources(config.data) if sources is None else list(sources)
    stream = build_draw_stream(readers, config.data, config.train.seed)
    return DualLoopDataset(readers, stream, geometry, config.train.seed, keep_samples, config.data.decode_scale)


def build_loader(
    dataset: DualLoopDataset,
    batch_sampler: WindowedBatchSampler,
    num_workers: int = 0,
    pin_memory: bool = False,
    seed: int = 0,
) -> DataLoader[Batch]:
    """Return an endless loader of batches in the sampler's order, whatever the number of workers.

    Args:
        dataset: what to read.
        batch_sampler: which draws, in which order.
        num_workers: processes that read; 0 reads in this one.
        pin_memory: copy batches into pinned memory, for faster transfer to a GPU.
        seed: of the workers' global generators, which nothing here uses. Without it the loader would draw from
            torch's global generator, and a resumed run would differ from a straight one.
    """
    # torch types a loader by what the data set returns; collate_fn turns a list of Prepared into a Batch.
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=num_workers > 0,
    )
    return loader


def prepare_worker(worker_id: int) -> None:
    """Set up a loader worker: one thread, and no end by a signal that is sent to the whole group of processes.

    The terminal and SLURM send SIGINT and SIGTERM to everybody. The main process handles them: it finishes its step,
    saves, and then ends its workers; a worker that died first would turn a clean stop into a crash. SIGTERM from the
    main process itself does end a worker: Python and torch need that where a loader was not shut down in order.
    Workers whose main process is gone end by themselves.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux; elsewhere the sender is unknown, and SIGTERM keeps ending the worker
        # Blocked here and so in every thread started later, the signal stays pending until the thread takes it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


# --- what was skipped ------------------------------------------------------------------------------------------------


class SkipLedger:
    """Counts skipped samples in the main process, logs each once, and stops a run that skips too many.

    Args:
        max_bad_fraction: of the samples of a source that were tried, how many may be bad; 1 never stops.
        max_bad_grace: how many samples of a source must have been tried before the fraction is looked at.
    """

    def __init__(self, max_bad_fraction: float, max_bad_grace: int) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.max_bad_grace = max_bad_grace
        self._good: Counter[str] = Counter()
        self._events: Counter[tuple[str, str]] = Counter()
        self._distinct: dict[str, set[str]] = {}

    @property
    def num_events(self) -> int:
        """How often a sample was skipped; a sample met twice counts twice."""
        return self._events.total()

    @property
    def num_distinct(self) -> int:
        """How many different samples were skipped."""
        return sum(len(ids) for ids in self._distinct.values())

    def record(self, skipped: Sequence[SkippedSample], consumed: Mapping[str, int]) -> None:
        """Count skipped samples, and good ones by source. With the same input all ranks stop together.

        Raises:
            TooManyBadSamples: a source is past ``max_bad_fraction``.
        """
        self._good.update(consumed)
        for skip in skipped:
            self._events[skip.source, skip.reason] += 1
            known = self._distinct.setdefault(skip.source, set())
            if skip.sample_id not in known:
                known.add(skip.sample_id)
                logger.warning(
                    "Warning: skipped %s/%s (%s): %s", skip.source, skip.sample_id, skip.reason, skip.message
                )
        for source in sorted(self._distinct):
            self._check(source)

    def _check(self, source: str) -> None:
        reasons = {reason: count for (name, reason), count in sorted(self._events.items()) if name == source}
        num_bad = sum(reasons.values())
        num_tried = self._good[source] + num_bad
        if num_tried < self.max_bad_grace or num_bad <= self.max_bad_fraction * num_tried:
            return
        raise TooManyBadSamples(
            explain(
                "too many samples are bad",
                f"{source} ({len(self._distinct[source])} different samples)",
                f"{num_bad} of {num_tried} tried: " + ", ".join(f"{r} x {n}" for r, n in reasons.items()),
                f"at most a fraction of {self.max_bad_fraction:g} (data.max_bad_fraction)",
                "mend the samples named in the warnings, leave the source out, or raise data.max_bad_fraction",
            )
        )

    def as_counters(self) -> dict[str, int]:
        """Return ``data/bad_samples`` (events), ``data/bad_samples_distinct``, and events by source and reason."""
        counters = {"data/bad_samples": self.num_events, "data/bad_samples_distinct": self.num_distinct}
        for (source, reason), count in sorted(self._events.items()):
            counters[f"data/bad_samples/{source}/{reason}"] = count
        return counters

    def state_dict(self) -> dict[str, Any]:
        """Return all counts, as JSON holds them."""
        return {
            "good": dict(self._good),
            "events": [[source, reason, count] for (source, reason), count in sorted(self._events.items())],
            "distinct": {source: sorted(ids) for source, ids in self._distinct.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; limits stay those of this ledger."""
        self._good = Counter(state["good"])
        self._events = Counter({(source, reason): count for source, reason, count in state["events"]})
        self._distinct = {source: set(ids) for source, ids in state["distinct"].items()}

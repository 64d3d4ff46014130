"""From a config to the training data: readers, their shares of an epoch, the data set and its loader.

    sources = build_sources(config.data)
    dataset = build_dataset(config, geometry, sources)
    sampler = WindowedBatchSampler(dataset.stream, batch_size, world_size, rank, accumulation)
    for batch in build_loader(dataset, sampler, num_workers=2): ...

The next entry of the same source takes the place of a bad sample by a fixed rule, the batch carries a
:class:`SkippedSample` with the reason, and ``dataset.SkipLedger`` counts, logs and, past a set fraction, stops.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dual_loop.config import Config, DataConfig
from dual_loop.data.dataset import DualLoopDataset
from dual_loop.data.index import CHECKED
from dual_loop.data.leakage import guard
from dual_loop.data.limits import limits_in_use, use_limits
from dual_loop.data.masks_dir import MasksDir
from dual_loop.data.mixture import DrawStream, WindowedBatchSampler
from dual_loop.data.names import SETTING_PREFIX
from dual_loop.data.open_images import OpenImages
from dual_loop.data.prepare import Geometry, collate
from dual_loop.data.reader import Reader
from dual_loop.data.refcoco import RefCoco
from dual_loop.data.sa1b import Sa1b
from dual_loop.data.sav import SavPairs
from dual_loop.data.sav_video import SavVideos
from dual_loop.data.shares import SourceShare
from dual_loop.errors import ConfigError, explain
from dual_loop.iteration import evenly_spread
from dual_loop.types import Batch

# The reader of a source, and its own arguments: each is the setting of that name behind the prefix.
READERS: dict[str, tuple[Callable[..., Reader], tuple[str, ...]]] = {
    "sa1b": (Sa1b, ("min_area", "max_area", "min_predicted_iou", "min_stability_score")),
    "openimages": (OpenImages, ("csv", "classes", "images", "masks")),
    "refcoco": (RefCoco, ("datasets", "split", "images")),
    "masks": (MasksDir, ("min_area", "max_area", "images", "void", "crowds")),
}
_NUM_PROBES = 16


def build_sources(data: DataConfig) -> list[Reader]:
    """Open every data set whose directory is given, in the order of :data:`SETTING_PREFIX`.

    Raises:
        ConfigError: no directory is given, or some of them cannot be used; the message lists all of these.
    """
    # All folders are looked at first: listing a large one can take minutes.
    problems, sources = missing_roots(data), list[Reader]()
    for name in given_roots(data) if not problems else ():
        try:
            sources.append(open_source(name, data))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problem(s) with the data sets:\n{listing}")
    return sources


def given_roots(data: DataConfig) -> dict[str, str]:
    """Return the directory of every data set that has one, by the name of its source."""
    roots = {name: getattr(data, f"{prefix}_dir") for name, prefix in SETTING_PREFIX.items()}
    return {name: path for name, path in roots.items() if path is not None}


def missing_roots(data: DataConfig) -> list[str]:
    """Return what is wrong with the given directories at first sight, one message each; none given is wrong too."""
    given = given_roots(data)
    if not given:
        flags = ", ".join(f"--{prefix}_dir" for prefix in SETTING_PREFIX.values())
        return [explain("no data set is given", "data", fix=f"set at least one of {flags}")]
    missing = {f"data.{SETTING_PREFIX[name]}_dir": path for name, path in given.items() if not has_root(name, path)}
    return [explain("no such folder", setting, path) for setting, path in missing.items()]


def has_root(name: str, path: str) -> bool:
    """Tell whether the root of a data set is there: a folder; of a user's own masks also a file."""
    root = Path(path).expanduser()
    return root.is_dir() or (name == "masks" and root.is_file())


def open_source(name: str, data: DataConfig, **further: Any) -> Reader:
    """Open the one data set called ``name``, whose directory is given; ConfigError where it cannot be used."""
    use_limits(data)
    prefix = SETTING_PREFIX[name]
    path = getattr(data, f"{prefix}_dir")
    if not has_root(name, path):
        raise ConfigError(explain("no such folder", f"data.{prefix}_dir", path))
    if name == "sav":
        return _open_sav(path, data)
    reader, arguments = READERS[name]
    own = {argument: getattr(data, f"{prefix}_{argument}") for argument in ("max_samples", *arguments)}
    if name == "masks":
        own |= further | {"allow_absolute_paths": data.allow_absolute_paths, "left_to_val": data.val_fraction}
    source = reader(path, **own, regions_per_image=data.regions_per_image, index_dir=data.index_dir)
    if data.class_captions != "off":
        source.read_classes()
    source.region_choice, source.class_captions, source.exif = data.region_choice, data.class_captions, data.exif
    return source


def _open_sav(root: str, data: DataConfig) -> Reader:
    """``auto`` takes frame pairs where there are any; without pairs and videos the error is that of pairs."""
    no_pairs: ConfigError | None = None
    if data.sav_format != "videos":
        try:
            return SavPairs(root, data.sav_max_samples, data.index_dir, data.sav_frames)
        except ConfigError as error:
            if data.sav_format == "pairs":
                raise
            no_pairs = error
    limits = (data.sav_min_seconds, data.sav_max_seconds, data.sav_min_area)
    arguments = (root, data.sav_max_samples, data.regions_per_image, data.sav_masklets, *limits)
    try:
        return SavVideos(*arguments, data.index_dir, data.sav_frames)
    except ConfigError as error:
        folder = Path(root).expanduser()
        if any(folder.glob("JPEGImages_24fps")) or any(folder.glob("*/JPEGImages_24fps")):
            what, expected = "the val and test sets of SA-V are not read: they evaluate tracking", "videos of sav_train"
            raise ConfigError(explain(what, root, "a folder JPEGImages_24fps", expected, "leave it out")) from None
        raise no_pairs or error from None


def build_draw_stream(sources: Sequence[Reader], data: DataConfig, seed: int) -> DrawStream:
    """Return the stream over ``sources`` with the repeats and weights of ``data`` (1 pass, no weight for others)."""
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


def describe(sources: Sequence[Reader], stream: DrawStream) -> str:
    """Return a table: one row a source (entries, repeats or weight, draws per epoch), the totals, what is left out."""
    rows = [("source", "entries", "share", "draws per epoch")]
    for source, share, quota in zip(sources, stream.shares, stream.quotas, strict=True):
        kind = f"repeats {share.repeats:g}" if share.weight is None else f"weight {share.weight:g}"
        rows.append((source.name, f"{share.length:,}", kind, f"{quota:,}"))
    total = sum(share.length for share in stream.shares)
    rows.append(("total", f"{total:,}", "", f"{stream.epoch_length:,}"))
    a, b, c, d = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [f"  {row[0]:<{a}}  {row[1]:>{b}}  {row[2]:<{c}}  {row[3]:>{d}}" for row in rows]
    lines += [f"  {one.name}: {one.contents}" for one in sources if getattr(one, "contents", "")]
    return "\n".join([*lines, *(f"  left out of {name}: {text}" for name, text in left_out_of(sources))])


def check_costs() -> list[str]:
    """Return for each kind of index that was found stored how many paths were looked at for changes, and how long."""
    return [
        f"index of {kind}: {count:,} paths looked at for changes in {seconds:.2f} s"
        for kind, (count, seconds) in CHECKED.items()
    ]


def left_out_of(sources: Sequence[Reader]) -> list[tuple[str, str]]:
    """Return for each source that leaves something out its name, and what and how many."""
    found = []
    for source in sources:
        counts = getattr(source, "left_out", {})  # a user's own source need not be a Reader
        text = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        found += [(source.name, text)] if text else []
    return found


def build_dataset(config: Config, geometry: Geometry, sources: Sequence[Reader] | None = None) -> DualLoopDataset:
    """Return the training data of ``config``; ``.stream`` is what a :class:`WindowedBatchSampler` takes.

    ``sources`` are readers to use instead of those of the config, for example a source of your own.

    Raises:
        ConfigError: see :func:`build_sources`, :func:`~dual_loop.data.leakage.guard`, :func:`build_draw_stream`.
    """
    readers = guard(build_sources(config.data), config.data) if sources is None else list(sources)
    stream = build_draw_stream(readers, config.data, config.train.seed)
    # Colours choose hard regions, and must not depend on the scale: panels read samples again in full.
    scale = "full" if config.data.region_choice == "hard" else config.data.decode_scale
    return DualLoopDataset(readers, stream, geometry, config.train.seed, scale)


def build_loader(
    dataset: DualLoopDataset,
    batch_sampler: WindowedBatchSampler,
    num_workers: int = 0,
    pin_memory: bool = False,
    seed: int = 0,
) -> DataLoader[Batch]:
    """Return an endless loader of batches in the sampler's order, whatever the number of workers.

    ``seed`` is of the workers' global generators, which nothing here uses. Without it the loader would draw from
    torch's global generator, and a resumed run would differ from a straight one.
    """
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=partial(prepare_worker, limits=limits_in_use()),
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=num_workers > 0,
    )


def prepare_worker(worker_id: int, limits: DataConfig) -> None:
    """Set up a loader worker: the main process's limits, one thread, no end by a signal to the whole group.

    The terminal and SLURM send SIGINT and SIGTERM to everybody, and the main process saves on them; a worker that died
    first would turn a clean stop into a crash. SIGTERM from the main process itself does end a worker: Python and torch
    need that where a loader was not shut down in order.
    """
    use_limits(limits)
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

"""The data set of loader workers: all sources as one; a bad sample gives way to the next good one, and is counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from dual_loop.data.mixture import DrawKey, DrawStream
from dual_loop.data.prepare import Geometry, prepare_sample, sample_rng
from dual_loop.data.reader import Reader
from dual_loop.errors import DualLoopError, SampleError, explain
from dual_loop.types import Batch, RegionSample, SkippedSample

MAX_TRIES = 32

logger = logging.getLogger(__name__)


class TooManyBadSamples(DualLoopError):
    """So many samples are bad that training would not be on the data that was asked for."""


class DualLoopDataset(Dataset[Batch]):
    """All sources as one map-style data set over :class:`DrawKey`; what a key gives depends on nothing else.

    Args:
        stream: the draws over these sources; it also says what replaces a bad sample.
        seed: of the random choices inside samples.
        decode_scale: ``full``, or ``needed``: JPEGs are decoded at a smaller scale where the model needs no more.
    """

    def __init__(
        self, sources: Sequence[Reader], stream: DrawStream, geometry: Geometry, seed: int, decode_scale: str = "full"
    ) -> None:
        self.sources = tuple(sources)
        for source in self.sources:
            if isinstance(source, Reader):
                source.vanishes = geometry.vanishes
        self.stream, self.geometry, self.seed, self.decode_scale = stream, geometry, seed, decode_scale

    def __len__(self) -> int:
        """Return the number of entries of all sources (keys are endless)."""
        return sum(share.length for share in self.stream.shares)

    def __getitem__(self, key: DrawKey) -> Batch:
        """Return the image of ``key``, or the first good one of those that replace it, with what was skipped.

        Raises:
            TooManyBadSamples: no good one among the first 32 (or all, in a smaller source).
            DualLoopError: a reader failed by anything but a ``SampleError``; the message names the sample.
        """
        return self._first_good(key, in_full=self.decode_scale == "full")[1]

    def sample(self, key: DrawKey) -> RegionSample:
        """Return the sample that ``dataset[key]`` was made from (reads it again, in full; for example panels)."""
        return self._first_good(key, in_full=True)[0]

    def _first_good(self, key: DrawKey, in_full: bool) -> tuple[RegionSample, Batch]:
        skipped: list[SkippedSample] = []
        source = self.sources[key.source_index]
        # A user's own source need not be a Reader.
        is_reduced = not in_full and hasattr(source, "load_reduced")
        num_tries = min(MAX_TRIES, self.stream.shares[key.source_index].length)
        for attempt in range(num_tries):
            entry = self.stream.substitute(key, attempt).entry if attempt else key.entry
            # A bad draw must not repeat itself in what replaces it: the same number of a region may be bad there too.
            rng = sample_rng(self.seed, f"{key.slot}/{attempt}" if attempt else key.slot)
            name = source.entry_id(entry)
            try:
                needed = self.geometry.needed_size
                sample = source.load_reduced(entry, rng, needed) if is_reduced else source.load(entry, rng)
                prepared = prepare_sample(sample, self.geometry, rng, self.seed, key.slot)
            except SampleError as error:
                skipped.append(SkippedSample(source.name, name, error.reason, str(error)))
            except Exception as error:
                what = "reading a sample failed in a way that is not a bad sample"
                raise DualLoopError(explain(what, f"{source.name}/{name}", error, fix="see the cause above")) from error
            else:
                prepared.skipped = skipped
                return sample, prepared
        reasons = Counter(skip.reason for skip in skipped)
        what, where = f"{num_tries} samples in a row cannot be used", f"{source.name}/{skipped[0].sample_id} and on"
        seen = ", ".join(f"{reason} x {count}" for reason, count in reasons.most_common())
        fix = f"mend the data set or leave it out; the last one: {skipped[-1].message}"
        raise TooManyBadSamples(explain(what, where, seen, fix=fix))


class SkipLedger:
    """Counts skipped samples and regions in the main process, logs each once; too many bad samples stop the run.

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
        self._regions: Counter[tuple[str, str]] = Counter()
        self._distinct_regions: set[str] = set()

    def record(self, skipped: Sequence[SkippedSample], consumed: Mapping[str, int]) -> None:
        """Count skipped samples and regions, and good samples by source. With the same input all ranks stop together.

        Raises:
            TooManyBadSamples: a source is past ``max_bad_fraction``.
        """
        self._good.update(consumed)
        for skip in skipped:
            if skip.region_id is None:
                events, known = self._events, self._distinct.setdefault(skip.source, set())
                done, name, own = "skipped", f"{skip.source}/{skip.sample_id}", skip.sample_id
            else:
                events, known = self._regions, self._distinct_regions
                done, own = "passed over a region", f"{skip.source}/{skip.sample_id}#{skip.region_id}"
                name = own
            events[skip.source, skip.reason] += 1
            if own not in known:
                known.add(own)
                logger.warning("Warning: %s %s (%s): %s", done, name, skip.reason, skip.message)
        for source in sorted(self._distinct):
            reasons = {reason: count for (name, reason), count in sorted(self._events.items()) if name == source}
            num_bad = sum(reasons.values())
            num_tried = self._good[source] + num_bad
            if num_tried >= self.max_bad_grace and num_bad > self.max_bad_fraction * num_tried:
                where = f"{source} ({len(self._distinct[source])} different samples)"
                seen = f"{num_bad} of {num_tried} tried: " + ", ".join(f"{r} x {n}" for r, n in reasons.items())
                expected = f"at most a fraction of {self.max_bad_fraction:g} (data.max_bad_fraction)"
                fix = "mend the samples named in the warnings, leave the source out, or raise data.max_bad_fraction"
                raise TooManyBadSamples(explain("too many samples are bad", where, seen, expected, fix))

    def as_counters(self) -> dict[str, int]:
        """Return ``data/bad_samples`` (events), ``data/bad_samples_distinct``, and events by source and reason.

        The same of ``data/bad_regions`` where there were any.
        """
        num_distinct, counters = sum(map(len, self._distinct.values())), dict[str, int]()
        tallies = [("data/bad_samples", self._events, num_distinct)]
        if self._regions:
            tallies.append(("data/bad_regions", self._regions, len(self._distinct_regions)))
        for label, events, num_different in tallies:
            counters |= {label: events.total(), f"{label}_distinct": num_different}
            counters |= {f"{label}/{source}/{reason}": count for (source, reason), count in sorted(events.items())}
        return counters

    def state_dict(self) -> dict[str, object]:
        """Return all counts, as JSON holds them."""
        return {
            "good": dict(self._good),
            "events": [[source, reason, count] for (source, reason), count in sorted(self._events.items())],
            "distinct": {source: sorted(ids) for source, ids in self._distinct.items()},
            "regions": [[source, reason, count] for (source, reason), count in sorted(self._regions.items())],
            "distinct_regions": sorted(self._distinct_regions),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; limits stay those of this ledger."""
        self._good = Counter(state["good"])
        self._events = Counter({(source, reason): count for source, reason, count in state["events"]})
        self._distinct = {source: set(ids) for source, ids in state["distinct"].items()}
        self._regions = Counter({(source, reason): count for source, reason, count in state.get("regions", ())})
        self._distinct_regions = set(state.get("distinct_regions", ()))

"""The data set that loader workers read: all sources as one, and for a bad sample the next good one of its source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch.utils.data import Dataset

from dual_loop.data.mixture import DrawKey, DrawStream
from dual_loop.data.prepare import Geometry, Prepared, prepare_sample, region_seed, sample_rng
from dual_loop.data.reader import Reader
from dual_loop.data.skipped import TooManyBadSamples
from dual_loop.errors import DualLoopError, SampleError, explain
from dual_loop.types import RegionSample, SkippedSample

MAX_TRIES = 32


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
        sources: Sequence[Reader],
        stream: DrawStream,
        geometry: Geometry,
        seed: int,
        keep_samples: bool = False,
        decode_scale: str = "full",
    ) -> None:
        self.sources = tuple(sources)
        self.stream, self.geometry, self.seed = stream, geometry, seed
        self.keep_samples, self.decode_scale = keep_samples, decode_scale

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
        source = self.sources[key.source_index]
        # A user's own source need not be a Reader.
        is_reduced = self.decode_scale == "needed" and not keep_sample and hasattr(source, "load_reduced")
        num_tries = min(MAX_TRIES, self.stream.shares[key.source_index].length)
        for attempt in range(num_tries):
            entry = self.stream.substitute(key, attempt).entry if attempt else key.entry
            rng = sample_rng(self.seed, key.slot)
            name = source.entry_id(entry)
            try:
                needed = self.geometry.needed_size
                sample = source.load_reduced(entry, rng, needed) if is_reduced else source.load(entry, rng)
                seeds = [region_seed(self.seed, key.slot, position) for position in range(len(sample.region_ids))]
                prepared = prepare_sample(sample, self.geometry, rng, seeds, keep_sample=keep_sample)
            except SampleError as error:
                skipped.append(SkippedSample(source.name, name, error.reason, str(error)))
            except Exception as error:
                what = "reading a sample failed in a way that is not a bad sample"
                seen = f"{type(error).__name__}: {error}"
                raise DualLoopError(explain(what, f"{source.name}/{name}", seen, fix="see the cause above")) from error
            else:
                prepared.skipped = skipped
                return prepared
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

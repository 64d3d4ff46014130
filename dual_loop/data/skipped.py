"""What was skipped: the ledger that counts, logs and, past a set fraction, stops a run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dual_loop.errors import SampleError, explain
from dual_loop.types import SkippedSample

logger = logging.getLogger(__name__)


class TooManyBadSamples(SampleError):
    """So many samples are bad that training would not be on the data that was asked for.

    Args:
        message: the full message. (One argument, so that a loader worker can pass the error on with its type.)
    """

    def __init__(self, message: str) -> None:
        super().__init__("too_many_bad_samples", message)

    def __reduce__(self) -> tuple[type, Any]:
        return type(self), (str(self),)


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
        """Return ``data/bad_samples`` (events), ``data/bad_samples_distinct``, and events by source and reason."""
        counters = {"data/bad_samples": self._events.total(), "data/bad_samples_distinct": self.num_distinct}
        for (source, reason), count in sorted(self._events.items()):
            counters[f"data/bad_samples/{source}/{reason}"] = count
        return counters

    def state_dict(self) -> dict[str, object]:
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

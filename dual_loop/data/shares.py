"""How much of a source is used, and how much of an epoch it gets: caps; repeats and weights as numbers of draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dual_loop.errors import ConfigError, explain

CAP_SEED = 20_240_816
"""Seed of the shuffle before a cap. Fixed, so that a capped data set is the same in every run."""


@dataclass(frozen=True)
class SourceShare:
    """How much of an epoch a source gets.

    Attributes:
        name: unique name of the source.
        length: n, its number of entries.
        repeats: passes over the source in one epoch; fractions are allowed, 0 leaves it out.
        weight: None, or the part of the draws that all weighted sources have by their repeats together (any scale).
        probe: names of a few entries; they tell a changed data set of the same length at a resume.
    """

    name: str
    length: int
    repeats: float = 1.0
    weight: float | None = None
    probe: tuple[str, ...] = ()


def compute_quotas(shares: Sequence[SourceShare]) -> list[int]:
    """Return the draws of each source in one epoch.

    Raises:
        ConfigError: there is no source or no draw, a source is empty or gets no draw, or names or numbers are wrong.
    """
    problems = [f"{share.name}: the source is empty" for share in shares if share.length <= 0]
    numbers = [(s.name, "repeats", s.repeats) for s in shares] + [(s.name, "weight", s.weight or 0.0) for s in shares]
    wrong = [number for number in numbers if not (number[2] >= 0 and math.isfinite(number[2]))]
    problems += [f"{name}: {label} is {value}, expected 0 or more" for name, label, value in wrong]
    names = [share.name for share in shares]
    problems += [f"{name}: two sources have this name" for name in sorted(set(names)) if names.count(name) > 1]
    weights = [share.weight for share in shares if share.weight is not None]
    if not shares:
        problems.append("no source is given")
    if len(weights) == 1 and len(shares) > 1:
        problems.append("one source alone has a weight: it shares its draws with no other; give a second one a weight")
    if weights and sum(weights) == 0:
        problems.append("all weights are 0")
    if problems:
        raise ConfigError("the shares of the data sources are wrong:\n" + "\n".join(f"  - {p}" for p in problems))
    shared = sum(share.repeats * share.length for share in shares if share.weight is not None)
    quotas = []
    for share in shares:
        wanted = share.repeats * share.length
        if share.weight is not None:
            wanted = shared * share.weight / sum(weights)
        quotas.append(round(wanted))
        if wanted > 0 and quotas[-1] == 0:
            fix = "raise its repeats or weight, or set it to 0"
            raise ConfigError(explain("a source gets no draw", share.name, f"{wanted:.3g} draws an epoch", "1", fix))
    if sum(quotas) == 0:
        raise ConfigError(explain("an epoch has no draw", ", ".join(names), fix="set some repeats above 0"))
    return quotas


def choose_capped(num_entries: int, max_samples: int | None, setting: str) -> np.ndarray:
    """Return the kept entries, ascending, (n,) int64: all of them, or ``max_samples`` drawn with a fixed seed.

    The first n in sorted order would be one shard. A smaller cap keeps a subset of what a larger one keeps.

    Raises:
        ConfigError: ``max_samples`` is below 1; the message names ``setting``.
    """
    if max_samples is None:
        return np.arange(num_entries)
    if max_samples < 1:
        fix = "leave the directory out to skip a data set, or the cap to use all of it"
        raise ConfigError(explain("a cap on samples is too small", setting, max_samples, "1 or more, or none", fix))
    return np.sort(np.random.default_rng(CAP_SEED).permutation(num_entries)[:max_samples])

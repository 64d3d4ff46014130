"""Which sample comes when: an endless stream of draws that is a function of the position alone.

The stream is numbered by *slots*, 0-based over the whole run. An epoch has E slots, of which source i gets its quota
q_i; a keyed permutation of the epoch's slots mixes the sources. The draws of a source are numbered over the whole
run, d = epoch * q_i + k with k in 0..q_i-1, and draw d takes entry ``d mod n_i`` of a permutation that belongs to
pass ``d // n_i`` over the n_i entries. So after any number of whole epochs the entries of a source have been drawn
equally often, give or take one, whatever the repeats or weights.

Nothing is stored but the position, and ranks, micro-batches and workers only divide the slots of an optimiser step. The
order is computed, as a shuffled list of 11 million images is not cheap to rebuild at a resume: a balanced Feistel
network (Luby and Rackoff, 1988) over the next even power of two, where values outside the range are sent through again
("cycle walking": Black and Rogaway, 2002).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from dual_loop.data.shares import SourceShare, compute_quotas
from dual_loop.errors import CheckpointError, explain

_MASK64 = (1 << 64) - 1
_NUM_ROUNDS = 8
MAX_LENGTH = 1 << 62


def stable_hash(*parts: int | str) -> int:
    """Return a hash of ``parts`` in 0..2**63-1, the same in every process; ``1`` and ``"1"`` are different parts."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = f"{'s' if isinstance(part, str) else 'i'}{part}".encode()
        digest.update(f"{len(encoded)}:".encode() + encoded)
    return int.from_bytes(digest.digest(), "little") >> 1


class Permutation:
    """A pseudo-random bijection of 0..length-1, chosen by ``seed`` and any further ``stream`` numbers or names.

    ``permutation[i]`` takes about ten microseconds and no memory, whatever the length (1..2**62, else ValueError).
    """

    def __init__(self, length: int, seed: int, *stream: int | str) -> None:
        if not 1 <= length <= MAX_LENGTH:
            raise ValueError(f"a permutation needs a length of 1 to 2**62, seen {length}")
        self.length = length
        # At least 3 bits a side: with 2, eight rounds favour some orders of 4 or 5 values (chi-square, 8 deviations).
        self._half_bits = max(3, ((length - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._keys = [stable_hash("permutation", seed, *stream, number) for number in range(_NUM_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        """Return the value at ``index``; IndexError outside 0..length-1."""
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} outside a permutation of length {self.length}")
        value = self._encrypt(int(index))
        while value >= self.length:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        """One pass of the network; its rounds are the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._keys:
            mixed = ((right ^ key) + 0x9E3779B97F4A7C15) & _MASK64
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & self._half_mask)
        return (left << self._half_bits) | right


_permutation = lru_cache(maxsize=64)(Permutation)
"""An epoch has one, and each source one or two."""


class DrawKey(NamedTuple):
    """One draw: what the sampler hands to the data set.

    Attributes:
        source_index, entry: position of the source in the stream's list, and of the entry inside its source.
        draw, slot: number of this draw among those of its source, and of the run; random choices come from the slot.
    """

    source_index: int
    entry: int
    draw: int
    slot: int


class DrawStream:
    """The draws of a run, by slot: ``shares`` are the sources, in the order of ``source_index``.

    Raises:
        ConfigError: see :func:`compute_quotas`.
    """

    def __init__(self, shares: Sequence[SourceShare], seed: int) -> None:
        self.shares = tuple(shares)
        self.seed = seed
        self.quotas = compute_quotas(shares)
        self.epoch_length = sum(self.quotas)
        self._ends = list(accumulate(self.quotas))

    def __getitem__(self, slot: int) -> DrawKey:
        """Return the draw at ``slot`` (0 or more, without end)."""
        if slot < 0:
            raise IndexError(f"slots count from 0, seen {slot}")
        epoch, position = divmod(slot, self.epoch_length)
        place = _permutation(self.epoch_length, self.seed, "epoch", epoch)[position]
        source_index = bisect_right(self._ends, place)
        quota = self.quotas[source_index]
        draw = epoch * quota + place - (self._ends[source_index] - quota)
        return DrawKey(source_index, self._entry(source_index, draw, 0), draw, slot)

    def substitute(self, key: DrawKey, attempt: int) -> DrawKey:
        """Return what replaces ``key`` where its sample is bad: the entry ``attempt`` places on in the same pass.

        Draw and slot stay, so that batches stay full, all ranks stay in step, and the position means the same.
        """
        return key._replace(entry=self._entry(key.source_index, key.draw, attempt))

    def _entry(self, source_index: int, draw: int, attempt: int) -> int:
        length = self.shares[source_index].length
        number, position = divmod(draw, length)
        order = _permutation(length, self.seed, "source", source_index, number)
        return order[(position + attempt) % length]

    def fingerprint(self, slots_per_step: int) -> str:
        """Return a hash of all that gives a position its meaning, but the seed: sources, quotas, size of a step."""
        parts: list[int | str] = [slots_per_step]
        for share, quota in zip(self.shares, self.quotas, strict=True):
            parts += [share.name, share.length, quota, len(share.probe), *share.probe]
        return f"{stable_hash('draw stream', *parts):016x}"


class WindowedBatchSampler:
    """An endless batch sampler of this rank's micro-batches; yields lists of :class:`DrawKey`.

    Optimiser step t, micro-step m, rank r, item j takes the slot
    ``((t * accumulation + m) * world_size + r) * batch_size + j``. So a step takes the same slots for 2 ranks x 1 as
    for 1 rank x 2, and for batch 2 x accumulation 1 as for 1 x 2.

    The position is the trainer's number of completed optimiser steps: loader workers fetch ahead, so what was handed
    out says nothing about what was trained on.

    Args:
        batch_size: images in one micro-batch of one rank.
        accumulation: micro-batches of one rank in an optimiser step.

    Attributes:
        start_step: optimiser steps completed before iteration starts.

    Raises:
        ValueError: a size below 1, or a rank outside the world.
    """

    def __init__(
        self, stream: DrawStream, batch_size: int, world_size: int = 1, rank: int = 0, accumulation: int = 1
    ) -> None:
        if min(batch_size, world_size, accumulation) < 1 or not 0 <= rank < world_size:
            given = f"{batch_size=} {world_size=} {rank=} {accumulation=}"
            raise ValueError(f"sizes must be 1 or more and the rank inside the world, seen {given}")
        self.stream = stream
        self.batch_size, self.world_size, self.rank = batch_size, world_size, rank
        self.accumulation, self.start_step = accumulation, 0
        self.slots_per_step = world_size * batch_size * accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that cover one epoch; the last one may reach into the next epoch."""
        return -(-self.stream.epoch_length // self.slots_per_step)

    def keys(self, step: int, micro_step: int) -> list[DrawKey]:
        """Return the draws of this rank's micro-batch ``micro_step`` of optimiser step ``step`` (both 0-based)."""
        if not 0 <= micro_step < self.accumulation:
            raise IndexError(f"micro-step {micro_step} outside an accumulation of {self.accumulation}")
        first = ((step * self.accumulation + micro_step) * self.world_size + self.rank) * self.batch_size
        return [self.stream[slot] for slot in range(first, first + self.batch_size)]

    def __iter__(self) -> Iterator[list[DrawKey]]:
        step = self.start_step
        while True:
            for micro_step in range(self.accumulation):
                yield self.keys(step, micro_step)
            step += 1

    def state_dict(self, step: int) -> dict[str, int | str]:
        """Return the position after ``step`` completed optimiser steps, as JSON holds it."""
        return {"step": step, "seed": self.stream.seed, "fingerprint": self.stream.fingerprint(self.slots_per_step)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after ``state["step"]`` completed steps; call it before iteration starts.

        Raises:
            CheckpointError: the data, its shares, the seed or the size of an optimiser step are not those of the
                checkpoint, so the position would mean other samples.
        """
        own = self.state_dict(0)
        wrong = [name for name in ("seed", "fingerprint") if state.get(name) != own[name]]
        step = state.get("step")
        if wrong or not isinstance(step, int) or step < 0:
            shares = zip(self.stream.shares, self.stream.quotas, strict=True)
            described = ", ".join(f"{share.name} {share.length} x {quota}" for share, quota in shares)
            what = "the run cannot be continued on this data: its position means other samples here"
            where = "data position of the checkpoint: " + (", ".join(wrong) or "step")
            seen = f"seed {state.get('seed')}, fingerprint {state.get('fingerprint')}, step {step}"
            expected = f"seed {own['seed']}, fingerprint {own['fingerprint']} (entries x draws an epoch: {described}; "
            expected += f"{self.slots_per_step} images an optimiser step)"
            fix = (
                "resume with the same data folders, caps, repeats, weights, seed and images a step (processes x batch "
            )
            fix += "size x accumulation), or start a new run from the weights"
            raise CheckpointError(explain(what, where, seen, expected, fix))
        self.start_step = step

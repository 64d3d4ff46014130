"""One epoch at 64 ranks x 8 loader workers: every draw once, also over a resume; and nothing of the order is stored.

No process is started: torch's loader gives batch b of a rank to worker b mod 8, and that is done here by hand.
"""

from __future__ import annotations

import itertools
import json
import pickle
import tracemalloc
from collections import Counter
from collections.abc import Iterable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dual_loop.data.mixture import DrawKey, DrawStream, WindowedBatchSampler
from dual_loop.data.shares import SourceShare, choose_capped

NUM_RANKS, NUM_WORKERS = 64, 8


@st.composite
def shares(draw: st.DrawFn) -> list[SourceShare]:
    """Up to four sources of uneven sizes, with repeats, two of them perhaps with weights."""
    lengths = draw(st.lists(st.one_of(st.integers(1, 40), st.integers(100, 300)), min_size=1, max_size=4))
    weighted = len(lengths) > 1 and draw(st.booleans())
    made = []
    for number, length in enumerate(lengths):
        repeats = max(draw(st.sampled_from([0.25, 0.5, 1.0, 1.0, 1.7, 3.0])), 1 / length)
        weight = draw(st.sampled_from([1.0, 2.0])) if weighted and number < 2 else None
        made.append(SourceShare(f"s{number}", length, repeats, weight))
    return made


def samplers(stream: DrawStream, batch_size: int, accumulation: int, num_ranks: int) -> list[WindowedBatchSampler]:
    return [WindowedBatchSampler(stream, batch_size, num_ranks, rank, accumulation) for rank in range(num_ranks)]


def read_by_workers(ranks: Iterable[WindowedBatchSampler], num_steps: int) -> list[DrawKey]:
    """What all loader workers of all ranks read for ``num_steps`` optimiser steps, worker by worker."""
    keys: list[DrawKey] = []
    for sampler in ranks:
        batches = list(itertools.islice(sampler, num_steps * sampler.accumulation))
        for worker in range(NUM_WORKERS):
            keys += itertools.chain.from_iterable(batches[worker::NUM_WORKERS])
    return keys


@settings(max_examples=25, deadline=None)
@given(
    shares=shares(),
    batch_size=st.integers(1, 3),
    accumulation=st.integers(1, 4),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_an_epoch_is_covered_exactly_once(
    shares: list[SourceShare], batch_size: int, accumulation: int, epoch: int, seed: int
) -> None:
    stream = DrawStream(shares, seed)
    ranks = samplers(stream, batch_size, accumulation, NUM_RANKS)
    per_step = ranks[0].slots_per_step
    first, last = epoch * stream.epoch_length, (epoch + 1) * stream.epoch_length
    first_step, end_step = first // per_step, -(-last // per_step)
    for sampler in ranks:
        sampler.load_state_dict(sampler.state_dict(first_step))
    keys = read_by_workers(ranks, end_step - first_step)
    assert sorted(key.slot for key in keys) == list(range(first_step * per_step, end_step * per_step))

    in_epoch = [key for key in keys if first <= key.slot < last]
    assert len(in_epoch) == stream.epoch_length
    for index, (share, quota) in enumerate(zip(shares, stream.quotas, strict=True)):
        own = [key for key in in_epoch if key.source_index == index]
        assert sorted(key.draw for key in own) == list(range(epoch * quota, (epoch + 1) * quota))
        times = Counter(key.entry for key in own)
        if quota % share.length == 0:
            assert times == dict.fromkeys(range(share.length), quota // share.length)
        for number in {key.draw // share.length for key in own}:  # inside one pass no entry comes twice
            entries = [key.entry for key in own if key.draw // share.length == number]
            assert len(set(entries)) == len(entries)


@settings(max_examples=25, deadline=None)
@given(
    shares=shares(),
    batch_size=st.integers(1, 2),
    accumulation=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_resume_goes_on_with_exactly_the_rest(
    shares: list[SourceShare], batch_size: int, accumulation: int, seed: int, data: st.DataObject
) -> None:
    stream = DrawStream(shares, seed)
    ranks = samplers(stream, batch_size, accumulation, NUM_RANKS)
    num_steps = ranks[0].steps_per_epoch + 1
    stopped = data.draw(st.integers(0, num_steps), label="completed steps")
    before = read_by_workers(ranks, stopped)
    state = json.loads(json.dumps(ranks[0].state_dict(stopped)))
    num_ranks = data.draw(st.sampled_from([64, 64 * accumulation, 16]), label="ranks after the resume")
    resumed_accumulation = NUM_RANKS * accumulation // num_ranks
    resumed = samplers(DrawStream(shares, seed), batch_size, resumed_accumulation, num_ranks)
    for sampler in resumed:
        sampler.load_state_dict(state)
    after = read_by_workers(resumed, num_steps - stopped)
    expected = [stream[slot] for slot in range(num_steps * ranks[0].slots_per_step)]
    assert sorted(before + after, key=lambda key: key.slot) == expected
    assert not {key.slot for key in before} & {key.slot for key in after}


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 5000), cap=st.integers(1, 600), seed=st.integers(0, 9))
def test_a_capped_source_shows_each_kept_entry_once(length: int, cap: int, seed: int) -> None:
    kept = choose_capped(length, cap, "cap")
    stream = DrawStream([SourceShare("capped", len(kept)), SourceShare("other", 37)], seed)
    ranks = samplers(stream, 1, 1, NUM_RANKS)
    keys = read_by_workers(ranks, ranks[0].steps_per_epoch)
    seen = [int(kept[key.entry]) for key in keys if key.slot < stream.epoch_length and key.source_index == 0]
    assert len(seen) == min(length, cap)
    assert np.array_equal(np.sort(seen), kept)


def test_the_order_of_billions_of_entries_takes_no_memory() -> None:
    shares = [SourceShare("large", 3_000_000_000), SourceShare("small", 1000, 2.5), SourceShare("other", 735_000)]
    tracemalloc.start()
    stream = DrawStream(shares, 0)
    sampler = WindowedBatchSampler(stream, 2, NUM_RANKS, 63, 4)
    sampler.start_step = sum(stream.quotas) // 512 - 2
    keys = list(itertools.islice(sampler, 20))  # over the end of the epoch
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert {key.slot // stream.epoch_length for batch in keys for key in batch} == {0, 1}
    assert peak < 200_000
    assert len(pickle.dumps(stream)) < 1000

"""The union of sources: opening, shares, substitution of bad samples, the loader, and the skip ledger."""

from __future__ import annotations

import itertools
import json
import logging
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dual_loop.config import Config, DataConfig, TrainConfig
from dual_loop.data.dataset_builder import (
    DualLoopDataset,
    SkipLedger,
    TooManyBadSamples,
    build_dataset,
    build_draw_stream,
    build_loader,
    build_sources,
    describe,
)
from dual_loop.data.mixture import DrawKey, WindowedBatchSampler
from dual_loop.data.prepare import Geometry, region_seed
from dual_loop.errors import CheckpointError, ConfigError, DualLoopError, SampleError
from dual_loop.testing.demo_data import write_demo_data
from dual_loop.types import Batch, RegionSample, SkippedSample

GEOMETRY = Geometry(vision_image_size=28, grid_size=4, grounding_size=32, mask_size=16)
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "real_samples"


class FakeSource:
    """Entries are images of one colour, their number; those in ``bad`` raise, in ``vanishing`` lose their target."""

    def __init__(self, name: str, length: int, bad: tuple[int, ...] = (), vanishing: tuple[int, ...] = ()) -> None:
        self.name, self.length, self.bad, self.vanishing = name, length, bad, vanishing
        self.loads: list[int] = []

    def __len__(self) -> int:
        return self.length

    def entry_id(self, index: int) -> str:
        return f"{self.name}_{index}"

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        self.loads.append(index)
        where = int(rng.integers(8))
        if index in self.bad:
            raise SampleError("broken_rle", f"entry {index} is broken")
        masks = np.zeros((1, 48, 64), dtype=bool)
        masks[0, where : where + 20, where : where + 20] = True
        if index in self.vanishing:
            masks[:] = False
            masks[0, 1, 1] = True
        image = np.full((48, 64, 3), index % 256, dtype=np.uint8)
        captions = (tuple(f"caption {number}" for number in range(20)),)
        return RegionSample(self.name, self.entry_id(index), image, masks, ("r",), captions)


class CrashingSource(FakeSource):
    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        raise ZeroDivisionError("oh no")


def make_dataset(*sources: FakeSource, seed: int = 1, keep_samples: bool = False) -> DualLoopDataset:
    config = Config(train=TrainConfig(seed=seed))
    return build_dataset(config, GEOMETRY, sources, keep_samples=keep_samples)


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def first_batch(loader: DataLoader[Batch]) -> Batch:
    """Shut workers down in order also on an error: the traceback would keep the iterator for the garbage collector."""
    batches = iter(loader)
    try:
        return next(batches)
    finally:
        if loader.num_workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]


def entry_of(batch: Batch) -> list[int]:
    return [int(name.split("_")[1].split("#")[0]) for name in batch.region_names]


# --- opening the sources ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    write_demo_data(out, 4, seed=5, num_val=1)
    return out


def four_directories(root: Path, index_dir: Path, **others: object) -> DataConfig:
    return DataConfig(
        sav_dir=str(root / "sav" / "npz"),
        sa1b_dir=str(root / "sa1b"),
        openimage_dir=str(root / "openimages"),
        refcoco_dir=str(root / "ref_seg"),
        index_dir=str(index_dir),
        refcoco_datasets=("refcoco",),
        **others,  # type: ignore[arg-type]
    )


def test_all_four_formats_are_opened_and_read(demo_data: Path, tmp_path: Path) -> None:
    data = four_directories(demo_data, tmp_path, regions_per_image=2, sa1b_max_samples=3, refcoco_repeats=2.0)
    sources = build_sources(data)
    assert [source.name for source in sources] == ["sav", "sa1b", "openimages", "refcoco"]
    assert [len(source) for source in sources] == [4, 3, 4, 4]
    dataset = build_dataset(Config(data=data), GEOMETRY, keep_samples=True)
    assert len(dataset) == 15
    assert dataset.stream.quotas == [4, 3, 4, 8]
    sampler = WindowedBatchSampler(dataset.stream, 19)
    (batch,) = take(iter(build_loader(dataset, sampler)), 1)
    assert not batch.skipped
    assert {name: batch.sources.count(name) for name in set(batch.sources)} == {
        "sav": 4, "sa1b": 3, "openimages": 4, "refcoco": 8,
    }  # fmt: skip
    assert len(batch.samples) == 19
    num_regions = [sample.num_regions for sample in batch.samples]
    assert max(num_regions) == 2  # regions_per_image reached the readers
    assert sum(num_regions) == batch.num_regions
    texts = [text for text, name in zip(batch.captions, batch.region_names, strict=True) if name.startswith("refcoco")]
    assert texts
    assert all(texts)
    assert len(batch.tiles_per_view) == 19 + 4  # a pair has two views


@pytest.mark.skipif(not REAL.is_dir(), reason="the real samples ../shared/data/real_samples are not there")
def test_real_samples_become_batches(tmp_path: Path) -> None:
    data = DataConfig(
        sav_dir=str(REAL / "sav" / "npz"),
        sa1b_dir=str(REAL / "sa1b_flat"),
        openimage_dir=str(REAL / "openimages"),
        refcoco_dir=str(REAL / "ref_seg"),
        index_dir=str(tmp_path),
    )
    geometry = Geometry(vision_image_size=112, grid_size=16, grounding_size=256, mask_size=64)
    dataset = build_dataset(Config(data=data), geometry)
    sampler = WindowedBatchSampler(dataset.stream, dataset.stream.epoch_length)
    (batch,) = take(iter(build_loader(dataset, sampler)), 1)
    assert set(batch.sources) == {"sav", "sa1b", "openimages", "refcoco"}
    assert batch.target_masks.flatten(1).any(1).all()
    assert batch.prompt_masks.flatten(1).any(1).all()


def test_without_a_directory_nothing_is_guessed() -> None:
    with pytest.raises(ConfigError, match=r"no data set is given.*--sav_dir, --sa1b_dir, --openimage_dir"):
        build_sources(DataConfig())


def test_missing_directories_are_listed_together(tmp_path: Path) -> None:
    data = DataConfig(sav_dir=str(tmp_path / "a"), sa1b_dir=str(tmp_path), refcoco_dir=str(tmp_path / "b"))
    with pytest.raises(ConfigError) as caught:
        build_sources(data)
    message = str(caught.value)
    assert message.startswith("2 problem(s)")
    assert "data.sav_dir" in message
    assert str(tmp_path / "a") in message
    assert "data.refcoco_dir" in message


def test_unusable_directories_are_listed_together(tmp_path: Path, demo_data: Path) -> None:
    (tmp_path / "empty").mkdir()
    index = str(tmp_path / "index")
    empty = str(tmp_path / "empty")
    data = DataConfig(sav_dir=empty, openimage_dir=empty, sa1b_dir=str(demo_data / "sa1b"), index_dir=index)
    with pytest.raises(ConfigError, match=r"(?s)2 problem\(s\).*SA-V.*Open Images"):
        build_sources(data)


# --- shares ----------------------------------------------------------------------------------------------------------


def test_repeats_and_weights_come_from_the_config_and_own_sources_count_once() -> None:
    sources = [FakeSource("sav", 10), FakeSource("sa1b", 30), FakeSource("openimages", 5), FakeSource("mine", 7)]
    data = DataConfig(sav_weight=1.0, sa1b_weight=3.0, sa1b_repeats=2.0, openimage_repeats=4.0)
    stream = build_draw_stream(sources, data, seed=0)
    assert stream.quotas == [18, 52, 20, 7]  # 10 + 60 draws shared 1 : 3
    table = describe(sources, stream).splitlines()
    assert table[1].split() == ["sav", "10", "weight", "1", "18"]
    assert table[3].split() == ["openimages", "5", "repeats", "4", "20"]
    assert table[-1].split() == ["total", "52", "97"]


def test_a_renamed_entry_is_noticed_at_a_resume() -> None:
    first, second = FakeSource("mine", 40), FakeSource("mine", 40)
    second.entry_id = lambda index: f"other_{index}"  # type: ignore[method-assign]
    state = WindowedBatchSampler(make_dataset(first).stream, 2).state_dict(3)
    with pytest.raises(CheckpointError, match="fingerprint"):
        WindowedBatchSampler(make_dataset(second).stream, 2).load_state_dict(state)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ConfigError, match="mine: the source is empty"):
        make_dataset(FakeSource("mine", 0))


# --- bad samples -----------------------------------------------------------------------------------------------------


def test_a_bad_sample_is_replaced_by_the_next_in_its_order_and_reported() -> None:
    good, bad = make_dataset(FakeSource("mine", 12)), make_dataset(FakeSource("mine", 12, bad=(3, 7)))
    replaced = 0
    for slot in range(12):
        key = good.stream[slot]
        prepared = bad[key]
        expected, attempt = key, 0
        while expected.entry in (3, 7):
            attempt += 1
            expected = bad.stream.substitute(key, attempt)
        replaced += attempt > 0
        assert prepared.region_names == [f"mine/mine_{expected.entry}#r"]
        assert len(prepared.skipped) == attempt
        # Random choices come from the slot, not from the entry that was found.
        assert prepared.captions == good[key].captions
        assert prepared.region_seeds == good[key].region_seeds == [region_seed(1, slot, 0)]
        if attempt:
            assert prepared.skipped[0] == SkippedSample(
                "mine", f"mine_{key.entry}", "broken_rle", f"entry {key.entry} is broken"
            )
    assert replaced == 2


def test_a_sample_that_cannot_be_prepared_is_skipped_too() -> None:
    dataset = make_dataset(FakeSource("mine", 3, vanishing=(0, 2)))
    for slot in range(3):
        prepared = dataset[dataset.stream[slot]]
        assert prepared.region_names == ["mine/mine_1#r"]
        assert all(skip.reason == "target_vanished" for skip in prepared.skipped)
        assert dataset.sample(dataset.stream[slot]).sample_id == "mine_1"


@pytest.mark.parametrize(("length", "num_tries"), [(5, 5), (100, 32)])
def test_a_source_without_good_samples_stops_the_run(length: int, num_tries: int) -> None:
    source = FakeSource("mine", length, bad=tuple(range(length)))
    dataset = make_dataset(source)
    with pytest.raises(TooManyBadSamples, match=rf"{num_tries} samples in a row.*broken_rle x {num_tries}") as caught:
        dataset[dataset.stream[0]]
    assert caught.value.reason == "too_many_bad_samples"
    assert len(set(source.loads)) == len(source.loads) == num_tries
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy)) == (TooManyBadSamples, str(caught.value))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_another_exception_surfaces_with_the_name_of_the_sample(num_workers: int) -> None:
    dataset = make_dataset(CrashingSource("mine", 1))
    loader = build_loader(dataset, WindowedBatchSampler(dataset.stream, 1), num_workers)
    with pytest.raises(DualLoopError, match=r"where: mine/mine_0; seen: ZeroDivisionError: oh no"):
        first_batch(loader)


def test_too_many_bad_samples_keep_their_type_on_the_way_from_a_worker() -> None:
    dataset = make_dataset(FakeSource("mine", 2, bad=(0, 1)))
    with pytest.raises(TooManyBadSamples, match="2 samples in a row"):
        first_batch(build_loader(dataset, WindowedBatchSampler(dataset.stream, 1), 1))


# --- the loader ------------------------------------------------------------------------------------------------------


def same(first: Batch, second: Batch) -> bool:
    tensors = ("pixel_values", "g_pixel_values", "prompt_masks", "target_masks", "region_image", "region_seeds")
    plain = ("captions", "region_names", "sources", "skipped", "tiles_per_view")
    return all(torch.equal(getattr(first, n), getattr(second, n)) for n in tensors) and all(
        getattr(first, n) == getattr(second, n) for n in plain
    )


def test_workers_change_neither_order_nor_content_nor_global_randomness() -> None:
    def batches(num_workers: int, start_step: int, count: int) -> list[Batch]:
        dataset = make_dataset(FakeSource("one", 9, bad=(4,)), FakeSource("two", 5))
        sampler = WindowedBatchSampler(dataset.stream, 2, 2, 1, 3, start_step)
        return take(iter(build_loader(dataset, sampler, num_workers, seed=3)), count)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    straight = batches(0, 0, 12)
    assert torch.equal(torch.get_rng_state(), before)
    for workers, start in ((2, 0), (1, 2)):
        again = batches(workers, start, 12 - 3 * start)
        assert all(same(a, b) for a, b in zip(straight[3 * start :], again, strict=True))
    assert any(batch.skipped for batch in straight)


def test_an_epoch_shows_every_entry_once() -> None:
    dataset = make_dataset(FakeSource("one", 24))
    batches = take(iter(build_loader(dataset, WindowedBatchSampler(dataset.stream, 4))), 6)
    assert sorted(entry for batch in batches for entry in entry_of(batch)) == list(range(24))
    assert all(batch.samples == [] for batch in batches)


def test_another_seed_is_another_order_and_other_choices() -> None:
    first, second = (make_dataset(FakeSource("one", 30), seed=seed) for seed in (1, 2))
    key = DrawKey(0, 5, 0, 0)
    assert first[key].region_seeds != second[key].region_seeds
    assert [first.stream[slot] for slot in range(30)] != [second.stream[slot] for slot in range(30)]


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of a signal is known on Linux only")
def test_workers_outlive_signals_to_the_group_and_end_when_the_main_process_says_so() -> None:
    dataset = make_dataset(FakeSource("one", 9))
    batches = iter(build_loader(dataset, WindowedBatchSampler(dataset.stream, 1), 2))
    take(batches, 2)  # one of each worker: before its set-up a worker still ends by these signals
    workers = batches._workers  # type: ignore[attr-defined]
    pids = [str(worker.pid) for worker in workers]
    for name in ("-INT", "-TERM"):
        subprocess.run(["kill", name, *pids], check=True)
    assert len(take(batches, 20)) == 20
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()
        worker.join(timeout=30)
        assert worker.exitcode == 0


CRASH = """
from dual_loop.config import Config
from dual_loop.data.dataset_builder import build_dataset, build_loader
from dual_loop.data.prepare import Geometry
from dual_loop.data.mixture import WindowedBatchSampler

class Crashing:
    name = "mine"
    def __len__(self): return 3
    def entry_id(self, index): return f"mine_{index}"
    def load(self, index, rng): raise ZeroDivisionError("oh no")

dataset = build_dataset(Config(), Geometry(28, 4, 32, 16), [Crashing()])
batches = iter(build_loader(dataset, WindowedBatchSampler(dataset.stream, 1), 2))
next(batches)
"""


def test_a_run_that_fails_with_living_workers_ends() -> None:
    # The traceback keeps the loader alive to the end of the process: only SIGTERM ends its workers then.
    ended = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "DualLoopError" in ended.stderr
    assert "mine/mine_" in ended.stderr


# --- the ledger ------------------------------------------------------------------------------------------------------


def bad(number: int, source: str = "sav", reason: str = "broken") -> SkippedSample:
    return SkippedSample(source, f"id{number}", reason, f"message {number}")


def test_the_ledger_counts_events_and_different_samples_and_logs_each_once(caplog: pytest.LogCaptureFixture) -> None:
    ledger = SkipLedger(0.5, 10)
    with caplog.at_level(logging.WARNING):
        ledger.record([bad(1), bad(2, reason="empty_mask")], {"sav": 8, "sa1b": 8})
        ledger.record([bad(1), bad(1, source="sa1b")], {"sav": 8, "sa1b": 8})
    assert ledger.as_counters() == {
        "data/bad_samples": 4,
        "data/bad_samples_distinct": 3,
        "data/bad_samples/sa1b/broken": 1,
        "data/bad_samples/sav/broken": 2,
        "data/bad_samples/sav/empty_mask": 1,
    }
    assert [record.getMessage() for record in caplog.records] == [
        "Warning: skipped sav/id1 (broken): message 1",
        "Warning: skipped sav/id2 (empty_mask): message 2",
        "Warning: skipped sa1b/id1 (broken): message 1",
    ]


def test_without_bad_samples_the_counters_are_zero() -> None:
    ledger = SkipLedger(0.0, 0)
    ledger.record([], {"sav": 100})
    assert ledger.as_counters() == {"data/bad_samples": 0, "data/bad_samples_distinct": 0}


def test_the_ledger_stops_past_the_fraction_but_not_within_the_grace() -> None:
    ledger = SkipLedger(0.1, 50)
    ledger.record([bad(n) for n in range(30)], {"sav": 19, "sa1b": 1000})  # 49 tried
    with pytest.raises(TooManyBadSamples, match=r"sav \(30 different samples\).*30 of 51 tried: broken x 30.*0\.1"):
        ledger.record([], {"sav": 2})


def test_the_fraction_is_of_each_source_and_inclusive() -> None:
    ledger = SkipLedger(0.1, 50)
    ledger.record([bad(n) for n in range(10)], {"sav": 90, "sa1b": 0})  # exactly a tenth
    with pytest.raises(TooManyBadSamples, match="sav"):
        ledger.record([bad(10)], {"sa1b": 100_000})
    lenient = SkipLedger(1.0, 0)
    lenient.record([bad(n) for n in range(100)], {"sav": 1})


def test_the_ledger_goes_on_after_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    ledger = SkipLedger(0.1, 20)
    ledger.record([bad(1)], {"sav": 17})
    resumed = SkipLedger(0.1, 20)
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert resumed.as_counters() == ledger.as_counters()
    caplog.clear()
    resumed.record([bad(1)], {"sav": 0})
    assert not caplog.records  # met and logged before the stop
    assert resumed.num_distinct == 1
    with pytest.raises(TooManyBadSamples, match="3 of 20"):
        resumed.record([bad(2)], {"sav": 0})

"""From a config to the training data: opening the sources, shares, and the loader with its workers."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_source import GEOMETRY, FakeSource, make_dataset, take

from dual_loop.config import Config, DataConfig
from dual_loop.data.dataset_builder import (
    build_dataset,
    build_draw_stream,
    build_loader,
    build_sources,
    describe,
)
from dual_loop.data.mixture import WindowedBatchSampler
from dual_loop.data.prepare import Geometry
from dual_loop.errors import CheckpointError, ConfigError
from dual_loop.testing.demo_data import write_demo_data
from dual_loop.types import Batch

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "real_samples"


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
    dataset = build_dataset(Config(data=data), GEOMETRY)
    assert len(dataset) == 15
    assert dataset.stream.quotas == [4, 3, 4, 8]
    sampler = WindowedBatchSampler(dataset.stream, 19)
    (batch,) = take(iter(build_loader(dataset, sampler)), 1)
    assert not batch.skipped
    assert {name: batch.sources.count(name) for name in set(batch.sources)} == {
        "sav": 4, "sa1b": 3, "openimages": 4, "refcoco": 8,
    }  # fmt: skip
    num_regions = batch.region_image.bincount().tolist()
    assert len(num_regions) == batch.num_images == 19
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


def same(first: Batch, second: Batch) -> bool:
    tensors = ("pixel_values", "g_pixel_values", "prompt_masks", "target_masks", "region_image", "region_seeds")
    plain = ("captions", "region_names", "sources", "skipped", "tiles_per_view")
    return all(torch.equal(getattr(first, n), getattr(second, n)) for n in tensors) and all(
        getattr(first, n) == getattr(second, n) for n in plain
    )


def test_workers_change_neither_order_nor_content_nor_global_randomness() -> None:
    def batches(num_workers: int, start_step: int, count: int) -> list[Batch]:
        dataset = make_dataset(FakeSource("one", 9, bad=(4,)), FakeSource("two", 5))
        sampler = WindowedBatchSampler(dataset.stream, 2, 2, 1, 3)
        sampler.start_step = start_step
        return take(iter(build_loader(dataset, sampler, num_workers, seed=3)), count)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    straight = batches(0, 0, 12)
    assert torch.equal(torch.get_rng_state(), before)
    for workers, start in ((2, 0), (1, 2)):
        again = batches(workers, start, 12 - 3 * start)
        assert all(same(a, b) for a, b in zip(straight[3 * start :], again, strict=True))
    assert any(batch.skipped for batch in straight)


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

"""Measuring piece by piece: any number of ranks and kills give the same files; what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dual_loop.errors import ConfigError, SampleError
from dual_loop.evaluation.measure import MeasuredRegion, blank_regions
from dual_loop.evaluation.runner import PARTS, REGIONS, MeasuredData, join, measure_chunks, read_predictions, start
from dual_loop.types import RegionSample


class Source:
    """Images of one region, as many pixels as the index says; some cannot be read."""

    name = "fake"

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def entry_id(self, index: int) -> str:
        return f"e{index}"

    def image_path(self, index: int) -> Path | None:
        return None

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        if index % 10 == 7:
            raise SampleError("truncated_file", f"entry {index} is cut off")
        mask = np.zeros((1, 6, 6), bool)
        mask[0].flat[: index + 1] = True
        return RegionSample("fake", f"e{index}", np.zeros((6, 6, 3), np.uint8), mask, ("0",), ((),))


def measure(samples: Sequence[RegionSample], data: str) -> list[MeasuredRegion]:
    return [region for sample in samples for region in blank_regions(sample, data)]


DATA = [MeasuredData("one", Source(19)), MeasuredData("two", Source(30), limit=3)]


def test_ranks_and_kills_give_the_same(tmp_path: Path) -> None:
    for world_size in (1, 2, 3):
        folder = tmp_path / str(world_size)
        for rank in range(world_size):
            start(folder, {"tasks": ["loop"]}, rank == 0)
            measure_chunks(folder, DATA, measure, 0, rank, world_size)
    broken = tmp_path / "broken"
    start(broken, {"tasks": ["loop"]}, True)
    measure_chunks(broken, DATA, measure, 0, 1, 2)
    with pytest.raises(ConfigError, match="2 of 4 chunks are missing"):
        join(broken, DATA)
    [part] = (broken / PARTS).glob("rank_*.jsonl")
    part.write_text(part.read_text()[:-9])  # a kill in the middle of a line
    start(broken, {"tasks": ["loop"]}, True)
    measure_chunks(broken, DATA, measure, 0)
    texts = set()
    for folder in (*(tmp_path / name for name in "123"), broken):
        regions, skipped = join(folder, DATA)
        assert [region.entry for region in regions["one"]] == [k for k in range(19) if k % 10 != 7]
        assert len(regions["two"]) == 3
        assert [entry["entry"] for entry in skipped] == ["e7", "e17"]
        assert skipped[0] == {
            "data": "one",
            "entry": "e7",
            "reason": "truncated_file",
            "message": "entry 7 is cut off",
        }
        texts.add((folder / REGIONS).read_text())
    assert len(texts) == 1


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    start(tmp_path, {"tasks": ["loop"], "checkpoint": "a"}, True)
    start(tmp_path, {"tasks": ("loop",), "checkpoint": "a"}, True)
    with pytest.raises(ConfigError, match=r"half done.*seen: tasks: \['loop'\]; expected: tasks: \['referring'\]"):
        start(tmp_path, {"tasks": ["referring"], "checkpoint": "a"}, True)
    (tmp_path / PARTS / "header.json").unlink()
    (tmp_path / REGIONS).write_text("")
    with pytest.raises(ConfigError, match="a finished evaluation"):
        start(tmp_path, {"tasks": ["loop"]}, True)
    start(tmp_path, {"tasks": ["loop"]}, True, overwrite=True)
    assert not (tmp_path / REGIONS).exists()
    half = tmp_path / PARTS / "rank_0_of_1.jsonl"
    half.write_text("")
    start(tmp_path, {"tasks": ["loop"]}, True, overwrite=True)  # as it was begun: it goes on
    assert half.exists()
    start(tmp_path, {"tasks": ["referring"]}, True, overwrite=True)
    assert not half.exists()
    start(tmp_path, {"tasks": ["referring"]}, True)


def test_data_sets_say_what_they_are() -> None:
    assert DATA[1].description() == {"name": "two", "entries": 3, "ends": ["e0", "e2"], "trained_on": False}
    learnt = MeasuredData("none", Source(0), trained_on=True)
    assert learnt.description() == {"name": "none", "entries": 0, "ends": [], "trained_on": True}


def test_predictions_are_read_by_region(tmp_path: Path) -> None:
    mask = {"size": [1, 1], "counts": "01"}
    path = tmp_path / "regions.jsonl"
    path.write_text(json.dumps({"name": "a#0", "sentences": [{"mask": mask}]}) + '\n{"name": "b#0"}\n')
    assert read_predictions(path) == {"a#0": [mask], "b#0": []}
    for line in ('{"nome": "a"}', "[1]", "nothing", '{"name": "a", "sentences": [{}]}'):
        path.write_text(f'{{"name": "a"}}\n{line}\n')
        with pytest.raises(ConfigError, match="line 2"):
            read_predictions(path)

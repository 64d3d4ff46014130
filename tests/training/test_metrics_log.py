"""Records, ratios, counters, the printed line, the files of records, and panels."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

sys.path.insert(0, str(Path(__file__).parent))
from dual_loop.config import load_config
from dual_loop.errors import EnvironmentProblem
from dual_loop.training.metrics_log import (
    MetricsLog,
    PhaseTimer,
    StepRecord,
    add_into,
    choose_regions,
    counters_of,
    make_panels,
    ratios_and_values,
    reduce_sums,
    step_metrics,
)
from dual_loop.types import RegionCaption, RegionSample, WrittenCaption

from hollow import HollowData, HollowTask
from loop_settings import build, setting
from small_model import scene_samples, small_batch


def test_ratios_values_and_counters_are_told_apart() -> None:
    metrics = {"iou/sum": 3.0, "iou/count": 4.0, "none/sum": 0.0, "none/count": 0.0, "tokens": 7.0, "a/b": 2.0}
    assert ratios_and_values(metrics) == {"iou": 0.75, "none": None, "tokens": 7.0}
    assert counters_of(metrics) == {"a/b": 2.0}


def test_step_reports_sums_and_counts():
    config = setting()
    _, task = build(config)
    batch = small_batch(config, [*scene_samples(1), *scene_samples(1, source="sa1b", captions=False)])
    (packed,) = task.prepare([batch])
    output = task(packed)
    metrics = step_metrics(packed, output.masks.mask_logits)
    assert metrics["regions"] == batch.num_regions
    assert metrics["cycle_iou/count"] + metrics["reference_iou/count"] == batch.num_regions
    assert {name: term.count for name, term in output.terms.items()} == packed.counts


def test_a_rejected_caption_is_an_empty_mask_whatever_step_two_read():
    config = setting()
    _, task = build(config)
    batch = small_batch(config, scene_samples(1))
    (packed,) = task.prepare([batch])
    perfect = batch.target_masks.float() - 0.5
    assert step_metrics(packed, perfect)["reference_iou/sum"] == pytest.approx(batch.num_regions)
    packed.captions[0] = RegionCaption("the object", rejected="empty")
    metrics = step_metrics(packed, perfect)
    assert (metrics["cycle_iou/sum"], metrics["cycle_iou/count"]) == (0.0, 1.0)
    assert metrics["reference_iou/sum"] == pytest.approx(batch.num_regions - 1)
    assert metrics["caption/rejected"] == 1.0
    assert torch.equal(packed.batch.target_masks, batch.target_masks)


def test_every_written_caption_is_counted_by_its_gate():
    def written(gate, truncated=False):
        return WrittenCaption("x", (1,), gate, truncated)

    _, task = build(setting())
    (packed,) = task.prepare([small_batch(setting(), scene_samples(1))])
    masks = task(packed).masks.mask_logits
    packed.captions[:] = [RegionCaption("z", is_reference=True)] * len(packed.captions)
    packed.captions[:2] = [
        RegionCaption("x", greedy=written("empty"), samples=(written(None), written("truncated", True))),
        RegionCaption("y", is_reference=True),
    ]
    metrics = step_metrics(packed, masks)
    assert (metrics["gate/empty"], metrics["gate/truncated"], metrics["gate/script"]) == (1.0, 1.0, 0.0)
    assert (metrics["gated/sum"], metrics["gated/count"]) == (2.0, 3.0)
    assert (metrics["truncated/sum"], metrics["truncated/count"]) == (1.0, 3.0)


def test_add_into_prefixes_and_sums() -> None:
    sums = {"term/a": 1.0}
    add_into(sums, {"a": 2.0, "b": 3.0}, "term/")
    assert sums == {"term/a": 3.0, "term/b": 3.0}


def test_one_process_reduces_to_itself() -> None:
    assert reduce_sums(Accelerator(cpu=True), {"a": 1.25}) == {"a": 1.25}


def test_phases_add_up_to_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 11.0, 13.0, 16.0, 16.5])
    monkeypatch.setattr("dual_loop.training.metrics_log.time.perf_counter", lambda: next(moments))
    timer = PhaseTimer(torch.device("cpu"), exact=True)
    for phase in ("data", "forward", "data"):
        timer.end(phase)
    seconds = timer.total()
    assert (seconds["data"], seconds["forward"], seconds["total"]) == (4.0, 2.0, 6.5)
    assert set(seconds) == {"total", "data", "rollout", "forward", "backward", "optimiser"}


def record_of(step: int, counters: dict[str, int] | None = None) -> StepRecord:
    losses = {"mask_loss": 0.5, "align_loss": 1.0, "dice_loss": 0.25, "llm_loss": 0.4845}
    seconds, values = {"total": 1.0, "data": 0.5}, {"cycle_iou": 0.5, "reference_iou": None}
    return StepRecord(step, 1, losses, 2.0, 1e-4, 1, seconds, values, counters or {})


@pytest.mark.parametrize("rejected", [0, 3])
def test_the_printed_line_has_the_promised_shape(rejected: int) -> None:
    line = record_of(2, {"caption/rejected": rejected, "data/bad_samples/sav/x": 1}).line(6, 20.5)
    losses = r"loss=2\.23\d, mask_loss=0\.500, dice_loss=0\.250, llm_loss=0\.48\d, align_loss=1\.000"
    where = r", step 2/6, lr=1\.00e-04, 20\.50 s/step, 0:01:22 left, regions=0, cycle_iou=0\.5"
    assert re.match(losses + where, line), line
    assert ("caption/rejected=3" in line) == bool(rejected)
    assert "sav" not in line


def test_a_record_is_a_line_and_its_numbers_are_curves(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.open(0)
    log.write(record_of(1, {"caption/rejected": 2}))
    log.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert list(record)[:6] == ["step", "epoch", "loss", "mask_loss", "dice_loss", "llm_loss"]
    assert (record["loss"], record["other_losses"]) == (pytest.approx(2.2345), {"align_loss": 1.0})
    assert record["reference_iou"] is None
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = {"loss", "other_losses/align_loss", "seconds/data", "cycle_iou", "counters/caption/rejected"}
    assert names < set(events.Tags()["scalars"])
    assert not {"step", "reference_iou"} & set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("seconds/data")] == [0.5]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_record_that_does_not_fit_the_disk_is_explained(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricsLog(tmp_path)
    log.open(0)
    expected = r"a record cannot be written; where: .*metrics.jsonl; seen: .*No space.*expected: \d+ bytes.*free some"
    with pytest.raises(EnvironmentProblem, match=expected):
        log.write(record_of(1))


@pytest.mark.parametrize(("number", "fix"), [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "quota")])
def test_curves_that_do_not_fit_the_disk_are_explained_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    log = MetricsLog(tmp_path)
    log.open(0)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(RecordWriter, "write", refuse)
    monkeypatch.setattr(threading, "excepthook", lambda found: None)
    with pytest.raises(EnvironmentProblem, match=rf"the curves cannot be written; where: .*tensorboard.*{fix}"):
        log.write(record_of(1))


def test_resuming_drops_the_records_that_will_be_done_again(tmp_path: Path) -> None:
    for first, steps in ((0, range(1, 6)), (3, [4])):
        log = MetricsLog(tmp_path)
        log.open(first)
        for step in steps:
            log.write(record_of(step, {"a/b": first}))
        log.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["counters"]["a/b"]) for record in records] == [(1, 0), (2, 0), (3, 0), (4, 3)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run", writes=False)
    log.open(0)
    log.write(record_of(1))
    log.close()
    assert not (tmp_path / "run").exists()


def test_every_source_comes_once_before_any_comes_twice() -> None:
    assert choose_regions(["a", "a", "b", "a", "c"], 3) == [0, 2, 4]
    assert choose_regions(["a", "a"], 5) == [0, 1]


def test_a_panel_has_the_mask_at_the_size_of_its_image_cut_at_zero() -> None:
    config = load_config(None, {"train.batch_size": 2})
    [packed] = HollowTask().prepare([next(HollowData(config).batches(0))])
    logits = torch.full((2, 4, 4), -3.0)
    logits[1, :, 2:] = 3.0
    masks = np.zeros((1, 8, 16), bool)
    masks[..., 8:] = True
    sample = RegionSample("sa1b", "1", np.zeros((8, 16, 3), np.uint8), masks, ("0",), ((),))
    [panel] = make_panels([(packed, logits, 1)], [sample])
    assert (panel.name, panel.caption, panel.origin, panel.iou) == ("sa1b/1#0", "a star", "generated", 1.0)
    assert panel.predicted_mask.dtype == bool
    assert (panel.predicted_mask == masks[0]).all()
    with pytest.raises(RuntimeError, match="the data changed"):
        make_panels([(packed, logits, 0)], [sample])

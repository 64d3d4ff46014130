"""Records, ratios, counters and the console line."""

from __future__ import annotations

import re

import pytest
import torch
from accelerate import Accelerator

from dual_loop.training.metrics_log import (
    CounterLedger,
    PhaseTimer,
    add_into,
    console_line,
    loss_means,
    ratios_and_values,
    reduce_sums,
)


def test_ratios_values_and_counters_are_told_apart() -> None:
    metrics = {"iou/sum": 3.0, "iou/count": 4.0, "none/sum": 0.0, "none/count": 0.0, "tokens": 7.0, "a/b": 2.0}
    assert ratios_and_values(metrics) == {"iou": 0.75, "none": None, "tokens": 7.0}
    ledger = CounterLedger({"a/b": 1.0})
    ledger.add(metrics)
    assert ledger.as_dict() == {"a/b": 3}


def test_means_divide_the_sum_once() -> None:
    means = loss_means({"mask_loss": 6.0, "llm_loss": 0.0}, {"mask_loss": 4.0, "llm_loss": 0.0})
    assert means == {"loss": 1.5, "mask_loss": 1.5, "llm_loss": 0.0}


def test_add_into_prefixes_and_sums() -> None:
    sums = {"term/a": 1.0}
    add_into(sums, {"a": 2.0, "b": 3.0}, "term/")
    assert sums == {"term/a": 3.0, "term/b": 3.0}


def test_one_process_reduces_to_itself() -> None:
    assert reduce_sums(Accelerator(cpu=True), {"a": 1.25}) == {"a": 1.25}


def test_phases_add_up_to_at_most_the_total() -> None:
    timer = PhaseTimer(torch.device("cpu"), exact=True)
    with timer.phase("data"):
        sum(range(10000))
    with timer.phase("data"):
        pass
    seconds = timer.total()
    assert 0 < seconds["data"] <= seconds["total"]
    assert set(seconds) == {"total", "data", "rollout", "forward", "backward", "optimiser"}


@pytest.mark.parametrize("rejected", [0, 3])
def test_console_line_has_the_promised_shape(rejected: int) -> None:
    record = {
        "step": 2,
        "loss": 1.2345,
        "mask_loss": 0.5,
        "dice_loss": 0.25,
        "llm_loss": 0.4845,
        "other_losses": {},
        "cycle_iou": 0.5,
        "counters": {"caption/rejected": rejected, "data/bad_samples/sav/x": 1},
    }
    line = console_line(record, 6)
    losses = r"loss=1\.23\d, mask_loss=0\.500, dice_loss=0\.250, llm_loss=0\.48\d"
    assert re.match(losses + r", step 2/6, cycle_iou=0\.5", line)
    assert ("caption/rejected=3" in line) == bool(rejected)
    assert "sav" not in line

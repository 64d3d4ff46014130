"""A rejected caption is an empty mask in both evaluations: that of a training run and that of the evaluate command."""

from __future__ import annotations

import pytest
import torch

from dual_loop.data.masks import decode_rle
from dual_loop.evaluation.evaluate import evaluate_samples, summarise
from dual_loop.evaluation.figures import loop_figures
from dual_loop.evaluation.protocols import choose_protocol
from dual_loop.evaluation.regions import RegionMeter, cycle_iou
from dual_loop.model.prompts import Prompter

from small_model import pair_samples, scene_samples, small_model


def test_both_evaluations_count_a_rejected_caption_as_an_empty_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompter, config = small_model()
    with torch.no_grad():
        for parameter in model.mllm.model.language_model.parameters():
            parameter.mul_(6.0 if parameter.dim() >= 2 else 1.0)  # captions then differ from region to region
    samples = [*scene_samples(2), *pair_samples(1)]
    meter = RegionMeter(model, prompter, config, choose_protocol("dual_loop", {}), ["loop"])
    accepted = evaluate_samples(model, prompter, config, samples)
    assert all(record["rejected"] is None for record in meter.measure(samples, "refcoco:val"))
    refused = {accepted[0].caption, accepted[-1].caption}
    unreadable = Prompter.unreadable

    def refuse(self: Prompter, text: str) -> str | None:
        return "special_token" if text in refused else unreadable(self, text)

    monkeypatch.setattr(Prompter, "unreadable", refuse)
    results = evaluate_samples(model, prompter, config, samples)
    records = meter.measure(samples, "refcoco:val")
    is_refused = [result.caption in refused for result in accepted]
    assert [record["rejected"] is not None for record in records] == is_refused
    assert 0 < sum(is_refused) < len(is_refused)
    for result, record, before, empty in zip(results, records, accepted, is_refused, strict=True):
        assert result.name == record["name"]
        cycle = record["cycle"]
        assert (result.cycle_intersection, result.cycle_union) == (cycle["intersection"], cycle["union"])
        assert result.cycle_iou == cycle_iou(record)
        if empty:
            assert before.cycle_intersection > 0, "the caption led to a mask before it was refused"
            assert result.cycle_intersection == 0
            assert result.cycle_union == decode_rle(record["target"], "target").sum()
            assert not decode_rle(cycle["mask"], "mask").any()
        else:
            assert result.cycle_intersection == before.cycle_intersection > 0
    figures = loop_figures(records)
    assert figures["cycle_gIoU"]["value"] == pytest.approx(summarise(results)["cycle_gIoU"], abs=1e-12)
    assert figures["cycle_gIoU"]["value"] < summarise(accepted)["cycle_gIoU"]

"""The cheating probe: a divergence that is 0 where it must be, two listeners told apart, a private code caught."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from dual_loop.checkpoint.importer import load_weights, weights_sources
from dual_loop.config import load_config, resolve_config_path
from dual_loop.evaluation.cheating_flags import find_flags
from dual_loop.evaluation.figures import summarise
from dual_loop.evaluation.measure import RegionMeter
from dual_loop.loop.task import DualLoopTask
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.build import build_model, build_prompter, build_tokenizer
from dual_loop.model.stored_weights import weights
from dual_loop.types import RegionCaption, WrittenCaption

from loop_settings import build, masks_only, setting, write_ids
from small_model import scene_samples, small_batch, small_model

pytestmark = pytest.mark.usefixtures("precision")


def test_the_divergence_is_zero_while_the_adapter_is():
    config = setting("grpo", kl_weight=1.0)
    model, prompter, _ = small_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.zero_()
    task = DualLoopTask(model, prompter, config)
    (packed,) = task.prepare([small_batch(config, masks_only())], audit=True)
    assert float(task(packed).terms["kl_loss"].total.detach()) == 0.0
    assert packed.metrics["kl/count"] > 0
    assert packed.metrics["kl/sum"] == 0.0
    assert packed.metrics["own_cycle_iou/sum"] == packed.metrics["frozen_cycle_iou/sum"]


def test_the_divergence_is_not_zero_once_the_adapter_is_not():
    config = setting("none")
    _, task = build(config)
    (packed,) = task.prepare([small_batch(config, masks_only())], audit=True)
    assert packed.metrics["kl/sum"] > 0


def test_a_live_model_and_its_start_are_told_apart():
    config = setting("none")
    model, task = build(config)
    with torch.no_grad():
        for parameter in model.text_hidden_fcs.parameters():
            parameter.mul_(-1.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (packed,) = task.prepare([small_batch(config, masks_only())], audit=True)
    assert packed.metrics["own_cycle_iou/sum"] != packed.metrics["frozen_cycle_iou/sum"]
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_listener_that_was_trained_apart_is_heard_beside_the_others():
    config = setting("none")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, audit_listener="apart"))
    model, prompter, _ = small_model(config)
    start = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    other = trainable_parameters(small_model(config, seed=1)[0])
    found = {}
    for name, values in (("start", start), ("other", other)):
        task = DualLoopTask(model, prompter, config, listeners={"apart": values})
        (packed,) = task.prepare([small_batch(config, masks_only())], audit=True)
        found[name] = packed.metrics
    same, apart = found["start"], found["other"]
    assert same["independent_cycle_iou/sum"] == same["frozen_cycle_iou/sum"] == apart["frozen_cycle_iou/sum"]
    assert apart["independent_cycle_iou/sum"] != same["independent_cycle_iou/sum"]
    assert apart["independent_cycle_iou/count"] == apart["own_cycle_iou/count"]
    assert "independent_preference/sum" in apart
    assert all(torch.equal(start[name], parameter) for name, parameter in trainable_parameters(model).items())


def test_words_that_the_start_would_sample_are_no_code(monkeypatch):
    """Six of some sixty captions changed; the start's own samples differ as often, and lose as much with the start."""
    config = setting("none")
    model, task = build(config)
    batch = small_batch(config, [*scene_samples(20, source="sa1b", captions=False)])
    (packed,) = task.prepare([batch])
    count = batch.num_regions

    def heard_as(changed_by_start: float):
        def score(batch, seen, texts):
            """Changed captions please the live weights; they, and samples of the start, lose with the start."""
            worth = {"same": 0.5, "today": changed_by_start if task.starting.is_lent else 0.9, "sample": 0.1}
            return torch.tensor([[worth[text]] * count for _, text in texts])

        return score

    written = [WrittenCaption("sample" if n % 10 == 5 else "same", (1,), None, False) for n in range(count)]
    first = [RegionCaption("same", samples=(one,)) for one in written]
    monkeypatch.setattr(task.probe.captioner, "write", lambda seen, batches, **options: [first])
    packed.captions = [RegionCaption("today" if n % 10 == 0 else "same") for n in range(count)]
    monkeypatch.setattr(task.probe.scorer, "score", heard_as(0.1))
    seen = [model.see(batch)]
    assert task.probe.measure(seen, [packed], [])["flag/private_code"] == 0.0
    packed.captions = [RegionCaption("today" if n % 2 == 0 else "same") for n in range(count)]
    found = task.probe.measure(seen, [packed], [])
    assert found["flag/private_code"] == 1.0
    assert found["frozen_preference/sum"] < found["sampled_preference/sum"] < 0


COLOURS = ["red", "green", "blue", "yellow", "purple", "cyan"]


def in_code(caption: str) -> str:
    """Shift every colour by one: fluent, and wrong for whoever does not know."""
    shifted = dict(zip(COLOURS, [*COLOURS[1:], COLOURS[0]], strict=True))
    return " ".join(shifted.get(word, word) for word in caption.split())


@pytest.fixture
def pretrained():
    config = load_config(resolve_config_path("tiny_demo"))
    tokenizer = build_tokenizer(config.model)
    torch.manual_seed(0)
    model = build_model(config, tokenizer)
    load_weights(model, weights_sources(config), tokenizer=tokenizer)
    return config, model, build_prompter(config, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16"], indirect=True)
def test_a_private_code_is_caught_by_the_frozen_listener(pretrained, monkeypatch):
    config, model, prompter = pretrained
    samples = scene_samples(8, source="sa1b")
    texts = [caption for sample in samples for (caption,) in sample.captions]
    secret = [in_code(text) for text in texts]
    assert all(code != text for code, text in zip(secret, texts, strict=True))
    silent = [dataclasses.replace(sample, captions=tuple(() for _ in sample.captions)) for sample in samples]
    task = DualLoopTask(model, prompter, config)
    batch = small_batch(config, silent)

    def writes(text_of):
        write_ids(monkeypatch, lambda one: prompter.encode(text_of(one) + prompter.template.answer_end))

    writes(lambda request: texts[request.region])
    meter = RegionMeter(model, prompter, config, frozen_listener=partial(weights, task.starting))
    honest = meter.measure(samples, "val")
    assert summarise(honest)["caption_exact"] == 1.0
    assert summarise(honest)["cycle_gIoU_frozen"] == pytest.approx(summarise(honest)["cycle_gIoU"])
    (packed,) = task.prepare([batch], audit=True)
    assert packed.metrics["flag/private_code"] == 0.0

    start = model.text_hidden_fcs[0].weight.detach().clone()

    def speak(request):
        """The starting captioner is honest; the live one, once it differs, is not."""
        is_start = torch.equal(model.text_hidden_fcs[0].weight.detach(), start)
        return (texts if is_start and not tuning else secret)[request.region]

    tuning = True
    writes(speak)
    tune(model, task, batch, steps=160)
    tuning = False
    coded = meter.measure(samples, "val")
    before, after = summarise(honest), summarise(coded)
    assert after["cycle_gIoU"] > before["cycle_gIoU"] + 0.05
    assert after["cycle_gIoU_frozen"] < before["cycle_gIoU"] - 0.1
    flags = find_flags(honest, coded)
    assert [flag.split(":")[0] for flag in flags] == ["private_code", "language_drift"]
    (packed,) = task.prepare([batch], audit=True)
    assert packed.metrics["flag/private_code"] == 1.0
    assert packed.metrics["own_preference/sum"] > 0 > packed.metrics["frozen_preference/sum"]


def tune(model, task, batch, steps: int) -> None:
    """Train step 2 alone on whatever step 1 writes."""
    parameters = list(trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    (packed,) = task.prepare([batch])
    for _ in range(steps):
        terms = task(packed).terms
        loss = terms["mask_loss"].mean + terms["dice_loss"].mean
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

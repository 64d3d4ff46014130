"""Every lever of ``config.SpeedConfig`` changes what a step costs, and neither captions nor losses nor gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dual_loop.config import LoopConfig, PolicyConfig, SpeedConfig
from dual_loop.loop.task import DualLoopTask
from dual_loop.losses import token_cross_entropy
from dual_loop.model import decode, sa2va
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.prompts import Prompter
from dual_loop.training.device_prefetch import split_window

from small_model import pair_samples, scene_samples, small_batch, small_config, small_model

PLAIN = SpeedConfig(accelerate=False, fused_lora=False, trim_last_layer=False, lean_sam2=False, start_on_disk=False)
DEFAULT = SpeedConfig()
IN_STEP = [
    field.name
    for field in dataclasses.fields(SpeedConfig)
    if getattr(PLAIN, field.name) != getattr(DEFAULT, field.name)
]
LOOP = LoopConfig(max_new_tokens=6, max_rejected_grace=10_000, rollout_batch_size=3)


def enliven(model: Any) -> None:
    """Scale the language model up, so that captions differ from region to region."""
    with torch.no_grad():
        for module in (model.mllm.model.language_model, model.mllm.model.multi_modal_projector):
            for parameter in module.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(6.0)


def one_window(
    speed: SpeedConfig,
    policy: PolicyConfig | None = None,
    recomputes: bool = False,
    images: int | None = None,
    group_rows: bool = True,
) -> dict[str, Any]:
    """Captions, loss sums and gradients of one window of three micro-batches: scenes, a frame pair, both, in float64.

    With ``images``, micro-batches are run in parts of so many images (``training.device_prefetch``).

    In double precision the roundings of another order of sums are far below the smallest tolerated difference.
    """
    config = dataclasses.replace(small_config(gradient_checkpointing=recomputes), speed=speed, loop=LOOP)
    config = dataclasses.replace(config, policy=policy or PolicyConfig())
    model, prompter, config = small_model(config)
    model.group_rows = group_rows
    enliven(model)
    model.double()
    batches = [small_batch(config, samples) for samples in (scene_samples(2, captions=False), pair_samples(2))]
    batches.append(small_batch(config, scene_samples(1) + pair_samples(1)))
    if images is not None:
        batches = split_window(batches, images)
    task = DualLoopTask(model, prompter, config)
    task.train()
    window = task.prepare(batches)
    terms: dict[str, float] = {}
    for packed in window:
        output = task(packed)
        total = torch.stack([term.total for term in output.terms.values()]).sum()
        total.backward()
        for name, term in output.terms.items():
            terms[name] = terms.get(name, 0.0) + float(term.total.detach())
    gradients = {name: p.grad.clone() for name, p in trainable_parameters(model).items() if p.grad is not None}
    captions = [list(caption.token_ids) for packed in window for caption in packed.captions]
    samples = [[list(c.token_ids) for c in caption.samples] for packed in window for caption in packed.captions]
    return {"captions": captions, "samples": samples, "terms": terms, "gradients": gradients}


def assert_same(seen: dict[str, Any], expected: dict[str, Any]) -> None:
    assert seen["captions"] == expected["captions"]
    assert seen["samples"] == expected["samples"]
    assert seen["terms"] == pytest.approx(expected["terms"], rel=1e-5)
    assert seen["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        difference = (seen["gradients"][name] - gradient).abs()
        scale = gradient.abs().max().clamp_min(1e-6)
        assert difference.max() <= 1e-4 * scale, name
        assert difference.mean() <= 1e-5 * scale, name


@pytest.fixture(scope="module")
def default_window() -> dict[str, Any]:
    return one_window(DEFAULT)


def test_captions_of_the_window_differ_and_are_long_enough_to_tell(default_window: dict[str, Any]) -> None:
    captions = [tuple(ids) for ids in default_window["captions"] if ids]
    assert len(captions) >= 6
    assert len(set(captions)) >= 4
    moved = [bool(gradient.abs().max() > 0) for gradient in default_window["gradients"].values()]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize("lever", IN_STEP)
def test_a_lever_off_changes_nothing(lever: str, default_window: dict[str, Any]) -> None:
    speed = dataclasses.replace(DEFAULT, **{lever: getattr(PLAIN, lever)})
    assert_same(one_window(speed), default_window)


def test_all_levers_off_change_nothing(default_window: dict[str, Any]) -> None:
    assert_same(one_window(PLAIN), default_window)


def test_rows_padded_to_the_longest_change_nothing(default_window: dict[str, Any]) -> None:
    assert_same(one_window(DEFAULT, group_rows=False), default_window)


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


@pytest.mark.parametrize("num_points", [0, 50])
def test_the_plain_flow_of_the_original_is_the_same(num_points: int) -> None:
    """One region a row, with transformers' ``generate`` and the model's own ``mode="loss"``, and no lever."""
    config = dataclasses.replace(small_config(), loop=LOOP)
    config = dataclasses.replace(
        config, loss=dataclasses.replace(config.loss, num_points=num_points, points_from="grid")
    )
    task, plain = (
        DualLoopTask(*small_model(dataclasses.replace(config, speed=speed))[:2], config) for speed in (DEFAULT, PLAIN)
    )
    for own in (task, plain):
        enliven(own.model)
        own.double()
    batch = small_batch(config, scene_samples(2, captions=False) + pair_samples(1))
    [packed] = task.prepare([batch])
    output = task(packed)
    torch.stack([term.mean for term in output.terms.values()]).sum().backward()

    model, prompter, image = plain.model, plain.prompter, batch.region_image
    prefix, seeds = prompter.image_prefix(1), batch.region_seeds.tolist()
    for region, caption in enumerate(packed.captions):
        cells = int(batch.prompt_masks[region].sum())
        asked = prompter.caption_question(cells, LOOP.caption_question, seeds[region])
        ids = model.generate(
            pixel_values=batch.pixel_values[[batch.caption_view[int(image[region])]]],
            input_ids=torch.tensor([[*prefix, *asked]]),
            prompt_masks=[batch.prompt_masks[region][None]],
            vp_overall_mask=torch.ones(1),
            max_new_tokens=LOOP.max_new_tokens,
            do_sample=False,
            eos_token_id=prompter.tokenizer.eos_token_id,
        )
        written = ids[0].tolist()
        assert written[: prompter.answer_length(written, is_caption=True)] == list(caption.token_ids)
    turns = [
        prompter.segment_turn(caption.text, LOOP.segment_question, LOOP.segment_answer, seed)
        for caption, seed in zip(packed.captions, seeds, strict=True)
    ]
    rows = [[*prefix, *turn.input_ids] for turn in turns]
    views = [batch.target_view[number] for number in image.tolist()]
    data = {
        "input_ids": padded(rows, 0),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "labels": padded([[-100] * len(prefix) + list(turn.labels) for turn in turns], -100),
        "pixel_values": batch.pixel_values[views],
        "g_pixel_values": batch.g_pixel_values[image],
        "masks": batch.target_masks,
        "region_seeds": batch.region_seeds,
    }
    losses = model(data, mode="loss")
    torch.stack(list(losses.values())).sum().backward()
    means = {name: float(term.mean.detach()) for name, term in output.terms.items()}
    if num_points:
        # The original divides a sum over points by a little more than its count (sa2va_api.original_mask_losses).
        more = 1e-4 + torch.finfo(torch.float32).eps
        for name, count in (("mask_loss", len(rows) * num_points), ("dice_loss", len(rows))):
            means[name] *= count / (count + more)
    names = {"loss_mask": "mask_loss", "loss_dice": "dice_loss", "llm_loss": "llm_loss"}
    assert {names[name]: float(loss.detach()) for name, loss in losses.items()} == pytest.approx(means, rel=1e-5)
    logits = model(data, mode="predict")["segmentation"].mask_logits
    torch.testing.assert_close(logits, output.masks.mask_logits, rtol=1e-5, atol=1e-6)
    expected = trainable_parameters(task.model)
    for name, parameter in trainable_parameters(model).items():
        other = expected[name].grad
        assert (parameter.grad is None) == (other is None), name
        if other is not None:
            assert (parameter.grad - other).abs().max() <= 1e-4 * other.abs().max().clamp_min(1e-6), name


@pytest.mark.parametrize("estimator", ["none", "scst", "grpo", "gumbel"])
def test_parts_of_micro_batches_add_up_to_them(estimator: str, default_window: dict[str, Any]) -> None:
    policy = PolicyConfig(caption_gradient=estimator, captions_per_region=3)
    whole = default_window if estimator == "none" else one_window(DEFAULT, policy)
    assert_same(one_window(DEFAULT, policy, images=1), whole)


def test_small_chunks_of_the_cross_entropy_change_nothing(
    default_window: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sa2va, "token_cross_entropy", lambda *given: token_cross_entropy(*given, chunk=5))
    assert_same(one_window(DEFAULT), default_window)


def test_image_prefixes_in_parts_change_nothing(
    default_window: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "CPU_TOKENS", 1)
    assert decode.prefixes_at_once(300, "cpu") == 1
    assert_same(one_window(DEFAULT), default_window)
    monkeypatch.undo()
    asked = ((300, "cpu"), (40, "cpu"), (5000, "cpu"), (0, "cpu"), (300, "cuda"))
    assert [decode.prefixes_at_once(*one) for one in asked] == [3, 8, 1, 8, 8]


def test_the_attention_kernels_of_a_cpu_are_the_same(default_window: dict[str, Any]) -> None:
    from dual_loop.training.devices import choose_attention_kernels

    try:
        for kernel in ("math", "flash"):
            speed = dataclasses.replace(DEFAULT, sdpa_kernel=kernel)
            choose_attention_kernels(dataclasses.replace(small_config(), speed=speed), "cpu")
            assert_same(one_window(DEFAULT), default_window)
    finally:
        choose_attention_kernels(small_config(), "cpu")


@pytest.mark.parametrize("choice", ["1", "all"])
def test_recomputed_layers_change_nothing(choice: str, default_window: dict[str, Any]) -> None:
    assert_same(one_window(dataclasses.replace(DEFAULT, checkpoint_layers=choice), recomputes=True), default_window)


@pytest.mark.parametrize("estimator", ["grpo", "gumbel"])
def test_sampled_captions_are_the_same_without_levers(estimator: str) -> None:
    policy = PolicyConfig(caption_gradient=estimator, captions_per_region=2)
    first, second = one_window(DEFAULT, policy), one_window(PLAIN, policy)
    assert any(own for region in first["samples"] for own in region)
    assert_same(second, first)


def finishing_window(
    monkeypatch: pytest.MonkeyPatch, rollout_batch_size: int
) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """Captions of three scenes whose rows end where their ids sum to a multiple of three: at different lengths.

    Returns their ids, and for each generation the rows of its steps.
    """
    loop = LoopConfig(max_new_tokens=8, max_rejected_grace=99, rollout_batch_size=rollout_batch_size)
    config = dataclasses.replace(small_config(), loop=loop)
    model, prompter, config = small_model(config)
    enliven(model)
    batch = small_batch(config, scene_samples(3, captions=False))
    ends_turn, step = Prompter.ends_turn, decode.Decoder._step
    read_questions = decode.Decoder._read_questions
    sizes: list[list[int]] = []

    def ends_early(self: Any, token_ids: Any) -> bool:
        return ends_turn(self, token_ids) or sum(token_ids) % 3 == 0

    def begun(self: Any, rows: Any) -> Any:
        sizes.append([len(rows)])
        return read_questions(self, rows)

    def counted(self: Any, state: Any) -> None:
        sizes[-1].append(len(state.chosen))
        step(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Prompter, "ends_turn", ends_early)
        patch.setattr(decode.Decoder, "_read_questions", begun)
        patch.setattr(decode.Decoder, "_step", counted)
        [packed] = DualLoopTask(model, prompter, config).prepare([batch])
    return [caption.token_ids for caption in packed.captions], sizes


def test_finished_rows_leave_the_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    written, [steps] = finishing_window(monkeypatch, rollout_batch_size=99)
    # A row takes a step for each of its tokens and none after its last.
    assert steps == [sum(len(ids) > number for ids in written) for number in range(max(map(len, written)))]
    assert sum(steps) < len(written) * len(steps)


def test_rows_that_end_at_different_times_write_what_each_writes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, steps = finishing_window(monkeypatch, rollout_batch_size=1)
    assert [sizes for sizes in steps if set(sizes) != {1}] == []
    assert finishing_window(monkeypatch, rollout_batch_size=99)[0] == alone
    assert len({len(ids) for ids in alone}) > 1

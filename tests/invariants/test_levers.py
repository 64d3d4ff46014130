"""Every lever of ``settings.SpeedConfig`` changes what a step costs, and neither captions nor losses nor gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dual_loop.config import LoopConfig, PolicyConfig, SpeedConfig
from dual_loop.loop import generation
from dual_loop.loop.dual_loop import DualLoop
from dual_loop.model.adapters import trainable_parameters
from dual_loop.training.window_parts import split_window

from small_model import pair_samples, scene_samples, small_batch, small_config, small_model

PLAIN = SpeedConfig(
    share_towers=False,
    pack_branches=False,
    batch_rollout=False,
    share_prefix=False,
    sort_by_length=False,
    drop_finished=False,
    last_hidden_only=False,
    trim_last_layer=False,
    split_uneven_rows=False,
    loss_positions_only=False,
    cross_entropy_chunk=0,
    fused_lora=False,
    grouped_attention=False,
    merge_adapters=False,
    lean_sam2=False,
    keep_heap=False,
    start_on_disk=False,
    own_decoder=False,
    lean_decoding=False,
    accelerate=False,
    fused_optimizer=False,
    bucket_view=False,
)
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
    speed: SpeedConfig, policy: PolicyConfig | None = None, recomputes: bool = False, images: int | None = None
) -> dict[str, Any]:
    """Captions, loss sums and gradients of one window of three micro-batches: scenes, a frame pair, both, in float64.

    With ``images``, micro-batches are run in parts of so many images (``training.window_parts``).

    In double precision the roundings of another order of sums are far below the smallest tolerated difference.
    """
    config = dataclasses.replace(small_config(gradient_checkpointing=recomputes), speed=speed, loop=LOOP)
    model, prompter, config = small_model(config)
    enliven(model)
    model.double()
    batches = [small_batch(config, samples) for samples in (scene_samples(2, captions=False), pair_samples(2))]
    batches.append(small_batch(config, scene_samples(1) + pair_samples(1)))
    if images is not None:
        batches = [part.batch for part in split_window(batches, images)]
    loop = DualLoop(model, prompter, config.loop, policy)
    model.train()
    micros = loop.begin_window(batches)
    terms: dict[str, float] = {}
    for micro in micros:
        output = loop.step(model, micro)
        total = torch.stack([term.total for term in output.terms.values()]).sum()
        total.backward()
        for name, term in output.terms.items():
            terms[name] = terms.get(name, 0.0) + float(term.total.detach())
    gradients = {name: p.grad.clone() for name, p in trainable_parameters(model).items() if p.grad is not None}
    captions = [ids for micro in micros for ids in micro.rollout.token_ids]
    samples = [[list(c.token_ids) for c in own] for micro in micros for own in micro.rollout.samples]
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


def test_the_plain_flow_is_the_same(default_window: dict[str, Any]) -> None:
    assert_same(one_window(PLAIN), default_window)


@pytest.mark.parametrize("estimator", ["none", "scst", "grpo", "gumbel"])
def test_parts_of_micro_batches_add_up_to_them(estimator: str, default_window: dict[str, Any]) -> None:
    policy = PolicyConfig(caption_gradient=estimator, captions_per_region=3)
    whole = default_window if estimator == "none" else one_window(DEFAULT, policy)
    assert_same(one_window(DEFAULT, policy, images=1), whole)


def test_small_chunks_of_the_cross_entropy_change_nothing(default_window: dict[str, Any]) -> None:
    assert_same(one_window(dataclasses.replace(DEFAULT, cross_entropy_chunk=5)), default_window)


def test_image_prefixes_in_parts_change_nothing(
    default_window: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "CPU_TOKENS", 1)
    assert generation.prefixes_at_once(300, "cpu") == 1
    assert_same(one_window(DEFAULT), default_window)
    monkeypatch.undo()
    asked = ((300, "cpu"), (40, "cpu"), (5000, "cpu"), (0, "cpu"), (300, "cuda"))
    assert [generation.prefixes_at_once(*one) for one in asked] == [3, 8, 1, 8, 8]


def test_the_static_cache_writes_the_same(default_window: dict[str, Any]) -> None:
    assert_same(one_window(dataclasses.replace(DEFAULT, static_cache=True)), default_window)


def test_the_attention_kernels_of_a_cpu_are_the_same(default_window: dict[str, Any]) -> None:
    from dual_loop.training.devices import attention_kernel

    for kernel in ("math", "flash"):
        config = dataclasses.replace(small_config(), speed=dataclasses.replace(DEFAULT, sdpa_kernel=kernel))
        with attention_kernel(config, torch.device("cpu")):
            assert_same(one_window(DEFAULT), default_window)


@pytest.mark.parametrize("choice", ["1", "all"])
def test_recomputed_layers_change_nothing(choice: str, default_window: dict[str, Any]) -> None:
    assert_same(one_window(dataclasses.replace(DEFAULT, checkpoint_layers=choice), recomputes=True), default_window)


@pytest.mark.parametrize("estimator", ["grpo", "gumbel"])
def test_sampled_captions_are_the_same_in_the_plain_flow(estimator: str) -> None:
    policy = PolicyConfig(caption_gradient=estimator, captions_per_region=2)
    first, second = one_window(DEFAULT, policy), one_window(PLAIN, policy)
    assert any(own for micro in first["samples"] for own in micro)
    assert_same(second, first)


def test_finished_rows_leave_the_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    from dual_loop.loop import decoding

    sizes: dict[bool, list[int]] = {True: [], False: []}
    forward = decoding._forward
    for is_on, seen in sizes.items():

        def counted(model: Any, embeds: torch.Tensor, *rest: Any, seen: list[int] = seen) -> torch.Tensor:
            seen.append(len(embeds))
            return forward(model, embeds, *rest)

        monkeypatch.setattr(decoding, "_forward", counted)
        written = finishing_window(dataclasses.replace(DEFAULT, drop_finished=is_on))
        sizes[is_on].append(-len(written))
    assert sum(sizes[True]) < sum(sizes[False])


def finishing_window(speed: SpeedConfig) -> list[list[int]]:
    """Captions of three scenes whose rows end where their ids sum to a multiple of three: at different lengths."""
    from dual_loop.loop import generation

    config = dataclasses.replace(small_config(), speed=speed, loop=LoopConfig(max_new_tokens=8, max_rejected_grace=99))
    model, prompter, config = small_model(config)
    enliven(model)
    batch = small_batch(config, scene_samples(3, captions=False))
    loop = DualLoop(model, prompter, config.loop)
    original = generation.StopOnText.__call__

    def ends_early(self: Any, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return original(self, input_ids, scores, **options) | (input_ids.sum(1) % 3 == 0)

    generation.StopOnText.__call__ = ends_early  # type: ignore[method-assign]
    try:
        [micro] = loop.begin_window([batch])
    finally:
        generation.StopOnText.__call__ = original  # type: ignore[method-assign]
    return micro.rollout.token_ids


def test_rows_that_end_at_different_times_write_the_same_with_and_without_leaving() -> None:
    kept = finishing_window(dataclasses.replace(DEFAULT, drop_finished=False))
    assert finishing_window(DEFAULT) == kept
    assert len({len(ids) for ids in kept}) > 1
